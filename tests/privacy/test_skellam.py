"""Skellam noise: the distribution to the last bit of the table, the right variance and no other, closed under sums."""

import bisect
import math
from decimal import Decimal, localcontext
from functools import cache

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from scipy import special, stats
from torch import Tensor

from medfed.errors import PrivacyError
from privacy import skellam
from privacy.randomness import RandomStream
from privacy.skellam import BLOCK, LARGEST_VARIANCE, add_skellam, skellam_noise

ACCEPT = 1e-3
REJECT = 1e-9


def stream_of(*context: str | int) -> RandomStream:
    return RandomStream.for_simulation(17, *context)


class ScriptedStream(RandomStream):
    """A stream whose next integers are given."""

    def __init__(self, *words: int) -> None:
        super().__init__(bytes(32))
        self.words = list(words)

    def uint64(self, n: int) -> np.ndarray:
        drawn, self.words = self.words[:n], self.words[n:]
        assert len(drawn) == n
        return np.array(drawn, dtype=np.uint64)


# --- Against Poisson variables, slowly and exactly -----------------------------------------------------------


@cache
def exact_cumulative(variance: int) -> list[Decimal]:
    """P(|k| <= 0), P(|k| <= 1), ... of the difference of two Poisson variables of rate variance / 2; 60 digits."""
    with localcontext() as context:
        context.prec = 60
        rate = Decimal(variance) / 2
        poisson, cumulative, reached = [(-rate).exp()], [], Decimal(0)
        while poisson[-1] > Decimal(10) ** -57 or len(poisson) < rate:
            poisson.append(poisson[-1] * rate / len(poisson))
        for k in range(len(poisson)):
            probability = sum((a * b for a, b in zip(poisson, poisson[k:], strict=False)), Decimal(0))
            reached += probability if k == 0 else 2 * probability
            cumulative.append(reached)
    return cumulative


def table_entries(variance: int) -> list[int]:
    table = skellam._table_of(variance)
    return [int(high) << 64 | int(low) for high, low in zip(table.high[:-1], table.low, strict=True)]


@pytest.mark.parametrize("variance", [1, 2, 7, 50, 400])
def test_table_is_the_distribution_of_the_difference_of_two_poisson_variables(variance: int) -> None:
    entries = table_entries(variance)
    with localcontext() as context:
        context.prec = 60
        for entry, exact in zip(entries, exact_cumulative(variance), strict=False):
            # Rounded down, so never more than a step below; above by no more than the oracle errs.
            assert Decimal("-1e-10") < exact * 2**127 - entry < Decimal("1.001")


@pytest.mark.parametrize("variance", [1, 7, 400])
def test_statistical_distance_is_below_what_is_stated(variance: int) -> None:
    with localcontext() as context:
        context.prec = 60
        drawn = [Decimal(entry) / 2**127 for entry in table_entries(variance)]
        cumulative = exact_cumulative(variance)
        drawn += [Decimal(1)] * (len(cumulative) - len(drawn))
        distance, before = Decimal(0), (Decimal(0), Decimal(0))
        for now in zip(drawn, cumulative, strict=True):
            distance += abs((now[0] - before[0]) - (now[1] - before[1])) / 2
            before = now
        assert distance < len(drawn) * Decimal(2) ** -128


@pytest.mark.parametrize("variance", [10_007, 2**24, 3 * 2**28])
def test_large_tables_have_the_probabilities_of_bessel_functions(variance: int) -> None:
    mass = np.diff([entry / 2**127 for entry in table_entries(variance)])
    order = np.unique((np.linspace(0.01, 6, 200) * math.sqrt(variance)).astype(int))
    expected = 2 * special.ive(order, variance)
    assert np.allclose(mass[order - 1], expected, rtol=1e-9, atol=4e-16)
    assert table_entries(variance)[0] / 2**127 == pytest.approx(special.ive(0, variance), rel=1e-12)


@pytest.mark.parametrize("variance", [1, 7, 50, 400])
def test_tail_beyond_the_table_is_cut_where_it_is_stated(variance: int) -> None:
    with localcontext() as context:
        context.prec = 60
        tail = [1 - reached for reached in exact_cumulative(variance)]
        smallest = next(k for k, probability in enumerate(tail) if probability < Decimal(2) ** -128)
    assert smallest <= len(table_entries(variance)) <= 1.03 * smallest + 4


@given(st.lists(st.integers(0, 2**64 - 1), min_size=1, max_size=40), st.sampled_from([1, 7, 50, 2**20]))
def test_draw_is_the_number_of_entries_that_a_uniform_integer_reaches(words: list[int], variance: int) -> None:
    entries = table_entries(variance)
    assume(not np.isin(np.array(words, dtype=np.uint64) >> np.uint64(1), skellam._table_of(variance).high).any())
    expected = [(-1) ** (word & 1) * bisect.bisect_left(entries, (word >> 1) << 64) for word in words]
    assert skellam_noise(len(words), variance=variance, stream=ScriptedStream(*words)).tolist() == expected


