"""What a site does when it is asked: describe itself, train, evaluate.

Each function takes an instruction that has been parsed and gives a reply that may travel. They know nothing
of Flower; :mod:`client.app` connects them to it.
"""

from __future__ import annotations

import logging

from client.plain_round import plain_reply
from client.private_round import engine_for, private_reply, shared_noise_reply
from client.released_counts import ReleasedCounts, exact_counts, release_noised
from client.request import checked_cohort, public_size, reply_to, study_and_model, told_epsilon
from client.round_start import RoundStart, begin_round, evaluated_state
from client.secure_round import MaskedRound
from client.site import Site
from client.trainer import evaluate_locally
from medfed.errors import MessageError, PolicyError, SecureAggregationError
from medfed.messages import Fields, RoundInstruction
from medfed.models.adapted import AdaptedModel
from medfed.models.folding import ModelState
from medfed.payload import decode_adapter
from medfed.study import StudyConfig
from medfed.tasks import task_of
from strategies.registry import strategy_of
from strategies.secure_channel import SecureChannel
from strategies.strategy import DELTA

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
        for phase in strategy_of(study, instruction.scope).phases:
            engine_for(study, model, phase.trainable, site)
    return reply_to(instruction, site, num_examples=public_size(study, cohort, site)).to_fields()


def train(instruction: RoundInstruction, fields: Fields, site: Site) -> Fields:
    """Train the global adapter on the site's own images; reply with the phase's statistics.

    A private update is all that is told of a private round: no loss, and a public size.
    """
    if instruction.round < 1:
        raise MessageError("Expected a round from 1 on to train for, got 0.")
    study, model = study_and_model(instruction, fields, site)
    cohort = checked_cohort(study, model, site)
    start = begin_round(instruction, fields, study, model, site)
    size = public_size(study, cohort, site)
    if study.sums_securely_in(instruction.scope):
        masked = _masked_update(instruction, fields, study, model, start, site)
        _log.info("event=trained round=%d payload_bytes=%d", instruction.round, len(masked))
        epsilon = told_epsilon(study, instruction, site)
        return reply_to(instruction, site, num_examples=size, epsilon=epsilon).to_fields(secure=masked)
    payload, metrics = _update(instruction, study, model, start, site)
    _log.info("event=trained round=%d payload_bytes=%d", instruction.round, len(payload))
    epsilon = told_epsilon(study, instruction, site)
    return reply_to(instruction, site, num_examples=size, metrics=metrics, epsilon=epsilon).to_fields(adapter=payload)


def _masked_update(
    instruction: RoundInstruction,
    fields: Fields,
    study: StudyConfig,
    model: AdaptedModel,
    start: RoundStart,
    site: Site,
) -> bytes:
    """The site's update and loss under masks: all that is told of a round with secure aggregation."""
    channel = SecureChannel.training(study, instruction.round, start.phase)
    masked = MaskedRound(study, instruction.scope, channel, fields, site)
    if study.privacy is not None and study.privacy.trust == "consortium":
        return shared_noise_reply(instruction, start, study, model, site, channel, masked)
    payload, metrics = _update(instruction, study, model, start, site)
    update_P = decode_adapter(payload, start.phase.upload_manifest)
    if channel.scales_down(update_P, site.name):
        if start.phase.stats != (DELTA,):  # scaled along, other statistics would say something else
            raise SecureAggregationError(
                f"Expected an update and statistics of L2 norm within update_clip_norm in round {instruction.round}, "
                "got longer ones; raise it in the study."
            )
        _log.warning("event=update_scaled_down round=%d raise=update_clip_norm", instruction.round)
    return masked.masked(channel.weighted(update_P, site.name, metrics))


def _update(
    instruction: RoundInstruction, study: StudyConfig, model: AdaptedModel, start: RoundStart, site: Site
) -> tuple[bytes, dict[str, float]]:
    """Payload and metrics of a site's update, as they travel where nothing is masked."""
    if study.privacy is None:
        return plain_reply(instruction, start, study, model, site)
    return private_reply(instruction, start, study, model, site), {}


def evaluate(instruction: RoundInstruction, fields: Fields, site: Site) -> Fields:
    """Evaluate an adapter on the site's held-out patients; reply with metrics."""
    study, model = study_and_model(instruction, fields, site)
    if study.withholds_evaluation:
        raise PolicyError(
            f"Expected no evaluation of {study.name!r}, which withholds metrics of held-out patients, got a request."
        )
    state = evaluated_state(instruction, fields, study, site)
    if study.sums_securely_in(instruction.scope):
        masked = _masked_counts(instruction, fields, study, model, site, state)
        epsilon = told_epsilon(study, instruction, site) if study.noises_evaluation else None
        return reply_to(instruction, site, epsilon=epsilon).to_fields(secure=masked)
    if study.noises_evaluation:
        released = release_noised(instruction, fields, study, model, site, state)
        assert isinstance(released, ReleasedCounts)
        epsilon = told_epsilon(study, instruction, site)
        return reply_to(instruction, site, metrics=released.metrics, epsilon=epsilon).to_fields()
    cohort = site.cohort(study, model.pixels)
    metrics = evaluate_locally(
        model,
        task_of(study.task),
        cohort.test,
        state=state,
        features=site.features,
        batch_size=study.training.batch_size,
    )
    return reply_to(instruction, site, num_examples=len(cohort.test), metrics=metrics).to_fields()


def _masked_counts(
    instruction: RoundInstruction,
    fields: Fields,
    study: StudyConfig,
    model: AdaptedModel,
    site: Site,
    state: ModelState,
) -> bytes:
    """The site's held-out counts, and what they mean at this site, under masks: all that is told of an evaluation."""
    channel = SecureChannel.evaluation(study, instruction.round)
    masked = MaskedRound(study, instruction.scope, channel, fields, site)
    if study.noises_evaluation:

        def reply(released: ReleasedCounts) -> bytes:
            return masked.masked(channel.scores(released.metrics, released.count_D))

        sent = release_noised(instruction, fields, study, model, site, state, masked=(masked.id, reply))
        assert isinstance(sent, bytes)
        return sent
    released = exact_counts(study, model, site, state)
    return masked.masked(channel.scores(released.metrics, released.count_D))
