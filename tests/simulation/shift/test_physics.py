"""Scanner physics: nothing at strength zero, more at more, the same for the same generator, anatomy where it was."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError
from torch import Tensor

from medfed.shift_profile import ShiftProfile, WindowShift
from simulation.shift.draws import Drawn
from simulation.shift.physics import PHYSICS, degrade, window

STRENGTHS: dict[str, tuple[dict[str, Any], dict[str, Any], dict[str, Any]]] = {
    "contrast": ({"gamma": (1, 1)}, {"gamma": (1.3, 1.3)}, {"gamma": (2.5, 2.5)}),
    "bias_field": ({"strength": (0, 0)}, {"strength": (0.1, 0.1)}, {"strength": (0.5, 0.5)}),
    "point_spread": ({"sigma_px": (0, 0)}, {"sigma_px": (0.7, 0.7)}, {"sigma_px": (2.5, 2.5)}),
    "resolution": ({"zoom": (1, 1)}, {"zoom": (0.6, 0.6)}, {"zoom": (0.2, 0.2)}),
    "ghosting": ({"intensity": (0, 0)}, {"intensity": (0.2, 0.2)}, {"intensity": (0.8, 0.8)}),
    "motion": ({"max_shift_px": (0, 0)}, {"max_shift_px": (1, 1)}, {"max_shift_px": (6, 6)}),
    "gibbs": ({"alpha": (0, 0)}, {"alpha": (0.4, 0.4)}, {"alpha": (0.8, 0.8)}),
    "spikes": ({"amplitude": (0, 0)}, {"amplitude": (0.2, 0.2)}, {"amplitude": (1, 1)}),
    "noise": ({"sd": (0, 0)}, {"sd": (0.02, 0.02)}, {"sd": (0.2, 0.2)}),
}
"""For every family: a strength that changes nothing, a little, and a lot."""


def phantom() -> Tensor:
    """A grey disc with two bright discs; float32 1 x 96 x 96."""
    rows, columns = torch.meshgrid(torch.arange(96.0), torch.arange(96.0), indexing="ij")
    image = torch.where(torch.hypot(rows - 48, columns - 48) < 38, 0.5, 0.0)
    bright = (torch.hypot(rows - 36, columns - 30) < 8) | (torch.hypot(rows - 54, columns - 66) < 10)
    return torch.where(bright, 0.95, image).unsqueeze(0)


def shifted(family: str, settings: dict[str, Any], seed: int = 0) -> Tensor:
    return degrade(phantom(), ShiftProfile.model_validate({family: settings}), Drawn(seed, ("north", 0)))


def test_every_family_of_physics_is_tested() -> None:
    assert set(STRENGTHS) == set(PHYSICS)


@pytest.mark.parametrize("family", PHYSICS)
def test_strength_zero_changes_nothing(family: str) -> None:
    assert torch.equal(shifted(family, STRENGTHS[family][0]), phantom())


@pytest.mark.parametrize("family", PHYSICS)
def test_more_strength_changes_more(family: str) -> None:
    little, lot = (
        float(np.mean([float((shifted(family, STRENGTHS[family][n], seed) - phantom()).abs().mean()) for seed in range(3)]))
        for n in (1, 2)
    )  # fmt: skip
    assert 0.0 < little < lot


@pytest.mark.parametrize("family", PHYSICS)
def test_same_generator_gives_the_same_image_which_is_finite_and_not_negative(family: str) -> None:
    for seed in range(3):
        image = shifted(family, STRENGTHS[family][2], seed)
        assert torch.equal(image, shifted(family, STRENGTHS[family][2], seed))
        assert image.shape == phantom().shape
        assert image.dtype == torch.float32
        assert bool(torch.isfinite(image).all())
        assert float(image.min()) >= -1e-6


@pytest.mark.parametrize("family", PHYSICS)
def test_family_leaves_anatomy_where_it_is(family: str) -> None:
    original = phantom()[0] - phantom()[0].mean()
    for seed in range(3):
        image = shifted(family, STRENGTHS[family][2], seed)[0]
        correlation = torch.fft.ifft2(torch.fft.fft2(image - image.mean()) * torch.fft.fft2(original).conj()).real
        row, column = divmod(int(correlation.argmax()), 96)
        assert min(row, 96 - row) <= 1
        assert min(column, 96 - column) <= 1


def test_empty_image_stays_finite() -> None:
    profile = ShiftProfile.model_validate({name: strengths[2] for name, strengths in STRENGTHS.items()})
    assert bool(torch.isfinite(degrade(torch.zeros(1, 48, 48), profile, Drawn(0, ()))).all())


def test_family_draws_the_same_whatever_other_families_are_there() -> None:
    """Noise of a profile is the noise of that profile with a family before it that changes nothing."""
    noisy, idle = {"sd": (0.0, 0.2)}, {"intensity": (0, 0)}
    alone = degrade(phantom(), ShiftProfile.model_validate({"noise": noisy}), Drawn(4, ()))
    beside = degrade(phantom(), ShiftProfile.model_validate({"noise": noisy, "ghosting": idle}), Drawn(4, ()))
    assert torch.equal(alone, beside)


def test_noise_has_the_standard_deviation_it_says() -> None:
    """Accepts the right scale and would reject two thirds and three halves of it."""
    flat = torch.full((1, 96, 96), 0.5)
    profile = ShiftProfile.model_validate({"noise": {"kind": "gaussian", "sd": (0.05, 0.05)}})
    drawn = degrade(flat, profile, Drawn(1, ())) - flat
    assert abs(float(drawn.std()) / 0.05 - 1.0) < 0.05
    assert abs(float(drawn.mean())) < 0.005


def test_rician_noise_lifts_the_dark_as_gaussian_noise_does_not_when_unclipped() -> None:
    """Of nothing, a Rician magnitude has the Rayleigh mean: sd * sqrt(pi / 2)."""
    profile = ShiftProfile.model_validate({"noise": {"sd": (0.1, 0.1)}})
    image = degrade(torch.zeros(1, 96, 96), profile, Drawn(1, ()))
    assert abs(float(image.mean()) / (0.1 * np.sqrt(np.pi / 2)) - 1.0) < 0.05


def test_spikes_are_stripes_of_the_amplitude_that_is_asked_for() -> None:
    flat = torch.full((1, 96, 96), 0.5)
    profile = ShiftProfile.model_validate({"spikes": {"amplitude": (0.3, 0.3)}})
    stripes = degrade(flat, profile, Drawn(2, ())) - flat
    assert abs(float(stripes.abs().max()) / (0.3 * 0.5) - 1.0) < 0.05


@settings(max_examples=30)
@given(st.floats(0, 0.4), st.floats(0.5, 1.0))
def test_window_cuts_off_and_stretches(low: float, high: float) -> None:
    image = torch.linspace(0, 1, 64).reshape(8, 8)
    seen = window(image, WindowShift(low=(low, low), high=(high, high)), np.random.default_rng(0))
    torch.testing.assert_close(seen, ((image - low) / (high - low)).clamp(0, 1), atol=1e-5, rtol=0)


@pytest.mark.parametrize(
    ("family", "settings"),
    [
        ("noise", {"sd": (0.2, 0.1)}),
        ("noise", {"sd": (-0.1, 0.1)}),
        ("resolution", {"zoom": (0.0, 0.5)}),
        ("ghosting", {"intensity": (0.0, 1.5)}),
        ("window", {"low": (0.1, 0.6), "high": (0.5, 0.9)}),
        ("gibbs", {"alpha": (0, 0.1), "strength": 1}),
        ("labels", {"finding": "effusion"}),
        ("demographics", {"age_groups": (0.5, 0.5, 0.5)}),
    ],
)
def test_impossible_family_is_refused(family: str, settings: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        ShiftProfile.model_validate({family: settings})
