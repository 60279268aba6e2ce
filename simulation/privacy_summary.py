"""What a simulated study spent on its patients: read from the sites' own ledgers, not from the study file."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import fmean

from client.site import Site
from medfed.study import POOLED_SITE, StudyConfig
from privacy.ledger_chain import Spending
from privacy.plan import PrivacyPlan
from server.privacy_statement import expected_noise_to_signal, privacy_statement
from server.results import PrivacyStatement, SitePrivacy

SEEDED = (
    "Draws and noise follow from the study's seed, so that the run can be repeated: nobody is protected by them. "
    "The patients are made up; with a site's own data they come from the operating system."
)


def simulated_privacy(study: StudyConfig, sites: Sequence[Site]) -> PrivacyStatement:
    """What the federated arm of a finished run promises, with what each site's ledger says it spent."""
    spent: dict[str, SitePrivacy] = {}
    if study.privacy is not None and (plan := PrivacyPlan.of_study(study)).is_private:
        spent = {site.name: _site_privacy(study, site, plan) for site in sites if site.name != POOLED_SITE}
    warnings = (SEEDED,) if study.cohort is not None else ()
    return privacy_statement(study, spent, is_simulation=True, warnings=warnings)


def _site_privacy(study: StudyConfig, site: Site, plan: PrivacyPlan) -> SitePrivacy:
    cohort = site.cohort_name("federated")
    spendings = site.ledger.charges(cohort)
    released = [s for s in spendings if plan.evaluations and s.charge.mechanism == plan.evaluation_mechanism]
    trained = [s for s in spendings if s not in released]
    declared = study.declared_units(site.name)
    assert declared is not None
    return SitePrivacy(
        epsilon=site.ledger.spent(cohort, plan.delta).value,
        delta=plan.delta,
        noise_multiplier=plan.noise_multiplier,
        clip_norm=plan.clip_norm,
        sampling_rate=plan.sampling_rate,
        steps=sum(spending.charge.mechanism.steps for spending in trained),
        rounds=len(trained),
        declared_units=declared,
        clip_fraction=_mean_fact(spendings, "clip_fraction"),
        signal_to_noise=_mean_fact(spendings, "signal_to_noise"),
        noise_to_signal_expected=expected_noise_to_signal(study, plan, declared),
    )


def _mean_fact(spendings: Sequence[Spending], name: str) -> float | None:
    found = [
        spending.settled.facts[name] for spending in spendings if spending.settled and name in spending.settled.facts
    ]
    return fmean(found) if found else None