@pytest.mark.parametrize("variance", [1, 50, 2**20])
def test_sixty_four_more_bits_decide_where_the_first_ones_do_not(variance: int) -> None:
    entries = table_entries(variance)
    for number in {0, 1, len(entries) // 3, len(entries) - 2, len(entries) - 1}:
        high, low = divmod(entries[number], 2**64)
        for bits in {0, max(0, low - 1), low, min(2**64 - 1, low + 1), 2**64 - 1}:
            expected = bisect.bisect_right(entries, (high << 64) + bits)
            stream = ScriptedStream(2 * high, bits)
            assert skellam_noise(1, variance=variance, stream=stream).tolist() == [expected]
            assert stream.words == []


def test_extreme_bits_give_zero_and_the_last_entry() -> None:
    assert skellam_noise(2, variance=50, stream=ScriptedStream(0, 1)).tolist() == [0, 0]
    last = len(table_entries(50))
    ones = 2**64 - 1
    assert skellam_noise(1, variance=50, stream=ScriptedStream(ones, ones)).tolist() == [-last]


# --- The distribution of draws -------------------------------------------------------------------------------


def fits(sample: np.ndarray, variance: float, level: float) -> bool:
    """Whether a sample passes as Skellam noise: chi-square over bins of equal count, and for the variance."""
    std = math.sqrt(variance)
    edges = np.unique(np.round(stats.norm.ppf(np.linspace(0.01, 0.99, 41)) * std)) + 0.5
    cumulative = stats.skellam.cdf(edges, variance / 2, variance / 2) if variance < 1e6 else stats.norm.cdf(edges / std)
    expected = len(sample) * np.diff([0.0, *cumulative, 1.0])
    observed = np.histogram(sample, [-np.inf, *edges, np.inf])[0]
    shape = stats.chisquare(observed, expected).pvalue > level
    squares = float(np.sum(sample.astype(np.float64) ** 2)) / variance
    spread = math.sqrt(len(sample) * (2 + 1 / variance))  # the fourth moment is 3 V^2 + V
    return bool(shape and abs(squares - len(sample)) < spread * stats.norm.isf(level / 2))


@pytest.mark.parametrize("variance", [1, 9, 400, 10_007, 2**24, 2**32 // 7])
def test_noise_has_its_standard_deviation_and_not_two_thirds_or_three_halves_of_it(variance: int) -> None:
    sample = skellam_noise(60_000, variance=variance, stream=stream_of("scale"))
    assert fits(sample, variance, ACCEPT)
    for factor in (4 / 9, 9 / 4):
        assert not fits(sample, factor * variance, REJECT)
        broken = skellam_noise(60_000, variance=max(1, round(factor * variance)), stream=stream_of("broken"))
        assert variance == 1 or not fits(broken, variance, REJECT)
    for factor in (0.95, 1.05):
        assert not fits(sample, factor * variance, ACCEPT)


@pytest.mark.parametrize(("shares", "variance"), [(3, 12), (5, 10_007), (9, 2**28)])
def test_sum_of_shares_is_noise_of_the_sum_of_their_variances(shares: int, variance: int) -> None:
    total = sum(
        skellam_noise(40_000, variance=variance, stream=stream_of("share", number, variance))
        for number in range(shares)
    )
    assert fits(total, shares * variance, ACCEPT)
    assert not fits(total, (shares - 1) * variance, REJECT) or shares == 9
    assert not fits(total, 4 / 9 * shares * variance, REJECT)


def test_small_noise_has_the_probability_of_every_integer() -> None:
    sample = skellam_noise(400_000, variance=3, stream=stream_of("integers"))
    value = np.arange(-5, 6)
    inner = stats.skellam.pmf(value, 1.5, 1.5)
    observed = [int((sample == k).sum()) for k in value]
    assert stats.chisquare([*observed, 400_000 - sum(observed)], 400_000 * np.append(inner, 1 - inner.sum())).pvalue > (
        ACCEPT
    )


def test_noise_has_mean_zero_and_both_signs() -> None:
    sample = skellam_noise(200_000, variance=2**26, stream=stream_of("mean"))
    assert abs(sample.mean()) < 3.3 * 2**13 / math.sqrt(len(sample))
    assert stats.binomtest(int((sample > 0).sum()), int((sample != 0).sum())).pvalue > ACCEPT


def test_noise_has_the_tails_of_the_distribution() -> None:
    sample = np.abs(skellam_noise(1_000_000, variance=2**20, stream=stream_of("tails"))) / 2**10
    for limit in (3.0, 4.0):
        assert stats.binomtest(int((sample > limit).sum()), len(sample), 2 * stats.norm.sf(limit)).pvalue > ACCEPT


def test_noise_is_independent_between_coordinates_and_between_calls() -> None:
    stream, n = stream_of("independent"), 20_000
    first, second = (skellam_noise(n, variance=2**30, stream=stream).astype(float) for _ in range(2))
    for a, b in [
        (first, second),
        (first[:-1], first[1:]),
        (first[: n // 2], first[n // 2 :]),
        (first[:-1], second[1:]),
    ]:
        assert abs(np.corrcoef(a, b)[0, 1]) < 4 / math.sqrt(len(a))
        assert abs(np.corrcoef(a**2, b**2)[0, 1]) < 4 / math.sqrt(len(a))
        assert abs(np.corrcoef(np.sign(a), b**2)[0, 1]) < 4 / math.sqrt(len(a))


# --- Determinism and edges -----------------------------------------------------------------------------------


def test_simulation_stream_keeps_its_golden_noise() -> None:
    golden = {
        1: [1, 1, -2, -1, 0, -1, -1, 0],
        2**24: [4300, 2860, -7128, -6183, -392, -6121, -3488, -164],
        2**32: [68808, 45756, -114052, -98924, -6271, -97929, -55801, -2627],
    }
    for variance, expected in golden.items():
        assert skellam_noise(8, variance=variance, stream=stream_of("golden")).tolist() == expected


def test_long_noise_is_that_of_its_pieces() -> None:
    whole, pieces = stream_of("pieces"), stream_of("pieces")
    n = 2 * BLOCK + 5
    together = skellam_noise(n, variance=2**20, stream=whole)
    apart = [skellam_noise(part, variance=2**20, stream=pieces) for part in (BLOCK - 9, 0, 7, BLOCK, 7)]
    assert np.array_equal(together, np.concatenate(apart))
    assert together.dtype == np.int64


def test_no_draws_use_no_bits() -> None:
    stream = stream_of("none")
    assert skellam_noise(0, variance=9, stream=stream).shape == (0,)
    assert stream.bytes(8) == stream_of("none").bytes(8)


@settings(max_examples=20)
@given(st.integers(1, 300))
def test_every_variance_has_a_table(variance: int) -> None:
    entries = table_entries(variance)
    assert entries == sorted(entries)
    assert entries[-1] < 2**127
    assert sum(skellam_noise(2000, variance=variance, stream=stream_of("any")) ** 2) == pytest.approx(
        2000 * variance, rel=0.25
    )


def test_largest_variance_is_drawn() -> None:
    sample = skellam_noise(20_000, variance=LARGEST_VARIANCE, stream=stream_of("largest"))
    assert fits(sample, LARGEST_VARIANCE, ACCEPT)


@pytest.mark.parametrize("variance", [0, -1, LARGEST_VARIANCE + 1, 2.0, True, math.nan, None, "9"])
def test_variance_out_of_range_is_refused(variance: int) -> None:
    for call in (
        lambda: skellam_noise(3, variance=variance, stream=stream_of()),
        lambda: add_skellam(zeros(3), variance=variance, stream=stream_of()),
    ):
        with pytest.raises(PrivacyError, match=r"Expected the variance of Skellam noise as an integer within 1\.\.2"):
            call()


def test_negative_count_is_refused() -> None:
    with pytest.raises(ValueError, match="Expected a count >= 0, got -1"):
        skellam_noise(-1, variance=9, stream=stream_of())


# --- On a sum ------------------------------------------------------------------------------------------------


def zeros(n: int) -> Tensor:
    return torch.zeros(n, dtype=torch.int64)


@given(st.lists(st.integers(-(2**40), 2**40), max_size=9))
def test_noise_is_added_to_every_element_of_a_new_tensor(values: list[int]) -> None:
    sum_P = torch.tensor(values, dtype=torch.int64)
    noise = skellam_noise(len(values), variance=900, stream=stream_of("sum")).tolist()
    noised_P = add_skellam(sum_P, variance=900, stream=stream_of("sum"))
    assert noised_P.tolist() == [value + drawn for value, drawn in zip(values, noise, strict=True)]
    assert sum_P.tolist() == values
    assert noised_P.dtype == torch.int64


def test_sums_wrap_around_as_sums_modulo_two_to_the_32_do() -> None:
    largest = torch.full((64,), 2**63 - 1, dtype=torch.int64)
    noised_P = add_skellam(largest, variance=900, stream=stream_of("wrap"))
    noise = skellam_noise(64, variance=900, stream=stream_of("wrap"))
    assert [value % 2**32 for value in noised_P.tolist()] == [(2**63 - 1 + int(k)) % 2**32 for k in noise]


@pytest.mark.parametrize("wrong_P", [torch.zeros(3), torch.zeros(3, dtype=torch.int32), zeros(4).reshape(2, 2)])
def test_sum_of_another_form_is_refused(wrong_P: Tensor) -> None:
    with pytest.raises(ValueError, match="Expected an int64 vector"):
        add_skellam(wrong_P, variance=9, stream=stream_of())


@pytest.mark.gpu
def test_noise_on_a_gpu_is_the_noise_of_the_cpu() -> None:
    noised_P = add_skellam(zeros(5).cuda(), variance=900, stream=stream_of("gpu"))
    assert noised_P.is_cuda
    assert torch.equal(noised_P.cpu(), add_skellam(zeros(5), variance=900, stream=stream_of("gpu")))
