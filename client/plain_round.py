"""One round without privacy at a site: train the shared model, and a model of the site's own if there is one."""

from __future__ import annotations

import torch
from torch import Tensor

from client.round_start import RoundStart
from client.site import Site
from client.trainer import TrainResult, loss_of, train_locally
from medfed.canonical import derive_seed
from medfed.messages import RoundInstruction
from medfed.models.adapted import AdaptedModel
from medfed.study import StudyConfig
from medfed.tasks import task_of


def plain_reply(
    instruction: RoundInstruction, start: RoundStart, study: StudyConfig, model: AdaptedModel, site: Site
) -> tuple[bytes, dict[str, float]]:
    """Payload and metrics of the site's update for this round.

    Args:
        instruction: what was asked.
        start: what the round begins with.
        study: resolved and approved, without privacy.
        model: of the study; with the round's base weights.
        site: whose images train it.

    Raises:
        MedfedError: if training fails.
    """
    task, items = task_of(study.task), site.cohort(study, model.pixels).train
    seed = derive_seed(study.seed, "train", instruction.scope, site.name, instruction.round)
    generator = torch.Generator().manual_seed(seed)
    start_loss = 0.0
    if start.phase.needs_start_loss:
        start_loss = loss_of(
            model,
            task,
            items,
            adapter_P=start.adapter_P,
            features=site.features,
            batch_size=study.training.batch_size,
        )
    trained = TrainResult(start.adapter_P, loss=0.0, num_steps=0)
    for trainable in start.strategy.personal.passes(start.trainable):
        one = train_locally(
            model,
            task,
            items,
            study.training,
            start_P=trained.adapter_P,
            trainable=trainable,
            features=site.features,
            generator=generator,
            pull=start.pull,
        )
        trained = TrainResult(one.adapter_P, one.loss, trained.num_steps + one.num_steps)
    result = start.result(trained.adapter_P, trained.num_steps, start_loss)
    if start.strategy.remembers_at_sites:
        kept = start.remembered(trained.adapter_P, result)
        if start.strategy.trains_its_own:
            own_P = _own_model(start, study, model, site, generator)
            kept |= start.strategy.personal.own_memory(own_P, start.adapter_P)
        site.memory(study, instruction.scope).remember(instruction.round, kept)
    return start.payload(result), {"loss": trained.loss}


def _own_model(
    start: RoundStart, study: StudyConfig, model: AdaptedModel, site: Site, generator: torch.Generator
) -> Tensor:
    """The site's own model after a round of training; nothing of it leaves."""
    personal, trainable = start.strategy.personal, start.trainable
    begin_P = personal.own_start(start.adapter_P, start.memory)
    begin_Z, shared_Z = trainable.coordinates(begin_P), trainable.coordinates(start.adapter_P)

    def pull(offset_Z: Tensor) -> Tensor | None:
        return personal.own_pull(begin_Z.to(offset_Z) + offset_Z, shared_Z.to(offset_Z))

    return train_locally(
        model,
        task_of(study.task),
        site.cohort(study, model.pixels).train,
        study.training,
        start_P=begin_P,
        trainable=trainable,
        features=site.features,
        generator=generator,
        pull=pull,
    ).adapter_P
