"""The integer sum: no patient moves it by more than D2, in exact arithmetic; rounding is right on average."""

import math
from collections.abc import Sequence

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from medfed.errors import PrivacyError
from privacy.clipping import ClippedSum, PatientSum
from privacy.integer_clipping import IntegerClippedSum, rounded_within
from privacy.randomness import RandomStream

# Legend: B samples, P flat adapter elements.

Samples = tuple[torch.Tensor, list[int], list[float]]
LARGEST_FLOAT32 = torch.finfo(torch.float32).max


def stream_of(*context: str | int) -> RandomStream:
    return RandomStream.for_simulation(19, *context)


def samples_of(images: Sequence[int], num_parameters: int, *, scale: float = 1.0, seed: int = 0) -> Samples:
    """Random gradients of patients 0, 1, ... with so many images each."""
    patient_B = [patient for patient, count in enumerate(images) for _ in range(count)]
    gradients = np.random.default_rng(seed).normal(0, scale, (len(patient_B), num_parameters)).astype(np.float32)
    return torch.from_numpy(gradients), patient_B, [1 / images[patient] for patient in patient_B]


def clipped(
    samples: Samples, *, l2_bound: int, clip_norm: float = 1.0, sizes: Sequence[int] = (), seed: int = 0
) -> PatientSum:
    """The sum of ``samples``, cut into micro-batches of ``sizes`` and what is left."""
    gradients_BP, patient_B, weight_B = samples
    total = IntegerClippedSum(
        gradients_BP.shape[1], clip_norm=clip_norm, l2_bound=l2_bound, stream=stream_of(seed), device="cpu"
    )
    start = 0
    for size in [*sizes, len(patient_B)]:
        part = slice(start, start + size)
        total.add(gradients_BP[part], patient_B[part], weight_B[part])
        start += size
    return total.close()


def only(samples: Samples, keep: Sequence[int]) -> Samples:
    rows = [row for row, patient in enumerate(samples[1]) if patient in keep]
    return samples[0][rows], [samples[1][row] for row in rows], [samples[2][row] for row in rows]


def square(values: Sequence[int]) -> int:
    return sum(value * value for value in values)


COHORTS = st.builds(
    samples_of,
    st.lists(st.integers(1, 4), min_size=1, max_size=5),
    st.sampled_from([1, 2, 7, 37]),
    scale=st.sampled_from([1e-3, 0.3, 1.0, 1e4]),
    seed=st.integers(0, 2**32 - 1),
)
SIZES = st.lists(st.integers(0, 6), max_size=8)
CLIP_NORMS = st.floats(1e-3, 1e3)
BOUNDS = st.sampled_from([7, 8, 100, 6068, 2**16, 2**30])


# --- Against a slow and obvious loop -------------------------------------------------------------------------


def rounded_loop(vector: Sequence[float], l2_bound: int, stream: RandomStream) -> list[int]:
    """Element by element, in Python integers; for vectors that are not longer than the bound."""
    scale = 1.0
    while True:
        rounded = []
        for value, word in zip(vector, stream.uint64(len(vector)).tolist(), strict=True):
            fraction, whole = math.modf(abs(value * scale))
            rounded.append(int(math.copysign(int(whole) + (word < int(fraction * 2**64)), value)))
        if square(rounded) <= l2_bound**2:
            return rounded
        scale *= 0.995


@given(COHORTS, CLIP_NORMS, BOUNDS, st.integers(0, 99))
def test_sum_equals_the_loop_over_patients(samples: Samples, clip_norm: float, l2_bound: int, seed: int) -> None:
    result = clipped(samples, clip_norm=clip_norm, l2_bound=l2_bound, seed=seed)
    stream, expected = stream_of(seed), [0] * samples[0].shape[1]
    num_patients = len(set(samples[1]))
    for patient in range(num_patients):
        alone = ClippedSum(len(expected), clip_norm=clip_norm, device="cpu")
        alone.add(*only(samples, [patient]))
        scaled_P = alone.close().sum_P * (l2_bound / clip_norm)
        rounded = rounded_loop(scaled_P.tolist(), l2_bound, stream)
        expected = [total + value for total, value in zip(expected, rounded, strict=True)]
    assert result.sum_P.tolist() == expected
    assert result.sum_P.dtype == torch.int64
    assert result.num_patients == num_patients
    assert result.norm == pytest.approx(math.sqrt(square(expected)), rel=1e-14)


# --- The guarantee -------------------------------------------------------------------------------------------


@settings(max_examples=200)
@given(COHORTS, CLIP_NORMS, BOUNDS, SIZES)
def test_sum_is_the_same_wherever_micro_batches_end(
    samples: Samples, clip_norm: float, l2_bound: int, sizes: list[int]
) -> None:
    whole = clipped(samples, clip_norm=clip_norm, l2_bound=l2_bound)
    cut = clipped(samples, clip_norm=clip_norm, l2_bound=l2_bound, sizes=sizes)
    assert whole.sum_P.tolist() == cut.sum_P.tolist()
    assert (whole.num_patients, whole.num_clipped, whole.norm) == (cut.num_patients, cut.num_clipped, cut.norm)


