"""The parts that a study asks for beside its rule, and which of them go together.

Both ends make a study's strategy by this file, so what is refused here is neither trained nor summed.
"""

from __future__ import annotations

from medfed.errors import StudyError
from medfed.models.registry import backbone_of
from medfed.study import StudyConfig
from medfed.study_sections import (
    AdaptiveServerConfig,
    DittoPersonalConfig,
    DynamicLocalConfig,
    FairLocalConfig,
    LocalConfig,
    MomentumServerConfig,
    ProximalLocalConfig,
    ServerConfig,
)
from strategies.federation import Strategy
from strategies.local.feddyn import FedDyn
from strategies.local.fednova import FedNova
from strategies.local.fedprox import FedProx
from strategies.local.q_fedavg import QFedAvg
from strategies.local.scaffold import Scaffold
from strategies.local_method import LocalMethod
from strategies.lora import lora_pairs
from strategies.own_models import Ditto, SiteAdapter
from strategies.personal import Personalisation
from strategies.rules.fedit import FedIT
from strategies.rules.fresh import FfaFresh
from strategies.server_optimizer import AdaptiveOptimizer, FedAdagrad, FedAdam, FedAvgM, FedYogi, ServerOptimizer
from strategies.staying_tensors import FedBN, FedRep
from strategies.strategy import DELTA, Rule

_BETA_1 = {FedAdagrad.name: 0.0, FedYogi.name: 0.9, FedAdam.name: 0.9}
_BETA_2 = 0.99
"""Reddi et al. 2021, section 5: the values that the paper fixes."""


def combined(study: StudyConfig, rule: Rule, *, sites_differ: bool) -> Strategy:
    """A study's strategy from its rule.

    Raises:
        StudyError: if its parts do not go together, or not with the rest of the study.
    """
    strategy = Strategy(
        rule,
        local_of(study.strategy.local, study.training.learning_rate),
        personal_of(study),
        server_of(study.strategy.server),
        sites_differ,
        study.strategy.probe,
    )
    _check_probe(strategy)
    if study.strategy.hold_frames is not None and not isinstance(rule, FfaFresh):
        raise StudyError(
            f"Expected no strategy.hold_frames for strategy {rule.name!r}, whose frames are not redrawn, got "
            f"{study.strategy.hold_frames}; remove it, or use 'ffa-fresh' or 'twin-fresh'."
        )
    _check_subspace(strategy)
    _check_individuals(strategy, shrinks=study.strategy.shrinkage)
    _check_passes(strategy)
    _check_training(strategy, study)
    _check_privacy(strategy, study)
    return strategy


def local_of(config: LocalConfig | None, learning_rate: float) -> LocalMethod:
    """The local method of a study."""
    match config:
        case None:
            return LocalMethod()
        case ProximalLocalConfig():
            return FedProx(config.mu)
        case DynamicLocalConfig():
            return FedDyn(config.alpha)
        case FairLocalConfig():
            return QFedAvg(config.q)
        case _ if config.method == "scaffold":
            return Scaffold(learning_rate)
        case _:
            return FedNova(learning_rate)


def personal_of(study: StudyConfig) -> Personalisation:
    """The personalisation of a study.

    Raises:
        StudyError: if the adapter lacks what should stay.
    """
    config, manifest = study.strategy.personal, study.resolved_manifest
    if config is None:
        return Personalisation()
    if isinstance(config, DittoPersonalConfig):
        return Ditto(config.proximal)
    if config.method == "site-adapter":
        return SiteAdapter()
    if config.method == "fedbn":
        return FedBN(manifest)
    return FedRep(manifest, backbone_of(study.backbone).heads)


def server_of(config: ServerConfig | None) -> ServerOptimizer:
    """The server's optimiser of a study."""
    if config is None:
        return ServerOptimizer()
    if isinstance(config, MomentumServerConfig):
        return FedAvgM(config.learning_rate, config.momentum)
    return _adaptive(config)


def _adaptive(config: AdaptiveServerConfig) -> AdaptiveOptimizer:
    kinds: tuple[type[AdaptiveOptimizer], ...] = (FedAdagrad, FedYogi, FedAdam)
    made = {kind.name: kind for kind in kinds}[config.optimizer]
    beta_1 = _BETA_1[config.optimizer] if config.beta_1 is None else config.beta_1
    beta_2 = _BETA_2 if config.beta_2 is None else config.beta_2
    return made(config.learning_rate, beta_1, beta_2, config.tau)


