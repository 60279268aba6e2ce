"""Maximum mean discrepancy: equal to a slow double loop, with the level it says and power where there is a shift."""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from simulation.shift.discrepancy import discrepancy, median_width, scaled

Vectors = npt.NDArray[np.float64]


def by_double_loop(first: Vectors, second: Vectors) -> float:
    """Lemma 6 of Gretton et al. 2012, written out."""
    points = scaled(np.concatenate([first, second]))
    width = median_width(points)

    def kernel(x: Vectors, y: Vectors) -> float:
        return math.exp(-sum((a - b) ** 2 for a, b in zip(x, y, strict=True)) / (2 * width**2))

    xs, ys = points[: len(first)], points[len(first) :]
    n, m = len(xs), len(ys)
    within_x = sum(kernel(xs[i], xs[j]) for i in range(n) for j in range(n) if i != j) / (n * (n - 1))
    within_y = sum(kernel(ys[i], ys[j]) for i in range(m) for j in range(m) if i != j) / (m * (m - 1))
    between = sum(kernel(x, y) for x in xs for y in ys) / (n * m)
    return within_x + within_y - 2 * between


def sample(seed: int, number: int, shift: float = 0.0, dimensions: int = 6) -> Vectors:
    return np.random.default_rng(seed).normal(shift, 1.0, (number, dimensions))


@settings(max_examples=20)
@given(st.integers(0, 10**6), st.integers(2, 9), st.integers(2, 9), st.floats(0, 3))
def test_estimate_is_that_of_a_double_loop(seed: int, n: int, m: int, shift: float) -> None:
    first, second = sample(seed, n), sample(seed + 1, m, shift)
    fast = discrepancy(first, second, np.random.default_rng(0), num_permutations=1).mmd_squared
    assert fast == pytest.approx(by_double_loop(first, second), abs=1e-9)


@settings(max_examples=20)
@given(st.integers(0, 10**6), st.floats(0.01, 100), st.floats(-50, 50))
def test_estimate_depends_on_neither_unit_nor_origin_nor_order(seed: int, unit: float, origin: float) -> None:
    first, second = sample(seed, 6), sample(seed + 1, 8, 1.0)
    plain = discrepancy(first, second, np.random.default_rng(0), num_permutations=1).mmd_squared
    moved = discrepancy(
        first * unit + origin, second * unit + origin, np.random.default_rng(0), num_permutations=1
    ).mmd_squared
    swapped = discrepancy(second[::-1], first[::-1], np.random.default_rng(0), num_permutations=1).mmd_squared
    assert moved == pytest.approx(plain, abs=1e-6)
    assert swapped == pytest.approx(plain, abs=1e-9)


def test_test_keeps_its_level_where_there_is_no_shift() -> None:
    """Of 300 pairs of samples of one distribution, 5 % are called different, within what chance allows."""
    p_values = [
        discrepancy(
            sample(2 * run, 10), sample(2 * run + 1, 14), np.random.default_rng(run), num_permutations=99
        ).p_value
        for run in range(300)
    ]  # fmt: skip
    rejected = sum(p <= 0.05 for p in p_values)
    assert abs(rejected - 15) < 4 * math.sqrt(300 * 0.05 * 0.95)
    assert abs(float(np.mean(p_values)) - 0.505) < 4 * 0.29 / math.sqrt(300)


def test_test_finds_a_shift_and_the_larger_one_is_larger() -> None:
    found = []
    for shift in (0.8, 1.6):
        runs = [
            discrepancy(
                sample(run, 12), sample(1000 + run, 12, shift), np.random.default_rng(run), num_permutations=99
            )
            for run in range(40)
        ]  # fmt: skip
        assert sum(run.p_value <= 0.05 for run in runs) >= 36
        found.append(float(np.mean([run.mmd_squared for run in runs])))
    assert 0 < found[0] < found[1]


def test_sample_against_itself_is_no_further_than_chance() -> None:
    vectors = sample(0, 10)
    result = discrepancy(vectors, vectors, np.random.default_rng(0))
    assert result.mmd_squared < 0.0
    assert result.p_value > 0.9


def test_vectors_that_are_all_equal_are_no_distance_apart() -> None:
    result = discrepancy(np.full((4, 3), 7.7), np.full((5, 3), 7.7), np.random.default_rng(0))
    assert (result.mmd_squared, result.p_value) == (0.0, 1.0)


@pytest.mark.parametrize("second", [np.zeros((1, 3)), np.full((4, 3), np.nan)])
def test_sample_without_an_answer_is_refused(second: Vectors) -> None:
    with pytest.raises(ValueError, match="Expected"):
        discrepancy(np.zeros((4, 3)), second, np.random.default_rng(0))
