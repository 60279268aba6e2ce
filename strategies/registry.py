"""Strategies by the names a study file uses. A new rule is one file in ``strategies/rules`` and one line here."""

from __future__ import annotations

from medfed.errors import IndividualsError, StudyError
from medfed.study import FEDERATED, StudyConfig, is_of_all_sites
from medfed.study_sections import StrategyConfig
from strategies.combination import combined
from strategies.federation import Strategy
from strategies.narrowed import check_ranks
from strategies.rules.fed_sb import FedSB
from strategies.rules.fedex import FedEx
from strategies.rules.fedit import FedIT
from strategies.rules.fedsa import FedSA
from strategies.rules.ffa_lora import FfaLora
from strategies.rules.flexlora import FlexLora
from strategies.rules.flora import Flora
from strategies.rules.fresh import FfaFresh, TwinFresh
from strategies.rules.head_only import HeadOnly
from strategies.rules.lora_fair import LoraFair
from strategies.rules.robust import Bulyan, Krum, Median, MultiKrum, TrimmedMean
from strategies.rules.rolora import AltGauge, RoLora
from strategies.rules.twin import Twin
from strategies.strategy import IndividualRule, Rule, Setting

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
    FedEx,
    Flora,
    FlexLora,
    LoraFair,
    Krum,
    MultiKrum,
    Bulyan,
    Median,
    TrimmedMean,
)

_ALIASES: dict[str, type[Rule]] = {"fedsvd": FfaLora, "fedavg": FedIT, "hlora": FlexLora}

RULES: dict[str, type[Rule]] = {**{rule.name: rule for rule in _RULES}, **_ALIASES}
"""By the name in a study file; ``fedsvd`` is FFA-LoRA with an orthonormal A, ``fedavg`` is FedIT's average, ``hlora``
is FlexLoRA."""


def check_name(config: StrategyConfig) -> None:
    """Refuse a rule that nobody wrote, before anything is loaded.

    Raises:
        StudyError: names the known ones.
    """
    if config.name not in RULES:
        raise StudyError(f"Expected strategy.name of {', '.join(sorted(RULES))}, got {config.name!r}.")


def check_individuals(study: StudyConfig) -> None:
    """Refuse a rule that looks at single sites where nobody can.

    Raises:
        IndividualsError: names the rule, and others.
    """
    rule = RULES.get(study.strategy.name)
    if not study.sums_securely or rule is None or not issubclass(rule, IndividualRule):
        return
    sums = sorted(name for name, other in RULES.items() if not issubclass(other, IndividualRule))
    raise IndividualsError(
        f"Expected a strategy that takes sums with [secure_aggregation], got {study.strategy.name!r}, for which the "
        f"server must see each site's own update; use one of {', '.join(sums)}, or set enabled = false."
    )


def strategy_of(study: StudyConfig, scope: str = FEDERATED) -> Strategy:
    """The strategy of a resolved study in a federation.

    In a federation of one virtual site there is nobody to differ from: nothing stays at a site there.

    Raises:
        StudyError: for a name that is not registered, or parts that do not go together.
        IndividualsError: if it needs to see single sites and the study has secure aggregation.
    """
    key = (study.digest, is_of_all_sites(scope))
    if key not in _made:
        if len(_made) >= _KEPT:
            _made.clear()
        return _made.setdefault(key, _made_for(study, sites_differ=is_of_all_sites(scope)))
    return _made[key]


def _made_for(study: StudyConfig, *, sites_differ: bool) -> Strategy:
    config = study.strategy
    check_name(config)
    check_individuals(study)
    setting = Setting(
        config=config,
        manifest=study.resolved_manifest,
        seed=study.seed,
        num_sites=len(study.sites),
        rank_of={site.name: site.rank for site in study.sites if site.rank is not None},
    )
    strategy = combined(study, RULES[config.name](setting), sites_differ=sites_differ)
    check_ranks(study, strategy)
    return strategy
