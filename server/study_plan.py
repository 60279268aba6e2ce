"""What a study would cost and promise, in numbers that can be read before it is approved.

Arithmetic on a resolved study: nothing is trained, sent or spent. The two ways of adding noise are set beside each
other at the same epsilon and the same number of noised steps, with the one that the study does not use as it would be.

**m** is the standard deviation of the noise in what is released over that of the same sites' data in one place:
sqrt(K / h) for K sites that share their noise, of which h are counted on, and sqrt(K) where each site adds all of it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal

from pydantic import BaseModel, ConfigDict

from medfed.consortium import Quorum
from medfed.errors import PrivacyError, SecureAggregationError, StudyError
from medfed.messages import MAX_MESSAGE_BYTES
from medfed.study import StudyConfig
from medfed.study_sections import PrivacyConfig
from privacy.plan import PrivacyPlan, calibrated
from strategies.registry import strategy_of
from strategies.traffic import Traffic, traffic_of

CONSORTIUM_ROUNDS = 50
"""Synchronous rounds from which sharing noise pays, whatever epsilon."""

CONSORTIUM_EPSILON = 2.0
"""Epsilon up to which sharing noise pays, whatever the number of rounds."""

_ENVELOPE_BYTES = 2**16
"""Around what a study says: headers, names, and Flower's own fields."""

FEW_HONEST = 2
"""Honest sites in a sum at which a site is warned: each of two knows the other's part."""

Shared = Literal["consortium", "site"]