@settings(max_examples=200)
@given(COHORTS, CLIP_NORMS, BOUNDS, SIZES, st.integers(0, 99))
def test_one_patient_more_moves_the_sum_by_at_most_the_bound_exactly(
    samples: Samples, clip_norm: float, l2_bound: int, sizes: list[int], seed: int
) -> None:
    # The patient comes last, so that all others are rounded by the same bits with and without.
    others = only(samples, range(max(samples[1])))
    with_patient = clipped(samples, clip_norm=clip_norm, l2_bound=l2_bound, sizes=sizes, seed=seed).sum_P.tolist()
    without = clipped(others, clip_norm=clip_norm, l2_bound=l2_bound, seed=seed).sum_P.tolist()
    assert square([a - b for a, b in zip(with_patient, without, strict=True)]) <= l2_bound**2


@settings(max_examples=300)
@given(
    st.lists(st.floats(-1e6, 1e6, width=32), min_size=1, max_size=60),
    st.integers(8, 2**30),
    st.integers(0, 99),
)
def test_no_vector_becomes_longer_than_the_bound(values: list[float], l2_bound: int, seed: int) -> None:
    rounded = rounded_within(np.array(values), l2_bound=l2_bound, stream=stream_of(seed)).tolist()
    assert square(rounded) <= l2_bound**2
    if max(map(abs, values)) * len(values) < l2_bound / 2:  # then nothing is shrunk
        assert all(abs(a - b) < 1 for a, b in zip(rounded, values, strict=True))


@pytest.mark.parametrize(("num_parameters", "l2_bound"), [(50_000, 6068), (50_000, 1145), (200_003, 448)])
def test_long_gradient_nearly_reaches_the_bound_and_does_not_pass_it(num_parameters: int, l2_bound: int) -> None:
    result = clipped(samples_of([1], num_parameters, scale=10.0), l2_bound=l2_bound)
    assert 0.98 * l2_bound**2 < square(result.sum_P.tolist()) <= l2_bound**2
    assert (result.num_patients, result.num_clipped) == (1, 1)


def test_clipping_keeps_the_direction() -> None:
    samples = samples_of([1], 5000, scale=10.0)
    result = clipped(samples, l2_bound=6068)
    direction = samples[0][0].double() / torch.linalg.vector_norm(samples[0][0].double())
    assert float(result.sum_P.double() @ direction) > 0.99 * 6068


# --- Rounding ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("value", [0.0, 0.25, -0.25, 3.7, -12.999, 41.0, 1e-3])
def test_rounding_is_right_on_average_and_never_off_by_one(value: float) -> None:
    n = 40_000
    rounded = rounded_within(np.full(n, value), l2_bound=2**30, stream=stream_of("mean"))
    assert set(rounded.tolist()) <= {math.floor(value), math.floor(value) + 1}
    fraction = value - math.floor(value)
    assert abs(rounded.mean() - value) <= 4 * math.sqrt(fraction * (1 - fraction) / n)


def test_elements_are_rounded_independently() -> None:
    up = rounded_within(np.full(40_000, 0.5), l2_bound=2**30, stream=stream_of("independent"))
    for lag in (1, 2, 20_000):
        assert abs(np.corrcoef(up[:-lag], up[lag:])[0, 1]) < 4 / math.sqrt(len(up) - lag)


def test_integers_within_the_bound_are_kept() -> None:
    vector = np.array([3.0, -4.0, 0.0, -0.0])
    assert rounded_within(vector, l2_bound=5, stream=stream_of()).tolist() == [3, -4, 0, 0]
    shorter = rounded_within(vector, l2_bound=4, stream=stream_of()).tolist()
    assert square(shorter) <= 16


@pytest.mark.parametrize("huge", [1e30, 1e300, 2.0**53 * 2**10])
def test_longer_vector_is_scaled_to_the_bound_without_overflow(huge: float) -> None:
    rounded = rounded_within(np.full(1000, huge), l2_bound=2**30, stream=stream_of("huge")).tolist()
    assert 0.98 * 2**60 < square(rounded) <= 2**60


@pytest.mark.parametrize("tiny", [5e-324, -5e-324, -1e-31, 1e-31])
def test_smallest_numbers_are_rounded_to_zero_and_not_away(tiny: float) -> None:
    assert not rounded_within(np.full(1000, tiny), l2_bound=9, stream=stream_of("tiny")).any()


def test_vector_is_left_as_it_is() -> None:
    vector = np.full(9, 1e9)
    rounded_within(vector, l2_bound=100, stream=stream_of())
    assert vector.tolist() == [1e9] * 9


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_vector_that_is_not_finite_is_refused(bad: float) -> None:
    with pytest.raises(PrivacyError, match="Expected a finite gradient to round"):
        rounded_within(np.array([0.0, bad]), l2_bound=9, stream=stream_of())


# --- Edges ---------------------------------------------------------------------------------------------------


