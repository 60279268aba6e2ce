"""What a backbone expects of an image, as a value with a digest."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from functools import cached_property
from typing import Literal

from medfed.canonical import canonical_bytes, sha256_hex

TRANSFORM_VERSION = 2
"""Raised when the deterministic preprocessing changes; part of every feature-cache key."""


@dataclass(frozen=True)
class PixelSpec:
    """The deterministic preprocessing of one image.

    Attributes:
        image_size: side of the square input in pixels; None leaves the size alone.
        intensity: ``percentile`` maps the 0.5th..99.5th percentile of the image to [0, 1] and clips;
            ``raw`` leaves values alone.
        mean: subtracted per channel after that.
        std: divided by per channel after that.
    """

    image_size: int | None
    intensity: Literal["percentile", "raw"] = "percentile"
    mean: tuple[float, float, float] = (0.0, 0.0, 0.0)
    std: tuple[float, float, float] = (1.0, 1.0, 1.0)

    @cached_property
    def digest(self) -> str:
        """SHA-256 of the preprocessing, hexadecimal."""
        return sha256_hex(canonical_bytes([TRANSFORM_VERSION, asdict(self)]))