class _Numbers(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class QuorumNumbers(_Numbers):
    """How many sites secure aggregation needs (:class:`medfed.consortium.Quorum`).

    Attributes:
        max_colluding: c, sites that may help the server.
        threshold: t, votes and shares that open a sum.
        min_sites: k, sites in a sum at least.
        min_honest: h = k - c, honest ones among them.
        dropouts: n - k, sites that may be missing from a round.
    """

    max_colluding: int
    threshold: int
    min_sites: int
    min_honest: int
    dropouts: int


class Release(_Numbers):
    """What is released of one step when so many sites are there: the sum or weighted mean of their parts.

    Attributes:
        num_sites: K, sites that are there; where they are not all, those with the fewest declared units.
        m: noise over that of the same data in one place, see the head of this module.
        noise_std: of each element of the sum of clipped gradients, in clip norms.
        noise_to_signal: norm of the noise over the largest that the signal can be expected to have.
    """

    num_sites: int
    m: float
    noise_std: float
    noise_to_signal: float


class NoiseMode(_Numbers):
    """One way of adding noise.

    Attributes:
        trust: ``consortium`` or ``site``.
        epsilon: of each site over the whole study.
        noise_multiplier: z that is accounted.
        steps: noised steps of a site over the study.
        rounds: rounds that take them.
        min_honest: h, sites whose noise is counted on; None where a site counts on its own alone.
        site_noise_std: of the noise that a site adds to each element of its clipped sum, in clip norms.
        releases: with all sites there; and with the fewest that are enough, if those are fewer.
        alone: least and largest noise to signal of single sites' updates, which ``consortium`` never shows.
    """

    trust: Shared
    epsilon: float
    noise_multiplier: float
    steps: int
    rounds: int
    min_honest: int | None
    site_noise_std: float
    releases: tuple[Release, ...]
    alone: tuple[float, float] | None


class StudyPlan(_Numbers):
    """A study in numbers, for whoever approves it.

    Attributes:
        study: name.
        trust: of its privacy section; None without one.
        num_sites: n.
        num_parameters: of the adapter, those that train in a round.
        num_rounds: of the study.
        unit: of privacy; None where nothing is promised.
        delta: likewise.
        quorum: None without secure aggregation.
        modes: both ways of adding noise, the study's own first; none where it adds no noise.
        traffic: bytes.
        recommended: way of adding noise; None where there is nothing to choose.
        reason: why.
        warnings: what to think about first.
    """

    study: str
    trust: Literal["site", "consortium", "none"] | None
    num_sites: int
    num_parameters: int
    num_rounds: int
    unit: Literal["patient", "record"] | None
    delta: float | None
    quorum: QuorumNumbers | None
    modes: tuple[NoiseMode, ...]
    traffic: Traffic
    recommended: Shared | None
    reason: str
    warnings: tuple[str, ...]


def plan_study(study: StudyConfig, *, possible_rounds: int | None = None) -> StudyPlan:
    """The numbers of a resolved study.

    Args:
        study: resolved; its noise is calibrated here if it is not given.
        possible_rounds: synchronous rounds that the sites could do; the study's own number if None.

    Raises:
        StudyError: if the study is not resolved, names an unknown strategy, or needs larger messages than there are.
        PrivacyError: if its privacy cannot be kept: as :meth:`privacy.plan.PrivacyPlan.of`, and if delta is too large
            for a site's declared units.
    """
    study = calibrated(study)
    quorum = study.secure_quorum if study.sums_securely else None
    traffic = _traffic(study)  # first: whether messages can hold it is known at once, what noise costs is not
    privacy, warnings = study.privacy, _warnings(study, quorum)
    modes: tuple[NoiseMode, ...] = ()
    recommended: Shared | None = None
    reason = "nothing to choose: the study adds no noise"
    if privacy is not None and privacy.trust != "none":
        plan = PrivacyPlan.of_study(study)
        for site in study.site_names:
            plan.check_cohort(study.declared_units(site) or 0)
        own = _mode(study, plan, quorum)
        other, why_not = _other_mode(study, plan)
        modes = (own,) if other is None else (own, other)
        rounds = study.rounds.num_rounds if possible_rounds is None else possible_rounds
        recommended, reason = _recommendation(own.epsilon, rounds)
        if other is None:
            recommended, reason = own.trust, f"the other way is not possible: {why_not.rstrip('.')}"
    return StudyPlan(
        study=study.name,
        trust=None if privacy is None else privacy.trust,
        num_sites=len(study.sites),
        num_parameters=strategy_of(study).num_trained,
        num_rounds=study.rounds.num_rounds,
        unit=privacy.unit if privacy is not None and modes else None,
        delta=privacy.delta if privacy is not None and modes else None,
        quorum=None if quorum is None else _shown(quorum),
        modes=modes,
        traffic=traffic,
        recommended=recommended,
        reason=reason,
        warnings=warnings,
    )


def _shown(quorum: Quorum) -> QuorumNumbers:
    return QuorumNumbers(
        max_colluding=quorum.max_colluding,
        threshold=quorum.threshold,
        min_sites=quorum.min_sites,
        min_honest=quorum.min_honest,
        dropouts=quorum.num_sites - quorum.min_sites,
    )


def _mode(study: StudyConfig, plan: PrivacyPlan, quorum: Quorum | None) -> NoiseMode:
    assert plan.trust != "none"
    units = sorted(study.declared_units(site) or 0 for site in study.site_names)
    num_parameters = strategy_of(study).num_trained
    fewest = len(units) if quorum is None else quorum.min_sites
    alone = None
    if plan.trust == "site":
        alone = (plan.noise_to_signal(units[-1], num_parameters), plan.noise_to_signal(units[0], num_parameters))
    uniform = plan.trust == "site" and study.strategy.weighting == "uniform"
    return NoiseMode(
        trust=plan.trust,
        epsilon=plan.epsilon.value,
        noise_multiplier=plan.noise_multiplier,
        steps=plan.total_steps,
        rounds=plan.num_rounds,
        min_honest=plan.min_honest,
        site_noise_std=plan.noise_std / plan.clip_norm,
        releases=tuple(
            _release(plan, units[:present], num_parameters, uniform=uniform)
            for present in dict.fromkeys((len(units), fewest))
        ),
        alone=alone,
    )


def _release(plan: PrivacyPlan, units: Sequence[int], num_parameters: int, *, uniform: bool) -> Release:
    """What is released when sites with these declared units are there."""
    present = len(units)
    m = math.sqrt(present / (plan.min_honest or 1))
    if uniform:  # each site's mean counts the same: noise adds up in squares, signals do not
        ratios = [plan.noise_to_signal(count, num_parameters) for count in units]
        noise_to_signal = math.hypot(*ratios) / present
    else:
        noise_to_signal = m * plan.noise_to_signal(sum(units), num_parameters)
    return Release(num_sites=present, m=m, noise_std=m * plan.noise_multiplier, noise_to_signal=noise_to_signal)


def _other_mode(study: StudyConfig, plan: PrivacyPlan) -> tuple[NoiseMode | None, str]:
    """The way of adding noise that the study does not use, at its epsilon and steps; or why there is none."""
    assert study.privacy is not None
    given = study.privacy.noise_multiplier is not None and study.privacy.epsilon is None
    epsilon = plan.epsilon.value if given else study.privacy.epsilon
    changes = {"epsilon": epsilon, "noise_multiplier": None, "steps_per_round": 1}
    own_quorum = study.secure_quorum if study.sums_securely else None
    try:
        if plan.trust == "consortium":
            config = PrivacyConfig.model_validate({**study.privacy.model_dump(), **changes, "trust": "site"})
            alone = PrivacyPlan.of(config, plan.total_steps, num_evaluations=plan.num_evaluations)
            return _mode(study, alone, own_quorum), ""
        quorum = own_quorum
        if quorum is None or quorum.max_colluding == 0:  # every site knows its own share
            quorum = Quorum.of(num_sites=len(study.sites), max_colluding=1)
        config = PrivacyConfig.model_validate({**study.privacy.model_dump(), **changes, "trust": "consortium"})
        shared = PrivacyPlan.of(
            config,
            plan.total_steps,
            min_honest=quorum.min_honest,
            num_parameters=study.resolved_manifest.num_elements,
            num_evaluations=plan.num_evaluations,
        )
        return _mode(study, shared, quorum), ""
    except (PrivacyError, SecureAggregationError) as error:
        return None, str(error)


def _recommendation(epsilon: float, rounds: int) -> tuple[Shared, str]:
    """The rule of thumb, from a federation of digits: many rounds or a small epsilon call for shared noise."""
    if epsilon <= CONSORTIUM_EPSILON:
        return "consortium", f"epsilon {epsilon:.3g} is at most {CONSORTIUM_EPSILON:g}, where noise is what costs most"
    if rounds >= CONSORTIUM_ROUNDS:
        return "consortium", f"{rounds} synchronous rounds are at least {CONSORTIUM_ROUNDS}: enough for a step in each"
    return "site", (
        f"{rounds} synchronous rounds are fewer than {CONSORTIUM_ROUNDS} and epsilon {epsilon:.3g} is above "
        f"{CONSORTIUM_EPSILON:g}: several local steps a round do more than less noise"
    )


def _traffic(study: StudyConfig) -> Traffic:
    """Bytes of the study, if every message of it is one that a site reads."""
    traffic = traffic_of(study)
    largest = max(traffic.round_up, traffic.round_down, traffic.keys_up, traffic.keys_down)
    if largest > MAX_MESSAGE_BYTES - _ENVELOPE_BYTES:
        raise StudyError(
            f"Expected messages of at most {MAX_MESSAGE_BYTES} bytes, got a study that needs {largest}; choose "
            "a smaller rank, or fewer targets of the adapter."
        )
    return traffic


def _warnings(study: StudyConfig, quorum: Quorum | None) -> tuple[str, ...]:
    found = []
    if study.privacy is None or study.privacy.trust == "none":
        seen = "each update" if quorum is None else "sums of updates"
        found.append(f"Not differentially private: the study adds no noise, and the server sees {seen}.")
    if quorum is not None and quorum.min_honest <= FEW_HONEST:
        found.append(
            f"A sum may hold only {quorum.min_honest} honest sites, of which each knows the other's part, and sharing "
            f"noise gains at most a factor {math.sqrt(quorum.min_honest):.2f}; raise min_sites, or lower max_colluding."
        )
    return tuple(found)
