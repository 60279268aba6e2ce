"""Forgetting: means over cases, intervals over patients within their sites, and nothing that was not there."""

import numpy as np
import pytest

from medfed.metrics.outline_scores import OutlineScores
from medfed.metrics.resampling import patient_weights
from simulation.forgetting import BeforeAndAfter, forgetting_of

CLASSES = ("pallidum-left", "thalamus-right", "putamen-left", "never-seen")


def outlines(rows: list[tuple[int, int, float]], num_patients: int) -> OutlineScores:
    """Cases as (patient, class, Dice)."""
    patient, structure, dice = zip(*rows, strict=True)
    unknown_N = np.full(len(rows), np.nan)
    return OutlineScores(
        classes=CLASSES,
        unit="mm",
        num_patients=num_patients,
        patient_N=np.array(patient),
        class_N=np.array(structure),
        dice_N=np.array(dice),
        hd95_N=unknown_N,
        surface_distance_N=unknown_N,
        attributes={},
        embedding_BD=np.zeros((num_patients, 1)),
    )


def site(rows: list[tuple[int, int, float, float]], num_patients: int, seed: int) -> BeforeAndAfter:
    """Cases as (patient, class, Dice before, Dice after)."""
    before, after = ([(patient, structure, values[at]) for patient, structure, *values in rows] for at in (0, 1))
    return BeforeAndAfter(
        outlines(before, num_patients), outlines(after, num_patients), patient_weights(num_patients, seed)
    )


NORTH = site([(0, 0, 0.5, 0.6), (1, 0, 0.7, 0.6), (1, 0, 0.9, 0.9), (1, 1, 0.8, 0.9)], num_patients=3, seed=1)
SOUTH = site([(0, 0, 0.4, 0.3), (0, 1, 0.6, 0.6), (1, 2, 0.2, 0.9)], num_patients=2, seed=2)


def test_skill_is_the_mean_over_all_sites_cases_and_agrees_with_a_slow_count() -> None:
    found = forgetting_of([NORTH, SOUTH], {"thalamus-right", "putamen-left"})
    assert list(found.structures) == ["pallidum-left", "thalamus-right", "putamen-left"]
    assert found.patients == 5
    pallidum = found.structures["pallidum-left"]
    assert pallidum.cases == 4
    assert (pallidum.before.value, pallidum.after.value) == pytest.approx((2.5 / 4, 2.4 / 4))
    assert pallidum.change.value == pytest.approx(-0.1 / 4)
    changes = []
    for north, south in zip(NORTH.weight_RU[1:], SOUTH.weight_RU[1:], strict=True):
        weights = [north[0], north[1], north[1], south[0]]
        if sum(weights):
            changes.append(np.average([0.1, -0.1, 0.0, -0.1], weights=weights))
    low, high = np.quantile(changes, [0.025, 0.975])
    assert (pallidum.change.low, pallidum.change.high) == pytest.approx((low, high))


def test_mean_weighs_structures_alike_and_keeps_mirror_images_apart() -> None:
    found = forgetting_of([NORTH, SOUTH], {"thalamus-right", "putamen-left", "never-seen"})
    assert [name for name, one in found.structures.items() if one.other_side] == ["thalamus-right", "putamen-left"]
    assert found.other_sides is not None
    assert found.other_sides.change.value == pytest.approx((0.05 + 0.7) / 2)
    assert found.neither_side is not None
    assert found.neither_side.change.value == found.structures["pallidum-left"].change.value
    assert forgetting_of([NORTH, SOUTH], ()).other_sides is None


def test_clear_losses_and_gains_are_counted_over_sites() -> None:
    flips = forgetting_of([NORTH, SOUTH], ()).flips
    assert (flips.cases, flips.lost, flips.gained) == (7, 2, 3)


def test_a_loss_at_every_patient_is_told_from_chance_and_a_mixed_one_is_not() -> None:
    worse = site([(patient, 0, 0.8, 0.7 - 0.01 * patient) for patient in range(8)], num_patients=8, seed=3)
    mixed = site([(patient, 0, 0.8, 0.8 + (-1) ** patient * 0.1) for patient in range(8)], num_patients=8, seed=3)
    assert forgetting_of([worse], ()).structures["pallidum-left"].change.is_told_from_zero
    assert not forgetting_of([mixed], ()).structures["pallidum-left"].change.is_told_from_zero
