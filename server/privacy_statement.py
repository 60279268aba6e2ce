"""What a run promises its patients, in words; with what each site spent, in numbers."""

from __future__ import annotations

import math
from collections.abc import Mapping

from medfed.study import StudyConfig
from privacy.plan import PrivacyPlan
from server.results import PrivacyStatement, SitePrivacy
from strategies.registry import strategy_of

NO_PRIVACY = (
    "Nothing here is private: updates are neither clipped, noised nor masked. "
    "Right for a simulation, never for patients."
)
MASKED_ALONE = (
    "Not differentially private: no noise is added, and a sum over sites may still tell about a patient. "
    "Right for a simulation, never for patients."
)
NO_NOISE = (
    "Nothing here is private: updates are clipped patient by patient, but no noise is added. "
    "For comparison with private runs, never for patients."
)
HELD_OUT = "Metrics of held-out patients leave the sites without noise: the promise covers training patients only."
ALONE_NOISED = " Scores of held-out patients come from counts that each site noises alone."
BESIDE_THE_RUN = "The scores of single sites shown here were computed beside the run, as only a simulation can."


def privacy_statement(
    study: StudyConfig, spent: Mapping[str, SitePrivacy], *, is_simulation: bool, warnings: tuple[str, ...] = ()
) -> PrivacyStatement:
    """What the federated arm of a finished run promises.

    Args:
        study: resolved.
        spent: what each site spent; empty if nothing is private.
        is_simulation: whether scores of single sites are seen although sums are masked.
        warnings: more of them, each a sentence.
    """
    confidentiality = _confidentiality(study, is_simulation=is_simulation)
    if study.privacy is None:
        warning = MASKED_ALONE if confidentiality else NO_PRIVACY
        return PrivacyStatement(promise="", confidentiality=confidentiality, warnings=(warning,))
    plan = PrivacyPlan.of_study(study)
    if not plan.is_private:
        return PrivacyStatement(promise="", confidentiality=confidentiality, warnings=(NO_NOISE,))
    worst = max(spent.values(), key=lambda site: site.epsilon)
    who = {"patient": "each training patient, with all images", "record": "each training image"}[plan.unit]
    if study.noises_evaluation:
        who = "each patient, training or held-out, with all images"
    promise = (
        f"Differential privacy for {who}: epsilon {worst.epsilon_shown} at delta {plan.delta:g} at the site that "
        f"spent most, over all rounds, adding or removing one {plan.unit}. {_where_noise_is_added(study)}"
        f"{ALONE_NOISED if study.noises_evaluation else ''}"
    )
    held_out = (HELD_OUT,) if study.shows_held_out else ()
    return PrivacyStatement(
        promise=promise, confidentiality=confidentiality, warnings=(*held_out, *warnings), sites=dict(spent)
    )


def _where_noise_is_added(study: StudyConfig) -> str:
    """Against whom the promise holds."""
    assert study.privacy is not None
    if study.privacy.trust == "site":
        return "Every site adds the whole noise itself and trusts nobody."
    quorum = study.secure_quorum
    return (
        f"Every site adds a share of the noise, and only sums that hold the shares of at least {quorum.min_honest} "
        f"honest sites are seen: this holds against the server and up to {quorum.max_colluding} colluding "
        f"site{'s' if quorum.max_colluding != 1 else ''} together, and not against more."
    )


def _confidentiality(study: StudyConfig, *, is_simulation: bool) -> str:
    """Who sees what of an update; nothing to say where the server sees each."""
    if not study.sums_securely:
        return ""
    quorum = study.secure_quorum
    colluding = f"{quorum.max_colluding} site{'s' if quorum.max_colluding != 1 else ''}"
    beside = f" {BESIDE_THE_RUN}" if is_simulation else ""
    return (
        f"Updates and metrics are masked: of each round, the server, even together with {colluding}, learns only sums "
        f"over one set of sites with at least {quorum.min_honest} honest ones, who took part, and when. Sums of "
        "different rounds may be over different sites, and together they tell more. Designed after Bonawitz et al. "
        f"2017; not formally verified or audited.{beside}"
    )


def expected_noise_to_signal(study: StudyConfig, plan: PrivacyPlan, declared: int) -> float:
    """Predicted for what is noised: a site's own sum, or the sum of all sites with all their shares."""
    num_parameters = strategy_of(study).num_trained
    if plan.min_honest is None:
        return plan.noise_to_signal(declared, num_parameters)
    everyone = sum(study.declared_units(site) or 0 for site in study.site_names)
    return math.sqrt(len(study.sites) / plan.min_honest) * plan.noise_to_signal(everyone, num_parameters)
