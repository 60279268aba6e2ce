"""The seam between backbones and everything else: a model as a chain of stages.

Legend: B images, H height, W width.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol, runtime_checkable

from torch import Tensor


@runtime_checkable
class StagedBackbone(Protocol):
    """A backbone whose first stages can be run once and remembered.

    ``resume(prefix(image, k), k)`` is the same embedding, bit for bit, for every k: so the features after
    the last frozen stage may be cached in place of the image.
    """

    @property
    def stages(self) -> Sequence[str]:
        """Module-name prefixes in the order in which data flows through them."""
        ...

    def prefix(self, image_B3HW: Tensor, num_stages: int) -> Tensor:
        """Run the first ``num_stages`` stages; 0 returns the image."""
        ...

    def resume(self, features: Tensor, num_stages: int) -> Tensor:
        """Run the stages after the first ``num_stages``, up to the embedding that the task's head reads."""
        ...


def count_frozen_stages(stages: Sequence[str], trainable: Sequence[str]) -> int:
    """How many leading stages hold no trainable parameter, for parameter names ``trainable``.

    The last stage (the head) is never counted: features are what enters it.
    """
    for index, stage in enumerate(stages[:-1]):
        if any(name == stage or name.startswith(f"{stage}.") for name in trainable):
            return index
    return len(stages) - 1
