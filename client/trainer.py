"""Local training: a few epochs of a site's own images, starting from the global adapter."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from client.data import Item
from client.features import FeatureCache, as_three_channels
from medfed.device import mixed_precision
from medfed.errors import AdapterMismatchError, DivergedError
from medfed.models.adapted import AdaptedModel
from medfed.study_sections import TrainingConfig
from medfed.tasks import Task


@dataclass(frozen=True)
class TrainResult:
    """What local training made.

    Attributes:
        adapter_P: the local adapter, float32 on the CPU.
        loss: mean training loss over the last epoch; not released under differential privacy.
    """

    adapter_P: Tensor
    loss: float


def train_locally(
    model: AdaptedModel,
    task: Task,
    items: Sequence[Item],
    config: TrainingConfig,
    *,
    start_P: Tensor,
    trainable: Callable[[str], bool],
    features: FeatureCache,
    generator: torch.Generator,
) -> TrainResult:
    """Train the adapter on ``items``, starting from ``start_P``.

    The result is fixed by the arguments: data order and augmentation come from ``generator`` alone, the
    optimiser starts afresh. Tensors that ``trainable`` rejects stay as in ``start_P``, bit for bit.

    Raises:
        AdapterMismatchError: if ``start_P`` does not fit.
        DivergedError: if training ended with NaN or infinity.
    """
    model.load(start_P)
    model.train()
    held_P = held_elements(model, trainable)
    step = optimizer_step(model.flat, config)
    gradient_P = model.flat.grad
    assert gradient_P is not None
    num_epochs = config.local_epochs
    assert num_epochs is not None  # a study without it has a privacy section, and trains privately
    loss_sum = 0.0
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
            if held_P is not None:
                gradient_P[held_P] = 0.0
            step()
            put_back(model, start_P, held_P)
            loss_sum += float(losses_B.detach().sum())
    return TrainResult(adapter_P=trained_vector(model), loss=loss_sum / len(items))


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
    adapter_P: Tensor,
    features: FeatureCache,
    batch_size: int,
) -> dict[str, float]:
    """Metrics of an adapter on ``items``, without augmentation.

    Raises:
        AdapterMismatchError: if ``adapter_P`` does not fit.
    """
    model.load(adapter_P)
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


def optimizer_step(flat: torch.nn.Parameter, config: TrainingConfig) -> Callable[[], object]:
    """What takes one optimiser step on ``flat``, with fresh optimiser state."""
    if config.optimizer == "adamw":
        return torch.optim.AdamW([flat], lr=config.learning_rate, weight_decay=config.weight_decay).step
    assert flat.grad is not None
    # Plain SGD is this one operation; torch.optim.SGD takes as long again to get there.
    return partial(flat.data.add_, flat.grad, alpha=-config.learning_rate)


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


def held_elements(model: AdaptedModel, trainable: Callable[[str], bool]) -> Tensor | None:
    """Mask of the elements of the flat adapter that must not move, or None if all may."""
    specs = model.manifest.tensors
    held = [not trainable(spec.name) for spec in specs]
    if all(held):
        raise AdapterMismatchError("Expected at least one trainable tensor in the phase, got none.")
    if not any(held):
        return None
    pieces = [torch.full((spec.num_elements,), is_held) for spec, is_held in zip(specs, held, strict=True)]
    return torch.cat(pieces).to(model.device)


def put_back(model: AdaptedModel, start_P: Tensor, held_P: Tensor | None) -> None:
    """What does not train stays as it came, whatever the optimiser does to it (weight decay)."""
    if held_P is not None:
        with torch.no_grad():
            model.flat[held_P] = start_P.to(model.device)[held_P]
