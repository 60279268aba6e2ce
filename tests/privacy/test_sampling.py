"""Poisson sampling of patients: exactly the coin that the accountant assumes, and images without replacement."""

import math
from collections import Counter
from fractions import Fraction
from itertools import combinations, product

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from medfed.errors import PrivacyError
from privacy.randomness import RandomStream
from privacy.sampling import draw_images, draw_patients

ACCEPT = 1e-3
REJECT = 1e-9
PATIENTS, RATE, STEPS = 50, 0.02, 20_000
RATES = st.floats(0, 1, exclude_min=True)


def stream_of(*context: str | int) -> RandomStream:
    return RandomStream.for_simulation(11, *context)


class ScriptedStream(RandomStream):
    """A stream whose next integers, or choices, are given; bounds that were asked for are kept."""

    def __init__(self, *words: int) -> None:
        super().__init__(bytes(32))
        self.words = list(words)
        self.bounds: list[int] = []

    def uint64(self, n: int) -> np.ndarray:
        drawn, self.words = self.words[:n], self.words[n:]
        assert len(drawn) == n
        return np.array(drawn, dtype=np.uint64)

    def below(self, bound: int, n: int) -> np.ndarray:
        self.bounds.append(bound)
        return self.uint64(n).astype(np.int64)


# --- Patients ----------------------------------------------------------------------------------------------


@given(RATES, st.lists(st.integers(0, 2**64 - 1), max_size=12))
def test_draw_equals_one_exact_comparison_per_patient(rate: float, words: list[int]) -> None:
    threshold = math.floor(Fraction(rate) * 2**64)
    expected = [patient for patient, word in enumerate(words) if word < threshold]
    drawn = draw_patients(len(words), rate, ScriptedStream(*words))
    assert drawn.tolist() == expected
    assert drawn.dtype == np.int64


@given(RATES)
def test_probability_is_the_rate_rounded_down_and_never_more(rate: float) -> None:
    threshold = math.floor(Fraction(rate) * 2**64)
    # The integers 0..threshold-1 draw a patient and no other does: a share of at most the rate.
    assert Fraction(threshold, 2**64) <= Fraction(rate) < Fraction(threshold + 1, 2**64)
    edge = [word for word in (threshold - 1, threshold) if 0 <= word < 2**64]
    drawn = draw_patients(len(edge), rate, ScriptedStream(*edge))
    assert [edge[i] for i in drawn] == [word for word in edge if word < threshold]


def test_rate_one_draws_everyone_always() -> None:
    assert draw_patients(3, 1.0, ScriptedStream(0, 2**63, 2**64 - 1)).tolist() == [0, 1, 2]
    assert draw_patients(500, 1, stream_of("all")).tolist() == list(range(500))


@pytest.mark.parametrize("rate", [2.0**-65, 5e-324])
def test_rate_below_the_resolution_draws_nobody(rate: float) -> None:
    assert draw_patients(2, rate, ScriptedStream(0, 1)).tolist() == []


def test_cohort_without_patients_gives_an_empty_draw() -> None:
    drawn = draw_patients(0, 0.5, stream_of())
    assert drawn.shape == (0,)
    assert drawn.dtype == np.int64


@pytest.mark.parametrize("rate", [0.0, -0.1, 1.0 + 2**-52, 2.0, math.nan, math.inf])
def test_rate_that_is_no_probability_is_refused(rate: float) -> None:
    with pytest.raises(PrivacyError, match="Expected 0 < sampling_rate <= 1, got"):
        draw_patients(3, rate, stream_of())


def test_negative_number_of_patients_is_refused() -> None:
    with pytest.raises(ValueError, match="got -1"):
        draw_patients(-1, 0.5, stream_of())


@pytest.mark.parametrize("rate", [1e-30, 0.3, 1.0])
def test_every_patient_uses_eight_bytes_whatever_the_rate(rate: float) -> None:
    stream = stream_of("use")
    draw_patients(5, rate, stream)
    assert stream.bytes(4) == stream_of("use").bytes(44)[40:]


@pytest.fixture(scope="module")
def drawn() -> np.ndarray:
    """Whether each patient took part in each of many steps of one stream."""
    stream = stream_of("steps")
    took_part = np.zeros((STEPS, PATIENTS), dtype=bool)
    for step in range(STEPS):
        took_part[step, draw_patients(PATIENTS, RATE, stream)] = True
    return took_part


