"""Stain: identity at zero, white stays white, tissue changes along its stain vectors, and grey is refused."""

from __future__ import annotations

from typing import Literal

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from medfed.shift_profile import StainShift
from simulation.shift.contact_sheet import stain_phantom
from simulation.shift.stain import restain

SPACES: tuple[Literal["hed", "macenko"], ...] = ("hed", "macenko")


@pytest.mark.parametrize("space", SPACES)
def test_stain_without_strength_is_the_image_itself(space: Literal["hed", "macenko"]) -> None:
    image = stain_phantom(48)
    assert restain(image, StainShift(space=space), np.random.default_rng(0)) is image


@settings(max_examples=20)
@given(st.sampled_from(SPACES), st.floats(0.01, 0.9), st.integers(0, 10**6))
def test_unstained_glass_stays_white_and_equal_generators_give_equal_slides(
    space: Literal["hed", "macenko"], scale: float, seed: int
) -> None:
    image = stain_phantom(48)
    shift = StainShift(space=space, scale=scale)
    slide = restain(image, shift, np.random.default_rng(seed))
    assert slide.dtype == np.uint8
    assert slide.shape == image.shape
    assert (slide[image.min(axis=-1) == 255] == 255).all()
    assert np.array_equal(slide, restain(image, shift, np.random.default_rng(seed)))


@pytest.mark.parametrize("space", SPACES)
def test_barely_changed_stain_is_barely_another_image(space: Literal["hed", "macenko"]) -> None:
    """Through optical density and back: rounding to 8 bits is all that is lost."""
    image = stain_phantom(64)
    slide = restain(image, StainShift(space=space, scale=1e-6), np.random.default_rng(0))
    assert np.abs(slide.astype(int) - image.astype(int)).max() <= 1


@pytest.mark.parametrize("space", SPACES)
def test_stronger_stain_moves_tissue_further(space: Literal["hed", "macenko"]) -> None:
    image = stain_phantom(64).astype(int)
    moved = [
        np.mean(
            [
                np.abs(restain(stain_phantom(64), StainShift(space=space, scale=scale), np.random.default_rng(n)) - image).mean()
                for n in range(5)
            ]
        )
        for scale in (0.05, 0.4)
    ]  # fmt: skip
    assert 0 < 3 * moved[0] < moved[1]


def test_concentrations_are_scaled_as_the_generator_says() -> None:
    """Oracle: Lambert and Beer written out for one pixel of pure eosin of known concentration."""
    eosin = np.array([0.07, 0.99, 0.11]) / np.linalg.norm([0.07, 0.99, 0.11])
    image = np.rint(255 * np.exp(-0.8 * eosin)).astype(np.uint8)[None, None]
    slide = restain(image, StainShift(scale=0.3), np.random.default_rng(5))
    factor = 1.0 + np.random.default_rng(5).uniform(-0.3, 0.3, 3)[1]
    expected = 255 * np.exp(-0.8 * factor * eosin)
    assert np.abs(slide[0, 0].astype(float) - expected).max() < 2.5


def test_slide_without_tissue_has_no_stain_vectors_of_its_own() -> None:
    glass = np.full((8, 8, 3), 250, dtype=np.uint8)
    assert restain(glass, StainShift(space="macenko", scale=0.5), np.random.default_rng(0)) is glass


@pytest.mark.parametrize("image", [np.zeros((4, 4), np.uint8), np.zeros((4, 4, 3), np.float32)])
def test_image_that_is_not_rgb_of_eight_bits_is_refused(image: np.ndarray) -> None:
    with pytest.raises(ValueError, match="in colour"):
        restain(image, StainShift(scale=0.1), np.random.default_rng(0))
