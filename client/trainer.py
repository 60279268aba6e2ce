"""Local training: a few epochs of a site's own images, starting from the global adapter."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from client.data import Item
from client.features import FeatureCache, as_three_channels
from client.subspace_steps import Pull, SubspaceSteps
from medfed.device import mixed_precision
from medfed.errors import AdapterMismatchError, DivergedError
from medfed.models.adapted import AdaptedModel
from medfed.models.folding import ModelState
from medfed.study_sections import TrainingConfig
from medfed.tasks import Task
from strategies.subspace import Subspace


@dataclass(frozen=True)
class TrainResult:
    """What local training made.

    Attributes:
        adapter_P: the local adapter, float32 on the CPU.
        loss: mean training loss over the last epoch; not released under differential privacy.
        num_steps: optimiser steps.
    """

    adapter_P: Tensor
    loss: float
    num_steps: int


def train_locally(
    model: AdaptedModel,
    task: Task,
    items: Sequence[Item],
    config: TrainingConfig,
    *,
    start_P: Tensor,
    trainable: Subspace,
    features: FeatureCache,
    generator: torch.Generator,
    pull: Pull | None = None,
) -> TrainResult:
    """Train the adapter on ``items``, starting from ``start_P``.

    The result is fixed by the arguments: data order and augmentation come from ``generator`` alone, the
    optimiser starts afresh. What is not ``trainable`` stays as in ``start_P``, bit for bit. A ``pull`` is added to
    every gradient.

    Raises:
        AdapterMismatchError: if ``start_P`` does not fit.
        DivergedError: if training ended with NaN or infinity.
    """
    model.load(start_P)
    model.train()
    steps = SubspaceSteps(model, trainable, config, pull)
    gradient_P = model.flat.grad
    assert gradient_P is not None
    num_epochs = config.local_epochs
    assert num_epochs is not None  # a study without it has a privacy section, and trains privately
    loss_sum, num_steps = 0.0, 0
    for _ in range(num_epochs):
        loss_sum = 0.0
        for indices in _batches(len(items), config, generator):
            batch = [items[i] for i in indices]
            gradient_P.zero_()
            inputs = encoded(batch, model, config, features, generator)
            with mixed_precision(model.device):
                losses_B = task.losses(model, inputs, task.collate([i.annotation for i in batch], model.device))
            if losses_B.requires_grad:  # not where no image of the batch holds anything to outline
                # The gradient of the mean, which itself nobody needs.
                losses_B.backward(torch.full_like(losses_B, 1 / len(batch)))  # type: ignore[no-untyped-call]
            steps.step()
            num_steps += 1
            loss_sum += float(losses_B.detach().sum())
    return TrainResult(adapter_P=trained_vector(model), loss=loss_sum / len(items), num_steps=num_steps)


def loss_of(
    model: AdaptedModel,
    task: Task,
    items: Sequence[Item],
    *,
    adapter_P: Tensor,
    features: FeatureCache,
    batch_size: int,
) -> float:
    """Mean loss of an adapter on ``items``, without augmentation or training."""
    model.load(adapter_P)
    model.train(False)
    total = 0.0
    with torch.no_grad(), mixed_precision(model.device):
        for start in range(0, len(items), batch_size):
            batch = items[start : start + batch_size]
            target = task.collate([item.annotation for item in batch], model.device)
            total += float(task.losses(model, features.batch(batch, model), target).sum())
    return total / len(items)


def trained_vector(model: AdaptedModel) -> Tensor:
    """The adapter in place after training: float32, on the CPU, finite.

    Raises:
        DivergedError: if it holds NaN or infinity.
    """
    adapter_P = model.read()
    try:
        model.manifest.check_vector(adapter_P)
    except AdapterMismatchError as error:
        raise DivergedError(str(error)) from None
    return adapter_P


def evaluate_locally(
    model: AdaptedModel,
    task: Task,
    items: Sequence[Item],
    *,
    state: ModelState,
    features: FeatureCache,
    batch_size: int,
) -> dict[str, float]:
    """Metrics of a state of the model on ``items``, without augmentation.

    Raises:
        AdapterMismatchError: if the state's adapter does not fit.
        StudyError: if one of its folds does not fit.
    """
    model.put(state)
    model.train(False)
    batches = [items[start : start + batch_size] for start in range(0, len(items), batch_size)]
    with mixed_precision(model.device):
        return task.evaluate(
            model,
            (
                (
                    features.batch(batch, model),
                    task.collate([item.annotation for item in batch], model.device),
                )
                for batch in batches
            ),
        )


def _batches(num_items: int, config: TrainingConfig, generator: torch.Generator) -> list[list[int]]:
    if config.order == "sequential":
        order = list(range(num_items))
    else:
        order = torch.randperm(num_items, generator=generator).tolist()
    return [order[start : start + config.batch_size] for start in range(0, num_items, config.batch_size)]


def encoded(
    batch: Sequence[Item],
    model: AdaptedModel,
    config: TrainingConfig,
    features: FeatureCache,
    generator: torch.Generator,
) -> Tensor:
    """Features of a batch after the frozen prefix: remembered ones, or of freshly augmented images."""
    if config.augmentation == "none":
        return features.batch(batch, model)
    images = [augment_intensity(as_three_channels(item.image_CHW), generator) for item in batch]
    return model.encode(torch.stack(images).to(model.device))


def augment_intensity(image_CHW: Tensor, generator: torch.Generator) -> Tensor:
    """Random scale (0.9..1.1), shift (-0.1..0.1) and white noise (std 0.02) of an image's intensities.

    Geometry is untouched, so boxes and masks stay valid.
    """
    scale, shift = torch.rand(2, generator=generator).tolist()
    noise_CHW = torch.randn(image_CHW.shape, generator=generator)
    augmented_CHW: Tensor = image_CHW * (0.9 + 0.2 * scale) + 0.2 * (shift - 0.5) + 0.02 * noise_CHW
    return augmented_CHW
