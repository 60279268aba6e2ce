"""Scanner profiles: finite, deterministic, different from each other, and geometry stays where it is."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from simulation.scanner import SCANNERS, Ghosting, Motion

NAMES = sorted(SCANNERS)


def phantom() -> Tensor:
    """A grey disc with two bright discs, as a head with two structures; float32 128 x 128."""
    rows, columns = torch.meshgrid(torch.arange(128.0), torch.arange(128.0), indexing="ij")

    def disc(row: float, column: float, radius: float) -> Tensor:
        return torch.hypot(rows - row, columns - column) < radius

    image = torch.where(disc(64, 64, 50), 0.5, 0.0)
    return torch.where(disc(50, 40, 9) | disc(72, 88, 12), 0.95, image)


def scan(name: str, seed: int, image: Tensor | None = None) -> Tensor:
    return SCANNERS[name].acquire(phantom() if image is None else image, np.random.default_rng(seed))


@pytest.mark.parametrize("name", NAMES)
def test_scan_is_finite_and_between_zero_and_one(name: str) -> None:
    image = scan(name, 0)
    assert image.shape == (128, 128)
    assert image.dtype == torch.float32
    assert type(image) is Tensor
    assert 0.0 <= float(image.min()) <= float(image.max()) <= 1.0


@pytest.mark.parametrize("name", NAMES)
def test_scan_leaves_anatomy_where_it_is(name: str) -> None:
    """The shift that aligns the scan best with the phantom (peak of the cross-correlation) is at most a pixel."""
    original = phantom() - phantom().mean()
    for seed in range(3):
        scanned = scan(name, seed)
        correlation = torch.fft.ifft2(torch.fft.fft2(scanned - scanned.mean()) * torch.fft.fft2(original).conj()).real
        row, column = divmod(int(correlation.argmax()), 128)
        assert min(row, 128 - row) <= 1
        assert min(column, 128 - column) <= 1


@pytest.mark.parametrize("name", NAMES)
def test_equal_generators_give_equal_scans_and_others_do_not(name: str) -> None:
    assert torch.equal(scan(name, 5), scan(name, 5))
    assert not torch.equal(scan(name, 5), scan(name, 6))


def test_scan_does_not_depend_on_global_randomness() -> None:
    before = torch.random.get_rng_state()
    state = np.random.get_state()[1].copy()  # noqa: NPY002 (this is what must stay untouched)
    for name in NAMES:
        scan(name, 1)
    assert torch.equal(before, torch.random.get_rng_state())
    assert np.array_equal(state, np.random.get_state()[1])  # noqa: NPY002


def test_profiles_differ_from_each_other_more_than_patients_of_one_site() -> None:
    """Two scans of one profile are closer than two profiles for the reference against each other one."""
    reference, again = scan("reference-3t", 1), scan("reference-3t", 2)
    within = float((reference - again).abs().mean())
    for name in NAMES:
        if name != "reference-3t":
            assert float((reference - scan(name, 1)).abs().mean()) > 2 * within, name


@pytest.mark.parametrize("name", NAMES)
def test_empty_slice_stays_empty(name: str) -> None:
    assert not bool(scan(name, 0, torch.zeros(64, 64)).any())


def test_pixels_that_are_not_finite_are_refused() -> None:
    image = phantom()
    image[3, 3] = float("nan")
    with pytest.raises(ValueError, match="finite"):
        scan("reference-3t", 0, image)


def test_ghosts_are_displaced_copies_along_the_rows() -> None:
    image = torch.zeros(1, 64, 64)
    image[0, 32, 20] = 1.0
    ghosted = Ghosting(num_ghosts=4, intensity=(0.5, 0.5))(image, np.random.default_rng(0))
    assert sorted(torch.nonzero(ghosted[0] > 0.05)[:, 0].tolist()) == [0, 16, 32, 48]
    assert set(torch.nonzero(ghosted[0] > 0.05)[:, 1].tolist()) == {20}


def test_ghosts_and_motion_of_strength_zero_leave_the_image() -> None:
    image = phantom().unsqueeze(0)
    generator = np.random.default_rng(0)
    torch.testing.assert_close(Ghosting(4, (0.0, 0.0))(image, generator), image, atol=1e-5, rtol=0)
    torch.testing.assert_close(Motion(0.0, 5, 0.1)(image, generator), image, atol=1e-5, rtol=0)


def test_every_profile_is_listed_under_its_name_with_a_source() -> None:
    assert len(SCANNERS) >= 4
    for name, profile in SCANNERS.items():
        assert profile.name == name
        assert profile.description
        assert profile.source
