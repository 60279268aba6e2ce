"""What a site does when it is asked: describe itself, train, evaluate.

Each function takes an instruction that has been parsed and gives a reply that may travel. They know nothing
of Flower; :mod:`client.app` connects them to it.
"""

from __future__ import annotations

import logging
from functools import lru_cache

import torch
from torch import Tensor

from client.private_round import engine_for, private_reply, shared_noise_reply
from client.request import checked_cohort, public_size, reply_to, study_and_model
from client.secure_round import MaskedRound
from client.site import Site
from client.trainer import evaluate_locally, train_locally
from medfed.adapter_manifest import AdapterManifest
from medfed.canonical import derive_seed
from medfed.errors import MessageError, PolicyError
from medfed.messages import Fields, RoundInstruction, bytes_field
from medfed.models.adapted import AdaptedModel
from medfed.payload import decode_adapter, encode_adapter
from medfed.study import StudyConfig
from medfed.tasks import task_of
from strategies.registry import strategy_of
from strategies.secure_channel import SecureChannel
from strategies.strategy import Phase

_log = logging.getLogger("medfed.client.serve")


def describe(instruction: RoundInstruction, fields: Fields, site: Site) -> Fields:
    """Check that this site can serve the study: policy, backbone, manifest, cohort; encode its images once.

    Replies with the size that weighs its updates, and no payload.
    """
    study, model = study_and_model(instruction, fields, site)
    cohort = checked_cohort(study, model, site)
    if study.training.augmentation == "none":
        for item in cohort.train:
            site.features.features_of(item, model)
    for item in cohort.test:
        site.features.features_of(item, model)
    if study.privacy is not None:
        engine_for(study, model, strategy_of(study.strategy).plan(1), site)
    return reply_to(instruction, site, num_examples=public_size(study, cohort, site)).to_fields()


def train(instruction: RoundInstruction, fields: Fields, site: Site) -> Fields:
    """Train the global adapter on the site's own images; reply with the phase's statistics.

    A private update is all that is told of a private round: no loss, and a public size.
    """
    if instruction.round < 1:
        raise MessageError("Expected a round from 1 on to train for, got 0.")
    study, model = study_and_model(instruction, fields, site)
    cohort = checked_cohort(study, model, site)
    phase = strategy_of(study.strategy).plan(instruction.round)
    adapter, size = bytes_field(fields, "adapter"), public_size(study, cohort, site)
    if study.sums_securely_in(instruction.scope):
        masked = _masked_update(instruction, fields, study, model, phase, site)
        _log.info("event=trained round=%d payload_bytes=%d", instruction.round, len(masked))
        return reply_to(instruction, site, num_examples=size).to_fields(secure=masked)
    payload, metrics = _update(instruction, adapter, study, model, phase, site)
    _log.info("event=trained round=%d payload_bytes=%d", instruction.round, len(payload))
    return reply_to(instruction, site, num_examples=size, metrics=metrics).to_fields(adapter=payload)


def _masked_update(
    instruction: RoundInstruction, fields: Fields, study: StudyConfig, model: AdaptedModel, phase: Phase, site: Site
) -> bytes:
    """The site's update and loss under masks: all that is told of a round with secure aggregation."""
    channel = SecureChannel.training(study, instruction.round, phase)
    masked = MaskedRound(study, instruction.scope, channel, fields, site)
    adapter = bytes_field(fields, "adapter")
    if study.privacy is not None and study.privacy.trust == "consortium":
        return shared_noise_reply(instruction, adapter, study, model, phase, site, channel, masked)
    payload, metrics = _update(instruction, adapter, study, model, phase, site)
    update_P = decode_adapter(payload, phase.upload_manifest(study.resolved_manifest))
    if channel.scales_down(update_P, site.name):
        _log.warning("event=update_scaled_down round=%d raise=update_clip_norm", instruction.round)
    return masked.masked(channel.weighted(update_P, site.name, metrics))


def _update(
    instruction: RoundInstruction, adapter: bytes, study: StudyConfig, model: AdaptedModel, phase: Phase, site: Site
) -> tuple[bytes, dict[str, float]]:
    """Payload and metrics of a site's update, as they travel where nothing is masked."""
    if study.privacy is None:
        return _plain_reply(instruction, adapter, study, model, phase, site)
    return private_reply(instruction, adapter, study, model, phase, site), {}


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
    study, model = study_and_model(instruction, fields, site)
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
    if study.sums_securely_in(instruction.scope):
        channel = SecureChannel.evaluation(study, instruction.round)
        masked = MaskedRound(study, instruction.scope, channel, fields, site).masked(channel.scores(metrics))
        return reply_to(instruction, site).to_fields(secure=masked)
    return reply_to(instruction, site, num_examples=len(cohort.test), metrics=metrics).to_fields()


@lru_cache(maxsize=1)  # all virtual sites of a process start a round from the same bytes
def _global_adapter(payload: bytes, manifest: AdapterManifest) -> Tensor:
    """The adapter that the server sent, to be read only."""
    return decode_adapter(payload, manifest)
