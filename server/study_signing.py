"""``medfed study sign``: a study as hospitals are asked to approve it, resolved, calibrated and signed."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from medfed.device import choose_device
from medfed.durable_file import make_private_folder, replace_durably
from medfed.errors import ConsortiumError, StudyError
from medfed.models.adapted import resolve
from medfed.signed_document import sign_document
from medfed.signed_study import SUFFIX, SignedStudy
from medfed.study import FEDERATED, StudyConfig
from privacy.plan import calibrated
from privacy.secure_aggregation.plan import SecureAggregationPlan
from server.consortium_folder import ConsortiumFolder
from server.study_plan import StudyPlan, plan_study
from strategies.registry import check_individuals, check_name

_DIGITS = 12
_SIMULATED = ("scanner", "train_patients", "test_patients", "lesion_prevalence", "data")


@dataclass(frozen=True)
class StudyToApprove:
    """A study that was signed.

    Attributes:
        path: of the signed study.
        study: as it was signed.
        plan: its numbers.
    """

    path: Path
    study: StudyConfig
    plan: StudyPlan


def sign_study(study: StudyConfig, folder: ConsortiumFolder) -> StudyToApprove:
    """Resolve a study against the real backbone, fix its noise, fill in the sites' keys, and sign it.

    The same study gives the same file, as long as the roster is the same.

    Args:
        study: for real hospitals: without a cohort and without data.
        folder: of the consortium.

    Raises:
        StudyError: if the study names data, or parts of it do not go together.
        ConsortiumError: if a site has not enrolled, or the study names another key for it.
        PrivacyError: if its privacy cannot be kept.
        WeightsError: if the backbone's weights are missing.
    """
    if not study.is_for_hospitals:
        raise StudyError(
            f"Expected a study for real hospitals, got {study.name!r}, which names "
            f"{'a simulated cohort' if study.cohort else 'data'}; remove it, or add --as-consortium."
        )
    check_name(study.strategy)
    check_individuals(study)
    keyed = _with_keys(study, folder)
    resolved = calibrated(resolve(keyed, choose_device("cpu")))
    plan = plan_study(resolved)
    if resolved.sums_securely:
        SecureAggregationPlan.of_study(resolved, FEDERATED)
    signed = SignedStudy(consortium=folder.config.name, roster_serial=folder.roster().serial, study=resolved)
    make_private_folder(folder.studies)
    path = folder.studies / f"{resolved.name}-{resolved.digest[:_DIGITS]}{SUFFIX}"
    replace_durably(path, sign_document(signed, folder.coordinator_key()), mode=0o644)
    return StudyToApprove(path, resolved, plan)


def for_hospitals(study: StudyConfig) -> StudyConfig:
    """A simulated study without what is simulated, for a consortium that holds its cohort in files.

    Sites declare as many units as the simulation makes.
    """
    counts = study.privacy is not None or study.sums_securely
    sites = tuple(
        site.model_copy(
            update={
                **dict.fromkeys(_SIMULATED),
                "declared_patients": study.declared_units(site.name) if counts else site.declared_patients,
            }
        )
        for site in study.sites
    )
    return study.replace(cohort=None, sites=sites)


def _with_keys(study: StudyConfig, folder: ConsortiumFolder) -> StudyConfig:
    """The study with its sites' keys where it masks, every one of them a member."""
    roster, sites = folder.roster(), []
    for site in study.sites:
        member = roster.member(site.name)
        if member is None:
            enrolled = ", ".join(member.site for member in roster.members) or "none"
            raise ConsortiumError(
                f"Expected sites that have enrolled in {roster.consortium!r} ({enrolled}), got {site.name!r}; take its "
                "enrolment in with 'medfed provision --enrol', or remove the site."
            )
        if site.signing_key not in (None, member.signing_key):
            raise ConsortiumError(
                f"Expected the key with which {site.name!r} has enrolled, got another in the study; remove signing_key."
            )
        sites.append(site.model_copy(update={"signing_key": member.signing_key if study.sums_securely else None}))
    return study.replace(sites=tuple(sites))
