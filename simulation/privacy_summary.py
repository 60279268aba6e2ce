"""What a simulated study promises its patients: read from the sites' own ledgers, not from the study file."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import fmean

from client.site import Site
from medfed.study import POOLED_SITE, StudyConfig
from privacy.ledger_chain import Spending
from privacy.plan import PrivacyPlan
from server.results import PrivacyStatement, SitePrivacy

NO_PRIVACY = (
    "Nothing here is private: updates are neither clipped, noised nor masked. "
    "Right for a simulation, never for patients."
)
NO_NOISE = (
    "Nothing here is private: updates are clipped patient by patient, but no noise is added and nothing is masked. "
    "For comparison with private runs, never for patients."
)
HELD_OUT = "Metrics of held-out patients leave the sites without noise: the promise covers training patients only."
SEEDED = (
    "Draws and noise follow from the study's seed, so that the run can be repeated: nobody is protected by them. "
    "The patients are made up; with a site's own data they come from the operating system."
)


def privacy_statement(study: StudyConfig, sites: Sequence[Site]) -> PrivacyStatement:
    """What the federated arm of a finished run promises, with what each site's ledger says it spent."""
    if study.privacy is None:
        return PrivacyStatement(promise="", warnings=(NO_PRIVACY,))
    plan = PrivacyPlan.of(study.privacy, num_rounds=study.rounds.num_rounds)
    if not plan.is_private:
        return PrivacyStatement(promise="", warnings=(NO_NOISE,))
    spent = {site.name: _site_privacy(study, site, plan) for site in sites if site.name != POOLED_SITE}
    worst = max(spent.values(), key=lambda site: site.epsilon)
    who = {"patient": "each training patient, with all images", "record": "each training image"}[plan.unit]
    promise = (
        f"Differential privacy for {who}: epsilon {worst.epsilon_shown} at delta {plan.delta:g} at the site that "
        f"spent most, over all rounds, adding or removing one {plan.unit}. Every site adds the whole noise itself and "
        "trusts nobody."
    )
    warnings = [
        *([] if study.withholds_evaluation else [HELD_OUT]),
        *([SEEDED] if study.cohort is not None else []),
    ]
    return PrivacyStatement(promise=promise, warnings=tuple(warnings), sites=spent)


def _site_privacy(study: StudyConfig, site: Site, plan: PrivacyPlan) -> SitePrivacy:
    cohort = site.cohort_name("federated")
    spendings = site.ledger.charges(cohort)
    declared = study.declared_units(site.name)
    assert declared is not None
    return SitePrivacy(
        epsilon=site.ledger.spent(cohort, plan.delta).value,
        delta=plan.delta,
        noise_multiplier=plan.noise_multiplier,
        clip_norm=plan.clip_norm,
        sampling_rate=plan.sampling_rate,
        steps=sum(spending.charge.mechanism.steps for spending in spendings),
        rounds=len(spendings),
        declared_units=declared,
        clip_fraction=_mean_fact(spendings, "clip_fraction"),
        signal_to_noise=_mean_fact(spendings, "signal_to_noise"),
        noise_to_signal_expected=plan.noise_to_signal(declared, study.resolved_manifest.num_elements),
    )


def _mean_fact(spendings: Sequence[Spending], name: str) -> float | None:
    found = [
        spending.settled.facts[name] for spending in spendings if spending.settled and name in spending.settled.facts
    ]
    return fmean(found) if found else None
