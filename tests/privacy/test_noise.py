"""Noise of the right scale, on every coordinate, new in every call; and a refusal to add none."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats
from torch import Tensor

from medfed.errors import PrivacyError
from privacy.noise import add_gaussian, hardened_normal
from privacy.randomness import LARGEST_NORMAL, RandomStream

ACCEPT = 1e-3
REJECT = 1e-9


def stream_of(*context: str | int) -> RandomStream:
    return RandomStream.for_simulation(13, *context)


def zeros(n: int) -> Tensor:
    return torch.zeros(n, dtype=torch.float64)


class ConstantStream(RandomStream):
    """A stream whose integers are all the same."""

    def __init__(self, word: int) -> None:
        super().__init__(bytes(32))
        self.word = word

    def uint64(self, n: int) -> np.ndarray:
        return np.full(n, self.word, dtype=np.uint64)


@given(st.lists(st.floats(-1e6, 1e6), min_size=1, max_size=9), st.floats(1e-3, 1e3))
def test_noise_is_four_normals_halved_on_every_element(values: list[float], noise_std: float) -> None:
    normals = stream_of("oracle")
    four = [normals.normal(len(values)).tolist() for _ in range(4)]
    expected = [value + noise_std * ((a + b + c + d) / 2) for value, a, b, c, d in zip(values, *four, strict=True)]
    sum_P = torch.tensor(values, dtype=torch.float64)
    noised_P = add_gaussian(sum_P, noise_std=noise_std, stream=stream_of("oracle"))
    assert noised_P.tolist() == expected
    assert sum_P.tolist() == values


def test_next_noise_begins_where_the_last_one_ended() -> None:
    stream = stream_of("after")
    add_gaussian(zeros(5), noise_std=1.0, stream=stream)
    used = 4 * 3 * 2 * 8  # four normals, three pairs, two integers, eight bytes
    assert stream.bytes(4) == stream_of("after").bytes(used + 4)[used:]


def scale_is(sample: np.ndarray, std: float, level: float) -> bool:
    """Whether a sample passes as N(0, std**2): chi-square for the variance, Kolmogorov-Smirnov for the shape."""
    low, high = stats.chi2.interval(1 - level, df=len(sample))
    variance = low <= float(np.sum(sample**2)) / std**2 <= high
    return bool(variance and stats.kstest(sample / std, "norm").pvalue > level)


@pytest.mark.parametrize("noise_std", [1.0, 0.013, 250.0])
def test_noise_has_its_standard_deviation_and_not_two_thirds_or_three_halves_of_it(noise_std: float) -> None:
    sample = add_gaussian(zeros(40_000), noise_std=noise_std, stream=stream_of("scale")).numpy()
    assert scale_is(sample, noise_std, ACCEPT)
    for factor in (2 / 3, 3 / 2):
        assert not scale_is(sample, factor * noise_std, REJECT)
        # As if the mechanism were broken: its noise does not pass for the right one either.
        assert not scale_is(factor * sample, noise_std, REJECT)
    for factor in (0.97, 1.03):
        assert not scale_is(sample, factor * noise_std, ACCEPT)


def test_noise_has_mean_zero() -> None:
    sample = hardened_normal(100_000, stream_of("mean"))
    assert abs(sample.mean()) < 3.3 / math.sqrt(len(sample))


def test_noise_has_the_tails_of_the_normal_distribution() -> None:
    sample = np.abs(hardened_normal(500_000, stream_of("tails")))
    for limit in (3.0, 4.0):
        assert stats.binomtest(int((sample > limit).sum()), len(sample), 2 * stats.norm.sf(limit)).pvalue > ACCEPT


def test_noise_is_independent_between_coordinates_and_between_calls() -> None:
    stream = stream_of("independent")
    n = 20_000
    first, second = hardened_normal(n, stream), hardened_normal(n, stream)
    limit = 4 / math.sqrt(n // 2)
    pairs = [(first[:-lag], first[lag:]) for lag in (1, 2, n // 4, n // 2 - 1, n // 2)]
    for a, b in [*pairs, (first, second), (first[:-1], second[1:])]:
        size = min(len(a), n // 2)
        assert abs(np.corrcoef(a[:size], b[:size])[0, 1]) < limit
        assert abs(np.corrcoef(a[:size] ** 2, b[:size] ** 2)[0, 1]) < limit
    assert len(np.unique(np.concatenate([first, second]))) == 2 * n


def test_noise_of_one_coordinate_is_independent_over_many_steps() -> None:
    stream = stream_of("steps")
    noise = np.stack([add_gaussian(zeros(3), noise_std=1.0, stream=stream).numpy() for _ in range(10_000)])
    correlation = np.corrcoef(np.hstack([noise[1:], noise[:-1]]).T) - np.eye(6)
    assert np.abs(correlation).max() < 4 / math.sqrt(len(noise))
    for coordinate in noise.T:
        assert scale_is(coordinate, 1.0, ACCEPT)


def test_noise_does_not_depend_on_the_sum() -> None:
    sum_P = torch.tensor([0.0, 5.0, -3.0, 1e6], dtype=torch.float64)
    noise_P = add_gaussian(zeros(4), noise_std=2.0, stream=stream_of("same"))
    assert torch.equal(add_gaussian(sum_P, noise_std=2.0, stream=stream_of("same")), sum_P + noise_P)


def test_no_noise_exceeds_its_stated_limit() -> None:
    farthest = hardened_normal(2, ConstantStream(0))
    assert farthest[0] == pytest.approx(2 * LARGEST_NORMAL, rel=1e-4)
    assert farthest[0] < 19
    assert np.isfinite(hardened_normal(2, ConstantStream(2**64 - 1))).all()


def test_empty_batch_gets_noise_and_an_empty_vector_none() -> None:
    assert bool((add_gaussian(zeros(6), noise_std=1.0, stream=stream_of("e")) != 0).all())
    assert add_gaussian(zeros(0), noise_std=1.0, stream=stream_of("e")).shape == (0,)


def test_sum_is_not_changed_in_place() -> None:
    sum_P = zeros(4)
    noised_P = add_gaussian(sum_P, noise_std=1.0, stream=stream_of("new"))
    assert torch.equal(sum_P, zeros(4))
    assert noised_P.dtype == torch.float64
    assert noised_P.data_ptr() != sum_P.data_ptr()


@pytest.mark.parametrize("noise_std", [0.0, -0.0, -1.0, math.nan, math.inf, -math.inf])
def test_noise_that_is_none_or_no_number_is_refused(noise_std: float) -> None:
    with pytest.raises(PrivacyError, match="Expected a finite noise_std > 0, got"):
        add_gaussian(zeros(3), noise_std=noise_std, stream=stream_of())


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_sum_that_is_not_finite_is_refused(bad: float) -> None:
    with pytest.raises(PrivacyError, match="nothing may be released"):
        add_gaussian(torch.tensor([0.0, bad], dtype=torch.float64), noise_std=1.0, stream=stream_of())


@pytest.mark.parametrize("wrong_P", [torch.zeros(3), torch.zeros(3, dtype=torch.int64), zeros(4).reshape(2, 2)])
def test_sum_of_another_form_is_refused(wrong_P: Tensor) -> None:
    with pytest.raises(ValueError, match="Expected a float64 vector"):
        add_gaussian(wrong_P, noise_std=1.0, stream=stream_of())


@pytest.mark.gpu
def test_noise_on_a_gpu_is_the_noise_of_the_cpu() -> None:
    noised_P = add_gaussian(zeros(5).cuda(), noise_std=1.0, stream=stream_of("gpu"))
    assert noised_P.is_cuda
    assert torch.equal(noised_P.cpu(), add_gaussian(zeros(5), noise_std=1.0, stream=stream_of("gpu")))
