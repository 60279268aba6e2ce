"""Gradient inversion: exact without protection, and nothing left behind noise or masks."""

import numpy as np
import pytest

from privacy.randomness import RandomStream
from simulation.audit.inversion import SIDE_PX, Image, invert, likeness


@pytest.fixture
def image() -> Image:
    """A disc with a hole."""
    y, x = np.mgrid[-1:1:128j, -1:1:128j]
    radius = np.hypot(x, y)
    levels: Image = ((radius < 0.8) * 0.8 - (radius < 0.3) * 0.5).astype(np.float32)
    return levels


def test_protection_decides_what_is_seen(image: Image) -> None:
    original, found = invert(image, clip_norm=0.1, noise_multiplier=1.0, stream=RandomStream.for_simulation(0), seed=1)
    assert original.shape == (SIDE_PX, SIDE_PX)
    by = {one.result.protection: one for one in found}
    assert list(by) == ["off", "clipped", "clipped and noised", "masked"]
    for exact in ("off", "clipped"):
        assert by[exact].result.psnr_db > 80
        np.testing.assert_allclose(by[exact].image_HW, original, atol=1e-3)
    for hidden in ("clipped and noised", "masked"):
        assert by[hidden].result.psnr_db < 12
        assert by[hidden].result.ssim < 0.1
        assert abs(np.corrcoef(by[hidden].image_HW.ravel(), original.ravel())[0, 1]) < 0.1


def test_noise_too_small_to_hide_does_not_hide(image: Image) -> None:
    """The attack is not stopped by noise as such: a thousandth of it leaves the image."""
    _, found = invert(image, clip_norm=0.1, noise_multiplier=1e-4, stream=RandomStream.for_simulation(0), seed=1)
    assert found[2].result.ssim > 0.5


def test_likeness_of_equal_and_of_shifted_images(image: Image) -> None:
    assert likeness(image, image) == (120.0, pytest.approx(1.0))
    psnr_db, ssim = likeness(image, np.clip(image + 0.1, 0, 2).astype(np.float32))
    assert psnr_db == pytest.approx(20.0, abs=0.01)
    assert ssim < 1.0
