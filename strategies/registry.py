"""Strategies by the names a study file uses. A new rule is one file in ``strategies/rules`` and one line here."""

from __future__ import annotations

from medfed.errors import StudyError
from medfed.study import FEDERATED, StudyConfig
from medfed.study_sections import StrategyConfig
from strategies.federation import Strategy
from strategies.local_method import LocalMethod
from strategies.personal import Personalisation
from strategies.rules.fed_sb import FedSB
from strategies.rules.fedit import FedIT
from strategies.rules.fedsa import FedSA
from strategies.rules.ffa_lora import FfaLora
from strategies.rules.fresh import FfaFresh, TwinFresh
from strategies.rules.head_only import HeadOnly
from strategies.rules.rolora import AltGauge, RoLora
from strategies.rules.twin import Twin
from strategies.server_optimizer import ServerOptimizer
from strategies.strategy import Rule, Setting

_KEPT = 4
_made: dict[tuple[str, bool], Strategy] = {}

_RULES: tuple[type[Rule], ...] = (
    FedIT,
    FfaLora,
    RoLora,
    AltGauge,
    Twin,
    FfaFresh,
    TwinFresh,
    FedSB,
    FedSA,
    HeadOnly,
)

RULES: dict[str, type[Rule]] = {**{rule.name: rule for rule in _RULES}, "fedsvd": FfaLora, "fedavg": FedIT}
"""By the name in a study file; ``fedsvd`` is FFA-LoRA with an orthonormal A, ``fedavg`` is FedIT's average."""


def check_name(config: StrategyConfig) -> None:
    """Refuse a rule that nobody wrote, before anything is loaded.

    Raises:
        StudyError: names the known ones.
    """
    if config.name not in RULES:
        raise StudyError(f"Expected strategy.name of {', '.join(sorted(RULES))}, got {config.name!r}.")


def strategy_of(study: StudyConfig, scope: str = FEDERATED) -> Strategy:
    """The strategy of a resolved study in a federation.

    In a federation of one virtual site there is nobody to differ from: nothing stays at a site there.

    Raises:
        StudyError: for a name that is not registered, or parts that do not go together.
    """
    key = (study.digest, scope == FEDERATED)
    if key not in _made:
        if len(_made) >= _KEPT:
            _made.clear()
        _made[key] = _made_for(study, sites_differ=scope == FEDERATED)
    return _made[key]


def _made_for(study: StudyConfig, *, sites_differ: bool) -> Strategy:
    config = study.strategy
    check_name(config)
    setting = Setting(
        config=config,
        manifest=study.resolved_manifest,
        seed=study.seed,
        num_sites=len(study.sites),
    )
    return Strategy(RULES[config.name](setting), LocalMethod(), Personalisation(), ServerOptimizer(), sites_differ)
