"""The seam between tasks and training: per-image losses, and metrics of a whole cohort.

Legend: B images of a batch.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from medfed.models.adapted import AdaptedModel


class Task(ABC):
    """Losses and metrics of one task family.

    A task never sees files. Its *annotation* is what the data layer made of one image's reference (boxes and
    masks, or class indices); a batch of annotations becomes a *target* of tensors.
    """

    primary: str
    """Name of the metric by which studies are compared; larger is better, in [0, 1]."""

    @property
    @abstractmethod
    def parts(self) -> tuple[str, ...]:
        """Classes or targets, by which the primary metric is broken down."""

    @property
    def metric_names(self) -> frozenset[str]:
        """The only names under which a site may report a number."""
        return frozenset({"loss", self.primary, *(f"{self.primary}/{part}" for part in self.parts)})

    @abstractmethod
    def collate(self, annotations: Sequence[Any], device: torch.device) -> Any:
        """The target of a batch, on ``device``."""

    @abstractmethod
    def losses(self, model: AdaptedModel, features: Tensor, target: Any) -> Tensor:
        """One loss per image, shape (B,): what per-patient clipping needs. Never reduced over the batch."""

    @abstractmethod
    def stack(self, annotations: Sequence[Any], device: torch.device) -> Any:
        """The target of a batch as tensors that all have the image as leading axis, for per-image gradients."""

    @abstractmethod
    def stacked_losses(self, model: AdaptedModel, features: Tensor, stacked: Any) -> Tensor:
        """:meth:`losses` of a batch whose target comes from :meth:`stack`; shape (B,)."""

    @abstractmethod
    def made_up(self, num_images: int, like: Any, generator: torch.Generator) -> Any:
        """A stacked target that is nobody's, with the sizes of the annotation ``like`` and none of its values."""

    @abstractmethod
    def evaluate(self, model: AdaptedModel, batches: Iterable[tuple[Tensor, Any]]) -> dict[str, float]:
        """Metrics over all images of ``batches`` of (features, target).

        Holds :attr:`primary` and ``<primary>/<part>`` for every class or target that occurs. What cannot be
        computed is left out, never NaN.
        """
