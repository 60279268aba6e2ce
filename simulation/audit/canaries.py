"""Canaries: patients who were made up to be found, in the training that real patients go through.

A white-box canary is a patient whose gradient is known: long, in a direction of its own. Only the gradient is made up.
Drawing, images per patient, micro-batches, clipping, noise and the optimiser's step are those of
:mod:`client.private_trainer`; what a canary leaves in the released steps is what the mechanism let through.

Legend: B samples, Q elements of the tensors of which something trains, Z coordinates of what trains, M canaries.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.utils._pytree import tree_map

from client.data import Item
from client.features import FeatureCache
from client.private_trainer import Unit
from medfed.models.adapted import AdaptedModel
from privacy.per_sample.engine import Batch, Engine
from strategies.subspace import Subspace, Whole

LENGTH = 10.0
"""Norm of a canary's gradient over the clip norm: what is not clipped stands out by this much."""

_MARK = 2.0**20
"""Canary i has features of ``_MARK + i``, exactly: larger than any that an image has."""

_PREFIX = "canary-"


def canary_units(num_canaries: int, images: int, like: Item) -> tuple[Unit, ...]:
    """Patients of so many images each; sizes of ``like``, nothing else of it but its annotation, which is not used."""
    return tuple(
        tuple(
            Item(
                patient_id=f"{_PREFIX}{number}",
                site_id=like.site_id,
                image_CHW=torch.zeros(0),
                annotation=like.annotation,
                image_digest=f"{_PREFIX}{number}",
                reference_digest="",
            )
            for _ in range(images)
        )
        for number in range(num_canaries)
    )


class CanaryFeatures(FeatureCache):
    """Features of canaries, which say who they are, and of real images as another cache has them.

    Args:
        inner: features of real images.
        sizes: of one image's features, without batch axis; a canary alone needs but one number.
    """

    def __init__(self, inner: FeatureCache, sizes: Sequence[int]) -> None:
        super().__init__()
        self._inner, self._sizes = inner, tuple(sizes)

    def batch(self, items: Sequence[Item], model: AdaptedModel) -> Tensor:
        """As of any cache."""
        return torch.stack([self._one(item, model) for item in items]).to(model.device)

    def _one(self, item: Item, model: AdaptedModel) -> Tensor:
        if not item.image_digest.startswith(_PREFIX):
            return self._inner.features_of(item, model)
        number = int(item.image_digest.removeprefix(_PREFIX))
        return torch.full(self._sizes, _MARK + number, device=model.device)


class CanaryEngine(Engine):
    """Gradients of canaries from a table, and of real images from the engine that passed its self-check.

    Args:
        inner: for real images; its module and parameters are named, too.
        gradients_MQ: gradient of each canary.
    """

    name = "canaries"

    def __init__(self, inner: Engine, gradients_MQ: Tensor) -> None:
        super().__init__(inner.module, inner.parameters, inner.losses)
        self._inner, self._gradients_MQ = inner, gradients_MQ

    def _gradients(self, batch: Batch, num_samples: int) -> tuple[Tensor, Tensor]:
        inputs = batch[0]
        marks_B = inputs.reshape(num_samples, -1)[:, 0]
        is_canary_B = marks_B >= _MARK
        gradients_BQ = torch.zeros(num_samples, self.num_parameters, device=inputs.device)
        losses_B = torch.zeros(num_samples, device=inputs.device)
        gradients_BQ[is_canary_B] = self._gradients_MQ[(marks_B[is_canary_B] - _MARK).long()]
        if not bool(is_canary_B.all()):
            real = tree_map(lambda leaf: leaf[~is_canary_B], batch)
            gradients_BQ[~is_canary_B], losses_B[~is_canary_B] = self._inner.gradients(real)
        return gradients_BQ, losses_B


def gradients_of(directions_MZ: Tensor, trainable: Subspace, *, norm: float) -> Tensor:
    """Gradients (M, Q) whose coordinates are these directions, of length one each, times the norm."""
    support = Subspace.of(trainable.adapter, lambda spec: Whole() if spec.name in trainable.parts else None)
    nothing_P = torch.zeros(trainable.adapter.num_elements)
    return torch.stack([norm * support.coordinates(trainable.place(nothing_P, one_Z)) for one_Z in directions_MZ])


def basis_directions(places_M: Sequence[int], num_coordinates: int) -> Tensor:
    """One coordinate each, (M, Z)."""
    directions_MZ = torch.zeros(len(places_M), num_coordinates)
    directions_MZ[torch.arange(len(places_M)), torch.tensor(places_M)] = 1.0
    return directions_MZ
