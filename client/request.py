"""What a site checks of every request before it does anything: the study, the model, the cohort, its own policy."""

from __future__ import annotations

from functools import lru_cache

from client.data import Cohort
from client.site import Site
from medfed.errors import AdapterMismatchError, MessageError, StudyError
from medfed.messages import Fields, RoundInstruction, RoundReply, bytes_field
from medfed.models.adapted import AdaptedModel, adapted_model
from medfed.study import POOLED_SITE, StudyConfig, parse_study
from privacy.plan import PrivacyPlan


def approved_study(instruction: RoundInstruction, fields: Fields, site: Site) -> StudyConfig:
    """The study that travels along, if it has the digest that was named and this site's hospital approved it.

    Raises:
        StudyError: if it is another study, or not one of this site's.
        MessageError: if the study has no such round.
        PolicyError: if the policy does not allow it, or the scope.
    """
    study = _known_study(bytes_field(fields, "study"), instruction.study_digest)
    if instruction.round > study.rounds.num_rounds:
        raise MessageError(f"Expected a round in 0..{study.rounds.num_rounds}, got {instruction.round}.")
    if site.name not in study.site_names and site.name != POOLED_SITE:
        raise StudyError(f"Expected a study with site {site.name!r}, got sites {', '.join(study.site_names)}.")
    site.cohort_name(instruction.scope)
    site.policy.check_study(study)
    return study


def study_and_model(instruction: RoundInstruction, fields: Fields, site: Site) -> tuple[StudyConfig, AdaptedModel]:
    """The approved study and the model it adapts, if what would travel is what the study names.

    Raises:
        AdapterMismatchError: if this site's backbone has other adapter tensors.
        MedfedError: as :func:`approved_study`.
    """
    study = approved_study(instruction, fields, site)
    model = adapted_model(study, site.device)
    if model.manifest.fingerprint != study.resolved_manifest.fingerprint:
        raise AdapterMismatchError(
            f"Expected the manifest {model.manifest.fingerprint.hex()[:16]} of this site's own backbone, "
            f"got a study with {study.resolved_manifest.fingerprint.hex()[:16]}; it would send other tensors."
        )
    return study, model


def checked_cohort(study: StudyConfig, model: AdaptedModel, site: Site) -> Cohort:
    """The site's cohort, if the site's policy lets this study train on it.

    Raises:
        PolicyError: if it is too small for the policy or for what the study says of it.
        PrivacyError: if it is too small for the study's delta.
    """
    cohort = site.cohort(study, model.pixels)
    num_patients = cohort.num_train_patients
    num_units = len(cohort.train) if study.privacy and study.privacy.unit == "record" else num_patients
    declared = study.declared_units(site.name)
    site.policy.check_cohort(num_patients=num_patients, num_units=num_units, declared=declared)
    if study.privacy is not None and site.name != POOLED_SITE:  # nobody may build that one, it promises nothing
        PrivacyPlan.of_study(study).check_cohort(num_units)
    return cohort


def public_size(study: StudyConfig, cohort: Cohort, site: Site) -> int:
    """What weighs the site's updates: its training images, or the size it declared where the true one is private."""
    declared = study.declared_units(site.name)
    return len(cohort.train) if declared is None else declared


def told_epsilon(study: StudyConfig, instruction: RoundInstruction, site: Site) -> float | None:
    """What the study has spent at a real site so far, for the coordinator; its charges are public, and so is this.

    Virtual sites tell nothing: whoever runs a simulation reads their ledgers.
    """
    return None if site.replies is None else site.spent_on(study, instruction.scope)


def reply_to(
    instruction: RoundInstruction,
    site: Site,
    *,
    num_examples: int = 0,
    metrics: dict[str, float] | None = None,
    epsilon: float | None = None,
) -> RoundReply:
    """The header of this site's reply."""
    return RoundReply(
        site=site.name,
        study_digest=instruction.study_digest,
        round=instruction.round,
        attempt=instruction.attempt,
        num_examples=num_examples,
        metrics=metrics or {},
        epsilon=epsilon,
    )


@lru_cache(maxsize=4)
def _known_study(canonical: bytes, digest: str) -> StudyConfig:
    return parse_study(canonical, digest=digest)
