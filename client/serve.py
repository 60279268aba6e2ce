"""What a site does when it is asked: describe itself, train, evaluate.

Each function takes an instruction that has been parsed and gives a reply that may travel. They know nothing
of Flower; :mod:`client.app` connects them to it.
"""

from __future__ import annotations

import logging
from functools import lru_cache

import torch
from torch import Tensor

from client.data import Cohort
from client.private_round import engine_for, private_reply
from client.site import Site
from client.trainer import evaluate_locally, train_locally
from medfed.adapter_manifest import AdapterManifest
from medfed.canonical import derive_seed
from medfed.errors import AdapterMismatchError, PolicyError, StudyError
from medfed.messages import Fields, RoundInstruction, RoundReply, bytes_field
from medfed.models.adapted import AdaptedModel, adapted_model
from medfed.payload import decode_adapter, encode_adapter
from medfed.study import POOLED_SITE, StudyConfig, parse_study
from medfed.tasks import task_of
from privacy.plan import PrivacyPlan
from strategies.registry import strategy_of
from strategies.strategy import Phase

_log = logging.getLogger("medfed.client.serve")


def describe(instruction: RoundInstruction, fields: Fields, site: Site) -> Fields:
    """Check that this site can serve the study: policy, backbone, manifest, cohort; encode its images once.

    Replies with the size that weighs its updates, and no payload.
    """
    study, model = _study_and_model(instruction, fields, site)
    cohort = _checked_cohort(study, model, site)
    if study.training.augmentation == "none":
        for item in cohort.train:
            site.features.features_of(item, model)
    for item in cohort.test:
        site.features.features_of(item, model)
    if study.privacy is not None:
        engine_for(study, model, strategy_of(study.strategy).plan(1), site)
    return _reply(instruction, site, num_examples=_weight(study, cohort, site)).to_fields()


def train(instruction: RoundInstruction, fields: Fields, site: Site) -> Fields:
    """Train the global adapter on the site's own images; reply with the phase's statistics.

    A private update is all that is told of a private round: no loss, and a public size.
    """
    study, model = _study_and_model(instruction, fields, site)
    cohort = _checked_cohort(study, model, site)
    phase = strategy_of(study.strategy).plan(instruction.round)
    adapter = bytes_field(fields, "adapter")
    if study.privacy is None:
        payload, metrics = _plain_reply(instruction, adapter, study, model, phase, site)
    else:
        payload, metrics = private_reply(instruction, adapter, study, model, phase, site), {}
    _log.info("event=trained round=%d payload_bytes=%d", instruction.round, len(payload))
    reply = _reply(instruction, site, num_examples=_weight(study, cohort, site), metrics=metrics)
    return reply.to_fields(adapter=payload)


def _plain_reply(
    instruction: RoundInstruction, adapter: bytes, study: StudyConfig, model: AdaptedModel, phase: Phase, site: Site
) -> tuple[bytes, dict[str, float]]:
    """Payload and metrics of a round without privacy."""
    manifest = study.resolved_manifest
    start_P = _global_adapter(adapter, manifest)
    seed = derive_seed(study.seed, "train", instruction.scope, site.name, instruction.round)
    result = train_locally(
        model,
        task_of(study.task),
        site.cohort(study, model.pixels).train,
        study.training,
        start_P=start_P,
        trainable=phase.trainable,
        features=site.features,
        generator=torch.Generator().manual_seed(seed),
    )
    upload_P = phase.upload_vector(manifest, start_P, result.adapter_P)
    return encode_adapter(upload_P, phase.upload_manifest(manifest)), {"loss": result.loss}


def evaluate(instruction: RoundInstruction, fields: Fields, site: Site) -> Fields:
    """Evaluate an adapter on the site's held-out patients; reply with metrics."""
    study, model = _study_and_model(instruction, fields, site)
    if study.withholds_evaluation:
        raise PolicyError(
            f"Expected no evaluation of {study.name!r}, which withholds metrics of held-out patients, got a request."
        )
    cohort = site.cohort(study, model.pixels)
    metrics = evaluate_locally(
        model,
        task_of(study.task),
        cohort.test,
        adapter_P=_global_adapter(bytes_field(fields, "adapter"), study.resolved_manifest),
        features=site.features,
        batch_size=study.training.batch_size,
    )
    return _reply(instruction, site, num_examples=len(cohort.test), metrics=metrics).to_fields()


def _checked_cohort(study: StudyConfig, model: AdaptedModel, site: Site) -> Cohort:
    """The site's cohort, if the site's policy lets this study train on it."""
    cohort = site.cohort(study, model.pixels)
    num_patients = len({item.patient_id for item in cohort.train})
    num_units = len(cohort.train) if study.privacy and study.privacy.unit == "record" else num_patients
    declared = study.declared_units(site.name)
    site.policy.check_cohort(num_patients=num_patients, num_units=num_units, declared=declared)
    if study.privacy is not None and site.name != POOLED_SITE:  # nobody may build that one, it promises nothing
        PrivacyPlan.of(study.privacy, study.rounds.num_rounds).check_cohort(num_units)
    return cohort


def _weight(study: StudyConfig, cohort: Cohort, site: Site) -> int:
    """What weighs the site's updates: its training images, or with [privacy] the public size of its cohort."""
    declared = study.declared_units(site.name)
    return len(cohort.train) if declared is None else declared


def _study_and_model(instruction: RoundInstruction, fields: Fields, site: Site) -> tuple[StudyConfig, AdaptedModel]:
    """The study that travels along, if its digest and manifest are right, and the model it adapts."""
    study = _known_study(bytes_field(fields, "study"), instruction.study_digest)
    if site.name not in (*study.site_names, POOLED_SITE):
        raise StudyError(f"Expected a study with site {site.name!r}, got sites {', '.join(study.site_names)}.")
    site.cohort_name(instruction.scope)
    site.policy.check_study(study)
    model = adapted_model(study, site.device)
    if model.manifest.fingerprint != study.resolved_manifest.fingerprint:
        raise AdapterMismatchError(
            f"Expected the manifest {model.manifest.fingerprint.hex()[:16]} of this site's own backbone, "
            f"got a study with {study.resolved_manifest.fingerprint.hex()[:16]}; it would send other tensors."
        )
    return study, model


@lru_cache(maxsize=4)
def _known_study(canonical: bytes, digest: str) -> StudyConfig:
    return parse_study(canonical, digest=digest)


@lru_cache(maxsize=1)  # all virtual sites of a process start a round from the same bytes
def _global_adapter(payload: bytes, manifest: AdapterManifest) -> Tensor:
    """The adapter that the server sent, to be read only."""
    return decode_adapter(payload, manifest)


def _reply(
    instruction: RoundInstruction, site: Site, *, num_examples: int, metrics: dict[str, float] | None = None
) -> RoundReply:
    return RoundReply(
        site=site.name,
        study_digest=instruction.study_digest,
        round=instruction.round,
        attempt=instruction.attempt,
        num_examples=num_examples,
        metrics=metrics or {},
    )