def test_no_patient_gives_a_sum_of_zeros() -> None:
    result = clipped(samples_of([], 4), l2_bound=9, sizes=[0, 0])
    assert result.sum_P.tolist() == [0] * 4
    assert result.sum_P.dtype == torch.int64
    assert (result.num_patients, result.num_clipped, result.norm) == (0, 0, 0.0)


def test_gradient_of_zeros_counts_and_is_not_clipped() -> None:
    result = clipped((torch.zeros(2, 3), [0, 1], [1.0, 1.0]), l2_bound=9)
    assert result.sum_P.tolist() == [0] * 3
    assert (result.num_patients, result.num_clipped) == (2, 0)


@pytest.mark.parametrize("huge", [1e30, -1e30, LARGEST_FLOAT32])
@pytest.mark.parametrize("clip_norm", [1e-30, 1.0, 1e30])
@pytest.mark.parametrize("num_parameters", [1, 5])
def test_huge_gradient_is_clipped_like_any_other(huge: float, clip_norm: float, num_parameters: int) -> None:
    result = clipped((torch.full((1, num_parameters), huge), [0], [1.0]), clip_norm=clip_norm, l2_bound=1000)
    assert 0.97 * 1000**2 < square(result.sum_P.tolist()) <= 1000**2


@pytest.mark.parametrize("l2_bound", [1, 2, 1000])
def test_sum_of_one_element(l2_bound: int) -> None:
    samples = (torch.tensor([[5.0], [-0.5], [5.0]]), [0, 1, 2], [1.0] * 3)
    (value,) = clipped(samples, l2_bound=l2_bound).sum_P.tolist()
    assert abs(value - 1.5 * l2_bound) <= 0.02 * l2_bound + 2
    assert clipped(samples, l2_bound=l2_bound).num_clipped == 2


def test_patient_cut_over_three_micro_batches_is_clipped_once() -> None:
    result = clipped((torch.tensor([[9.0, 0.0]] * 6), [0] * 6, [1.0] * 6), l2_bound=1000, sizes=[2, 2, 2])
    assert square(result.sum_P.tolist()) <= 1000**2
    assert result.num_patients == 1


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_patient_with_a_gradient_that_is_not_finite_adds_zeros(bad: float) -> None:
    gradients_BP = torch.ones(2, 3)
    gradients_BP[1, 2] = bad
    total = IntegerClippedSum(
        3,
        clip_norm=1.0,
        l2_bound=9,
        stream=stream_of(),
        device="cpu",
        names=["a", "b", "decoder.q"].__getitem__,
    )
    total.add(gradients_BP[1:], [1], [1.0])
    alone = total.close()
    assert not bool(alone.sum_P.any())
    assert (alone.num_patients, alone.num_unusable, alone.unusable_in) == (1, 1, "decoder.q")


def test_patient_who_comes_back_is_refused() -> None:
    with pytest.raises(PrivacyError, match="sort the batch by patient"):
        clipped((torch.ones(3, 2), [0, 1, 0], [1.0] * 3), l2_bound=9)


@pytest.mark.parametrize("l2_bound", [0, -1, 2**30 + 1, 9.0, True, None])
def test_bound_out_of_range_is_refused(l2_bound: int) -> None:
    message = r"Expected l2_bound as an integer within 1\.\.2\*\*30"
    with pytest.raises(PrivacyError, match=message):
        IntegerClippedSum(1, clip_norm=1.0, l2_bound=l2_bound, stream=stream_of(), device="cpu")
    with pytest.raises(PrivacyError, match=message):
        rounded_within(np.ones(1), l2_bound=l2_bound, stream=stream_of())


def test_bound_that_rounding_would_fill_is_refused() -> None:
    with pytest.raises(PrivacyError, match=r"Expected l2_bound >= sqrt\(P\) = 10.0, got 9; rounding 100 elements"):
        IntegerClippedSum(100, clip_norm=1.0, l2_bound=9, stream=stream_of(), device="cpu")
    # As little as may be: a gradient is shrunk visibly, and still most of it arrives.
    assert square(clipped(samples_of([1], 10_000), l2_bound=100).sum_P.tolist()) > 0.8 * 100**2


@pytest.mark.parametrize("clip_norm", [0.0, math.nan, 1.1e30])
def test_clip_norm_out_of_range_is_refused(clip_norm: float) -> None:
    with pytest.raises(PrivacyError, match="Expected a clip_norm within"):
        IntegerClippedSum(3, clip_norm=clip_norm, l2_bound=9, stream=stream_of(), device="cpu")


@pytest.mark.gpu
def test_sum_of_gradients_on_a_gpu_is_that_of_the_cpu() -> None:
    samples = samples_of([3, 1, 2], 501)
    total = IntegerClippedSum(501, clip_norm=1.0, l2_bound=6068, stream=stream_of(0), device="cuda")
    total.add(samples[0].cuda(), samples[1], samples[2])
    result = total.close()
    assert not result.sum_P.is_cuda
    expected = clipped(samples, l2_bound=6068).sum_P
    assert int((result.sum_P - expected).abs().max()) <= 1  # float64 norms on a GPU may differ in their last bits