def _check_subspace(strategy: Strategy) -> None:
    if strategy.rule.fixed_subspace:
        return
    for part in (strategy.local, strategy.personal, strategy.server):
        if part.needs_fixed_subspace:
            raise StudyError(
                f"Expected a strategy that trains the same coordinates in every round for {part.name!r}, which "
                f"remembers something along them, got {strategy.rule.name!r}; change one of them."
            )


def _check_probe(strategy: Strategy) -> None:
    """There is an error to estimate where A and B are both averaged, whole."""
    if strategy.probes and not (isinstance(strategy.rule, FedIT) and lora_pairs(strategy.rule.manifest)):
        raise StudyError(
            f"Expected strategy.name = 'fedit' and LoRA pairs for strategy.probe, got {strategy.rule.name!r}; other "
            "rules make no such error, or are not averages. Remove it."
        )
    takes_means = type(strategy.local).combine is LocalMethod.combine
    if strategy.probes and (not takes_means or strategy.plan(1).stays):
        raise StudyError(
            "Expected mean changes of the whole adapter for strategy.probe, got "
            f"{(strategy.personal if takes_means else strategy.local).name!r}; remove one of them."
        )


def _check_individuals(strategy: Strategy, *, shrinks: bool) -> None:
    """A rule that looks at single sites takes their changes and nothing else."""
    if not strategy.needs_individuals:
        return
    local = strategy.local
    if local.stats != (DELTA,) or type(local).combine is not LocalMethod.combine:
        raise StudyError(
            f"Expected no strategy.local.method that sends statistics with {strategy.rule.name!r}, which takes each "
            f"site's change, got {local.name!r}; use 'fedprox', or a rule that takes sums."
        )
    if type(strategy.server) is not ServerOptimizer:
        raise StudyError(
            f"Expected no strategy.server with {strategy.rule.name!r}, which merges sites by itself, got "
            f"{strategy.server.name!r}; remove it."
        )
    if shrinks:
        raise StudyError(
            f"Expected no strategy.shrinkage with {strategy.rule.name!r}, which makes no mean change; remove it."
        )


def _check_passes(strategy: Strategy) -> None:
    local, personal, rule = strategy.local, strategy.personal, strategy.rule
    phases = strategy.phases
    if local.pulls and any(phase.passes > 1 for phase in phases):
        raise StudyError(
            f"Expected one pass over the data for {local.name!r}, which pulls at all that trains, got "
            f"{personal.name!r}, which trains in several; remove one of them."
        )
    if personal.trains_its_own and type(rule).folds is not Rule.folds:
        raise StudyError(
            f"Expected a strategy that leaves the base weights alone for {personal.name!r}, whose own models stand on "
            f"them, got {rule.name!r}, which folds into them; change one of them."
        )
    if personal.trains_its_own and any(rule.stays(name) for phase in phases for name in phase.trainable.parts):
        raise StudyError(
            f"Expected a strategy whose tensors are all shared for {personal.name!r}, got {rule.name!r}, of which "
            "some stay at each site already; remove one of them."
        )


def _check_training(strategy: Strategy, study: StudyConfig) -> None:
    if strategy.local.needs_sgd and study.training.optimizer != "sgd":
        raise StudyError(
            f"Expected training.optimizer = 'sgd' for {strategy.local.name!r}, whose formulas hold for plain steps "
            f"alone, got {study.training.optimizer!r}; change one of them."
        )


def _check_privacy(strategy: Strategy, study: StudyConfig) -> None:
    if study.privacy is None:
        return
    local, personal = strategy.local, strategy.personal
    if local.needs_start_loss:
        raise StudyError(
            f"Expected no [privacy] with {local.name!r}, which tells each site's loss before training, got a study "
            "with it; noise would have to cover the loss too. Remove one of them."
        )
    if personal.trains_its_own or any(phase.passes > 1 for phase in strategy.phases):
        raise StudyError(
            f"Expected no [privacy] with {personal.name!r}, which trains on the same patients twice in a round and "
            "is charged once, got a study with it; remove one of them."
        )
    if study.privacy.trust != "consortium":
        return
    if type(local) is not LocalMethod or not all(phase.is_mean_delta for phase in strategy.phases):
        raise StudyError(
            "Expected a strategy of which the mean change is all that travels with trust 'consortium', got "
            f"{' and '.join([strategy.rule.name, local.name, personal.name])}: shared noise is proven for sums of "
            "clipped gradients, and a single step is pulled nowhere; change [strategy], or set trust = 'site'."
        )