def test_patients_are_drawn_at_the_rate_and_not_at_four_fifths_or_five_fourths(drawn: np.ndarray) -> None:
    total = int(drawn.sum())
    assert stats.binomtest(total, drawn.size, RATE).pvalue > ACCEPT
    for wrong in (0.8 * RATE, 1.25 * RATE):
        assert stats.binomtest(total, drawn.size, wrong).pvalue < REJECT


def test_every_patient_has_the_same_rate(drawn: np.ndarray) -> None:
    assert stats.chisquare(drawn.sum(axis=0)).pvalue > ACCEPT


def test_number_of_patients_is_binomial_and_not_fixed(drawn: np.ndarray) -> None:
    last = 6
    counts = np.bincount(np.minimum(drawn.sum(axis=1), last), minlength=last + 1)
    law = stats.binom(PATIENTS, RATE)
    expected = STEPS * np.array([*(law.pmf(k) for k in range(last)), law.sf(last - 1)])
    assert stats.chisquare(counts, expected).pvalue > ACCEPT
    assert counts[1] < STEPS  # round(n * q) patients in every step would be another mechanism


def test_empty_steps_occur_as_often_as_they_should(drawn: np.ndarray) -> None:
    empty = int((drawn.sum(axis=1) == 0).sum())
    assert stats.binomtest(empty, STEPS, (1 - RATE) ** PATIENTS).pvalue > ACCEPT
    assert 0.34 < empty / STEPS < 0.39


def test_patients_are_drawn_independently_of_each_other_and_of_the_step_before(drawn: np.ndarray) -> None:
    limit = 5 / math.sqrt(STEPS)
    together = np.corrcoef(drawn.T) - np.eye(PATIENTS)
    assert np.abs(together).max() < limit
    for patient in range(PATIENTS):
        assert abs(np.corrcoef(drawn[1:, patient], drawn[:-1, patient])[0, 1]) < limit


# --- Images ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("count", "limit"), [(2, 1), (4, 1), (5, 2), (4, 3), (6, 3)])
def test_every_subset_of_images_comes_from_equally_many_choices(count: int, limit: int) -> None:
    subsets: Counter[tuple[int, ...]] = Counter()
    for choices in product(*(range(count - i) for i in range(limit))):
        stream = ScriptedStream(*choices)
        subsets[tuple(draw_images(count, limit, stream).tolist())] += 1
        assert stream.bounds == [count - i for i in range(limit)]
    assert set(subsets) == set(combinations(range(count), limit))
    assert set(subsets.values()) == {math.factorial(limit)}


@given(st.integers(0, 40), st.integers(1, 45))
def test_images_are_distinct_sorted_and_at_most_the_limit(count: int, limit: int) -> None:
    images = draw_images(count, limit, stream_of(count, limit))
    assert images.dtype == np.int64
    assert len(images) == min(count, limit)
    assert images.tolist() == sorted(set(images.tolist()))
    assert all(0 <= image < count for image in images.tolist())


@pytest.mark.parametrize(("count", "limit"), [(0, 1), (1, 1), (3, 3), (3, 9)])
def test_patient_within_the_limit_gives_all_images_and_uses_no_randomness(count: int, limit: int) -> None:
    stream = ScriptedStream()
    assert draw_images(count, limit, stream).tolist() == list(range(count))
    assert stream.bounds == []


def test_images_are_drawn_afresh_and_evenly() -> None:
    stream = stream_of("images")
    counts = Counter(tuple(draw_images(5, 2, stream).tolist()) for _ in range(5000))
    assert stats.chisquare([counts[pair] for pair in combinations(range(5), 2)]).pvalue > ACCEPT


@pytest.mark.parametrize("limit", [0, -1])
def test_limit_below_one_image_is_refused(limit: int) -> None:
    with pytest.raises(PrivacyError, match=f"at least 1 image per patient, got {limit}"):
        draw_images(3, limit, stream_of())


def test_negative_count_of_images_is_refused() -> None:
    with pytest.raises(ValueError, match="got -1"):
        draw_images(-1, 2, stream_of())
