"""The clipped sum: no patient moves it by more than C, wherever the micro-batches end."""

import math
from collections.abc import Sequence
from dataclasses import FrozenInstanceError, dataclass
from fractions import Fraction

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from medfed.errors import PrivacyError
from privacy.clipping import ClippedSum, PatientSum, clip_factor

# Legend: B samples, P flat adapter elements.

LARGEST_FLOAT32 = torch.finfo(torch.float32).max
SMALLEST_FLOAT32 = 2.0**-149


@dataclass
class Samples:
    """Samples of some patients, in patient order."""

    gradients_BP: Tensor
    patient_B: list[int]
    weight_B: list[float]

    def without(self, patient: int) -> "Samples":
        kept = [i for i, owner in enumerate(self.patient_B) if owner != patient]
        return Samples(self.gradients_BP[kept], [self.patient_B[i] for i in kept], [self.weight_B[i] for i in kept])


def samples_of(images: Sequence[int], num_parameters: int, *, scale: float = 1.0, seed: int = 0) -> Samples:
    """Random gradients of patients 0, 1, ... with so many images each."""
    generator = np.random.default_rng(seed)
    patient_B = [patient for patient, count in enumerate(images) for _ in range(count)]
    gradients = generator.normal(0, scale, (len(patient_B), num_parameters)).astype(np.float32)
    return Samples(torch.from_numpy(gradients), patient_B, [1 / images[patient] for patient in patient_B])


def clipped(samples: Samples, *, clip_norm: float = 1.0, sizes: Sequence[int] = ()) -> PatientSum:
    """The sum of ``samples``, cut into micro-batches of ``sizes`` and what is left."""
    total = ClippedSum(samples.gradients_BP.shape[1], clip_norm=clip_norm, device="cpu")
    start = 0
    for size in [*sizes, len(samples.patient_B)]:
        part = slice(start, start + size)
        total.add(samples.gradients_BP[part], samples.patient_B[part], samples.weight_B[part])
        start += size
    return total.close()


def exact_square(vector_P: Tensor) -> Fraction:
    """The squared L2 norm without any rounding."""
    return sum((Fraction(value) ** 2 for value in vector_P.tolist()), start=Fraction(0))


def one_patient(*gradients: list[float], clip_norm: float = 1.0) -> PatientSum:
    gradients_BP = torch.tensor(gradients, dtype=torch.float32)
    return clipped(
        Samples(gradients_BP, [0] * len(gradients), [1 / len(gradients)] * len(gradients)), clip_norm=clip_norm
    )


COHORTS = st.builds(
    samples_of,
    st.lists(st.integers(1, 5), max_size=6),
    st.sampled_from([1, 2, 7, 37]),
    scale=st.sampled_from([1e-3, 0.3, 1.0, 1e4]),
    seed=st.integers(0, 2**32 - 1),
)
SIZES = st.lists(st.integers(0, 6), max_size=12)
CLIP_NORMS = st.floats(1e-3, 1e3)


# --- Against a slow and obvious loop -----------------------------------------------------------------------


def loop(samples: Samples, clip_norm: float) -> tuple[list[float], int]:
    """Patient by patient, in plain Python: mean, clip, sum."""
    total = [0.0] * samples.gradients_BP.shape[1]
    num_clipped = 0
    for patient in sorted(set(samples.patient_B)):
        rows = [samples.gradients_BP[i].tolist() for i, owner in enumerate(samples.patient_B) if owner == patient]
        mean = [math.fsum(column) / len(rows) for column in zip(*rows, strict=True)]
        norm = math.sqrt(math.fsum(value * value for value in mean))
        num_clipped += norm > clip_norm
        total = [t + value * min(1.0, clip_norm / norm) for t, value in zip(total, mean, strict=True)]
    return total, num_clipped


@given(COHORTS, CLIP_NORMS, SIZES)
def test_sum_equals_the_loop_over_patients(samples: Samples, clip_norm: float, sizes: list[int]) -> None:
    result = clipped(samples, clip_norm=clip_norm, sizes=sizes)
    expected, num_clipped = loop(samples, clip_norm)
    # Relative to what was added up, which may cancel.
    assert result.sum_P.tolist() == pytest.approx(expected, rel=1e-12, abs=1e-12 * clip_norm)
    assert result.sum_P.dtype == torch.float64
    assert result.num_patients == len(set(samples.patient_B))
    assert result.num_clipped == num_clipped
    assert result.norm == pytest.approx(math.sqrt(math.fsum(value**2 for value in result.sum_P.tolist())), rel=1e-14)


# --- The guarantee -----------------------------------------------------------------------------------------


@settings(max_examples=200)
@given(COHORTS, CLIP_NORMS, SIZES)
def test_sum_is_the_same_to_the_bit_wherever_micro_batches_end(
    samples: Samples, clip_norm: float, sizes: list[int]
) -> None:
    whole, cut = clipped(samples, clip_norm=clip_norm), clipped(samples, clip_norm=clip_norm, sizes=sizes)
    assert whole.sum_P.tolist() == cut.sum_P.tolist()
    assert (whole.num_patients, whole.num_clipped, whole.norm) == (cut.num_patients, cut.num_clipped, cut.norm)


@pytest.mark.parametrize("size", [1, 2, 3, 5, 11])
def test_sum_of_long_gradients_is_the_same_to_the_bit(size: int) -> None:
    samples = samples_of([3, 1, 5, 2], 70_001)
    assert torch.equal(clipped(samples).sum_P, clipped(samples, sizes=[size] * (11 // size)).sum_P)


@given(COHORTS.filter(lambda samples: samples.patient_B), CLIP_NORMS, SIZES, st.integers(0, 5))
def test_adding_or_removing_one_patient_moves_the_sum_by_at_most_the_clip_norm(
    samples: Samples, clip_norm: float, sizes: list[int], number: int
) -> None:
    patient = samples.patient_B[-1] if number >= len(samples.patient_B) else samples.patient_B[number]
    with_patient = clipped(samples, clip_norm=clip_norm, sizes=sizes).sum_P
    without_patient = clipped(samples.without(patient), clip_norm=clip_norm).sum_P
    assert float(torch.linalg.vector_norm(with_patient - without_patient)) <= clip_norm * (1 + 6**2 * 2.0**-52)


@given(COHORTS, CLIP_NORMS, st.permutations(range(-3, 6)))
def test_sum_does_not_depend_on_what_patients_are_called(samples: Samples, clip_norm: float, names: list[int]) -> None:
    renamed = Samples(samples.gradients_BP, [names[patient] for patient in samples.patient_B], samples.weight_B)
    assert clipped(renamed, clip_norm=clip_norm).sum_P.tolist() == clipped(samples, clip_norm=clip_norm).sum_P.tolist()


@settings(max_examples=300)
@given(
    st.integers(0, 2**32 - 1),
    st.sampled_from([1, 2, 3, 50]),
    st.sampled_from([1e-30, 1e-3, 0.7, 1.0, 3.3, 1e30]),
    st.sampled_from([1e-44, 1e-20, 1.0, 1e30]),
)
def test_norm_of_one_patient_never_exceeds_the_clip_norm_in_exact_arithmetic(
    seed: int, num_parameters: int, clip_norm: float, scale: float
) -> None:
    result = clipped(samples_of([2], num_parameters, scale=scale, seed=seed), clip_norm=clip_norm)
    square = exact_square(result.sum_P)
    assert square <= Fraction(clip_norm) ** 2
    if result.num_clipped:
        assert square >= (Fraction(clip_norm) * (1 - Fraction(1, 10**12))) ** 2


@pytest.mark.parametrize("value", [1.0, 0.1, 1e30])
def test_norm_of_a_long_gradient_never_exceeds_the_clip_norm_in_exact_arithmetic(value: float) -> None:
    result = clipped(Samples(torch.full((1, 100_003), value), [0], [1.0]))
    values_P, counts = result.sum_P.unique(return_counts=True)
    square = sum(count * Fraction(value) ** 2 for value, count in zip(values_P.tolist(), counts.tolist(), strict=True))
    assert 1 - 1e-9 < square <= 1


# --- The factor --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("norm", "expected"),
    [
        pytest.param(0.0, 1.0, id="zero"),
        pytest.param(5e-324, 1.0, id="smallest number"),
        pytest.param(0.5, 1.0, id="within"),
        pytest.param(1 - 2**-33, 1.0, id="just within"),
        pytest.param(1.0, 1 - 2**-33, id="at the clip norm"),
        pytest.param(4.0, 0.25 * (1 - 2**-33), id="above"),
        pytest.param(1e300, (1 - 2**-33) / 1e300, id="far above"),
    ],
)
def test_factor_leaves_room_for_every_rounding(norm: float, expected: float) -> None:
    # (P + 16) * 2**-53 is 2**-33 for this P.
    assert clip_factor(norm, clip_norm=1.0, num_parameters=2**20 - 16) == expected


def test_factor_grows_with_the_clip_norm() -> None:
    assert clip_factor(4.0, clip_norm=3.0, num_parameters=2**20 - 16) == 3.0 * (1 - 2**-33) / 4.0
    assert clip_factor(4.0, clip_norm=5.0, num_parameters=2**20 - 16) == 1.0


@pytest.mark.parametrize("norm", [math.nan, math.inf])
def test_factor_of_no_finite_norm_is_refused(norm: float) -> None:
    with pytest.raises(PrivacyError, match="finite norm"):
        clip_factor(norm, clip_norm=1.0, num_parameters=3)


# --- Patients ----------------------------------------------------------------------------------------------


def test_patient_cut_over_three_micro_batches_is_clipped_once() -> None:
    # Clipped chunk by chunk, this patient would move the sum by 3 C.
    gradients_BP = torch.tensor([[9.0, 0.0]] * 6)
    for weight in (1 / 6, 1.0):
        result = clipped(Samples(gradients_BP, [0] * 6, [weight] * 6), sizes=[2, 2, 2])
        assert result.sum_P.tolist() == pytest.approx([1.0, 0.0])
        assert (result.num_patients, result.num_clipped) == (1, 1)


def test_images_are_averaged_before_they_are_clipped() -> None:
    # Clipped image by image, the large one would no longer cancel.
    result = one_patient([100.0, 0.0], [-99.0, 0.0], [0.5, 0.0])
    assert result.sum_P.tolist() == pytest.approx([0.5, 0.0])
    assert result.num_clipped == 0
    cancelled = clipped(Samples(torch.tensor([[8.0], [-8.0]]), [0, 0], [0.5, 0.5]), sizes=[1])
    assert (cancelled.sum_P.tolist(), cancelled.num_clipped) == ([0.0], 0)


def test_patient_with_many_images_counts_as_much_as_one_with_a_single_image() -> None:
    many = samples_of([500], 5, scale=100.0, seed=1)
    alone = clipped(many, sizes=[7] * 70)
    assert alone.norm == pytest.approx(1.0)
    assert (alone.num_patients, alone.num_clipped) == (1, 1)
    unweighted = clipped(Samples(many.gradients_BP, many.patient_B, [1.0] * 500), sizes=[7] * 70)
    assert unweighted.sum_P.tolist() == pytest.approx(alone.sum_P.tolist())


def test_weights_are_the_shares_of_a_mean() -> None:
    result = clipped(Samples(torch.tensor([[0.4], [0.8]]), [0, 0], [0.75, 0.25]))
    assert result.sum_P.tolist() == pytest.approx([0.5])


def test_patients_do_not_leak_into_each_other() -> None:
    gradients_BP = torch.tensor([[3.0, 0.0], [0.0, 0.25], [0.0, -8.0]])
    result = clipped(Samples(gradients_BP, [0, 1, 2], [1.0] * 3), clip_norm=2.0, sizes=[1, 1])
    assert result.sum_P.tolist() == pytest.approx([2.0, -1.75])
    assert (result.num_patients, result.num_clipped) == (3, 2)
    assert result.norm == pytest.approx(math.hypot(2.0, 1.75))


def test_patient_may_continue_but_not_come_back() -> None:
    continued = ClippedSum(1, clip_norm=1.0, device="cpu")
    continued.add(torch.ones(2, 1), [4, 0], [1.0, 0.5])
    continued.add(torch.ones(2, 1), [0, 7], [0.5, 1.0])
    assert continued.close().num_patients == 3


@pytest.mark.parametrize(
    "batches",
    [
        pytest.param([[0, 1, 0]], id="in one micro-batch"),
        pytest.param([[0, 0, 1, 0]], id="after two samples of one patient"),
        pytest.param([[0], [0, 1, 0]], id="after a sample that continues the last micro-batch"),
        pytest.param([[0, 1], [0]], id="in the next"),
        pytest.param([[0], [1], [0]], id="first and last"),
        pytest.param([[0], [1], [2, 2, 3], [4, 1]], id="in the middle"),
    ],
)
def test_patient_who_comes_back_is_refused(batches: list[list[int]]) -> None:
    total = ClippedSum(1, clip_norm=1.0, device="cpu")
    for batch in batches[:-1]:
        total.add(torch.ones(len(batch), 1), batch, [1.0] * len(batch))
    with pytest.raises(PrivacyError, match="sort the batch by patient"):
        total.add(torch.ones(len(batches[-1]), 1), batches[-1], [1.0] * len(batches[-1]))


def test_patients_may_be_given_as_arrays_and_tensors() -> None:
    for patient_B in (np.array([3, 3, 5]), torch.tensor([3, 3, 5])):
        total = ClippedSum(1, clip_norm=1.0, device="cpu")
        total.add(torch.ones(3, 1), patient_B, np.array([0.5, 0.5, 1.0]))
        result = total.close()
        assert (result.num_patients, result.sum_P.tolist()) == (2, pytest.approx([2.0]))


def test_patients_that_are_no_integers_are_refused() -> None:
    with pytest.raises(TypeError):
        ClippedSum(1, clip_norm=1.0, device="cpu").add(torch.ones(2, 1), [1.2, 1.7], [1.0, 1.0])


# --- Edges -------------------------------------------------------------------------------------------------


def test_no_patient_gives_a_sum_of_zeros() -> None:
    nothing = ClippedSum(4, clip_norm=1.0, device="cpu").close()
    empty = clipped(samples_of([], 4), sizes=[0, 0])
    for result in (nothing, empty):
        assert result.sum_P.tolist() == [0.0] * 4
        assert (result.num_patients, result.num_clipped, result.norm) == (0, 0, 0.0)


def test_gradient_of_zeros_counts_and_is_not_clipped() -> None:
    result = one_patient([0.0, 0.0, -0.0])
    assert result.sum_P.tolist() == [0.0] * 3
    assert (result.num_patients, result.num_clipped) == (1, 0)


@pytest.mark.parametrize("huge", [1e30, -1e30, LARGEST_FLOAT32])
@pytest.mark.parametrize("clip_norm", [1e-30, 1.0, 1e30])
def test_huge_gradient_is_clipped_like_any_other(huge: float, clip_norm: float) -> None:
    result = one_patient([huge, huge], [0.0, 1.0], clip_norm=clip_norm)
    assert result.norm == pytest.approx(min(clip_norm, abs(huge) / math.sqrt(2)), rel=1e-7)
    assert exact_square(result.sum_P) <= Fraction(clip_norm) ** 2


def test_smallest_gradient_is_kept_and_not_rounded_to_zero() -> None:
    result = one_patient([SMALLEST_FLOAT32, 0.0], [0.0, 0.0])
    assert result.sum_P.tolist() == [SMALLEST_FLOAT32 / 2, 0.0]
    assert result.norm == SMALLEST_FLOAT32 / 2


def test_small_patients_are_not_lost_beside_large_ones() -> None:
    gradients_BP = torch.tensor([[1.0]] + [[1e-12]] * 1000)
    result = clipped(Samples(gradients_BP, list(range(1001)), [1.0] * 1001))
    assert result.sum_P.item() - 1.0 == pytest.approx(1e-9, rel=1e-3)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("sizes", [(), (1,), (2, 1), (1, 1, 1, 1)])
@pytest.mark.parametrize("place", [(0, 0), (2, 2), (4, 4)])
def test_patient_with_a_gradient_that_is_not_finite_adds_zeros_and_touches_nobody(
    bad: float, sizes: tuple[int, ...], place: tuple[int, int]
) -> None:
    """Whether the patient is there must not be told by a refusal: the adapter may be chosen to make it overflow."""
    samples = Samples(torch.rand(5, 5), [3, 3, 7, 7, 9], [0.5, 0.5, 0.5, 0.5, 1.0])
    samples.gradients_BP[place] = bad
    patient = samples.patient_B[place[0]]
    result, without = clipped(samples, sizes=sizes), clipped(samples.without(patient))
    assert torch.equal(result.sum_P, without.sum_P)
    assert (result.num_patients, result.num_unusable) == (3, 1)
    assert (without.num_patients, without.num_unusable, without.unusable_in) == (2, 0, "")
    assert result.num_clipped == without.num_clipped
    assert result.unusable_in == f"element {place[1]}"


def test_tensor_in_which_a_gradient_is_not_finite_has_its_name() -> None:
    total = ClippedSum(3, clip_norm=1.0, device="cpu", names=["a", "decoder.q", "b"].__getitem__)
    total.add(torch.tensor([[0.0, math.nan, 0.0], [math.inf, 0.0, 0.0]]), [1, 2], [1.0, 1.0])
    result = total.close()
    assert (result.num_unusable, result.unusable_in) == (2, "decoder.q")
    assert not bool(result.sum_P.any())


def test_refused_micro_batch_closes_the_sum_for_good() -> None:
    refused: list[tuple[Tensor, list[int], list[float]]] = [
        (torch.ones(2, 2), [1, 0], [1.0, 1.0]),
        (torch.ones(1, 3), [1], [1.0]),
        (torch.ones(1, 2), [1], [2.0]),
    ]
    for micro_batch in refused:
        total = ClippedSum(2, clip_norm=1.0, device="cpu")
        total.add(torch.ones(1, 2), [0], [1.0])
        with pytest.raises((PrivacyError, ValueError)):
            total.add(*micro_batch)
        with pytest.raises(PrivacyError, match="refused a micro-batch"):
            total.add(torch.ones(1, 2), [2], [1.0])
        with pytest.raises(PrivacyError, match="refused a micro-batch"):
            total.close()


def test_closed_sum_cannot_be_used_again() -> None:
    total = ClippedSum(1, clip_norm=1.0, device="cpu")
    total.close()
    with pytest.raises(PrivacyError, match="Expected an open sum"):
        total.close()
    with pytest.raises(PrivacyError, match="Expected an open sum"):
        total.add(torch.ones(1, 1), [0], [1.0])


def test_gradients_are_left_as_they_are_and_build_no_graph() -> None:
    gradients_BP = torch.full((2, 3), 5.0, requires_grad=True)
    result = clipped(Samples(gradients_BP, [0, 1], [1.0, 1.0]))
    assert torch.equal(gradients_BP.detach(), torch.full((2, 3), 5.0))
    assert not result.sum_P.requires_grad


@pytest.mark.parametrize(
    ("gradients_BP", "weight_B", "says"),
    [
        (torch.ones(2, 4), [1.0, 1.0], r"shape \[2, 3\], got torch.float32 of shape \[2, 4\]"),
        (torch.ones(3, 3), [1.0, 1.0], r"shape \[2, 3\], got torch.float32 of shape \[3, 3\]"),
        (torch.ones(6), [1.0, 1.0], r"got torch.float32 of shape \[6\]"),
        (torch.ones(2, 3, dtype=torch.float64), [1.0, 1.0], "Expected float32 gradients"),
        (torch.ones(2, 3, dtype=torch.float16), [1.0, 1.0], "Expected float32 gradients"),
        (torch.ones(2, 3, device="meta"), [1.0, 1.0], "Expected gradients on cpu, got meta"),
        (torch.ones(2, 3), [1.0], "one weight per sample, got 1 for 2 samples"),
        (torch.ones(2, 3), [1.0] * 3, "one weight per sample, got 3 for 2 samples"),
        (torch.ones(2, 3), [1.0, 0.0], r"weights in \(0, 1\], got 0.0"),
        (torch.ones(2, 3), [-1.0, 1.0], r"weights in \(0, 1\], got -1.0"),
        (torch.ones(2, 3), [1.0, 1.0 + 2**-52], r"weights in \(0, 1\]"),
        (torch.ones(2, 3), [math.nan, 1.0], r"weights in \(0, 1\], got nan"),
    ],
)
def test_micro_batch_of_another_form_is_refused(gradients_BP: Tensor, weight_B: list[float], says: str) -> None:
    with pytest.raises(ValueError, match=says):
        ClippedSum(3, clip_norm=1.0, device="cpu").add(gradients_BP, [0, 1], weight_B)


@pytest.mark.parametrize("clip_norm", [0.0, -1.0, 9e-31, 1.1e30, math.inf, math.nan])
def test_clip_norm_out_of_range_is_refused(clip_norm: float) -> None:
    with pytest.raises(PrivacyError, match=r"Expected a clip_norm within 1e-30\.\.1e\+30, got"):
        ClippedSum(3, clip_norm=clip_norm, device="cpu")


@pytest.mark.parametrize("num_parameters", [0, -1])
def test_sum_over_no_parameters_is_refused(num_parameters: int) -> None:
    with pytest.raises(ValueError, match=f"num_parameters >= 1, got {num_parameters}"):
        ClippedSum(num_parameters, clip_norm=1.0, device="cpu")


def test_result_shows_no_number_of_a_patient() -> None:
    assert not any(digits in repr(one_patient([0.125, 0.75])) for digits in ("125", "num_patients", "tensor"))


def test_result_cannot_be_changed_and_equals_itself_only() -> None:
    result = one_patient([0.5, 0.5])
    with pytest.raises(FrozenInstanceError):
        result.num_patients = 2  # type: ignore[misc]
    assert result == result
    assert result != one_patient([0.5, 0.5])


@pytest.mark.gpu
def test_sum_on_a_gpu_equals_that_of_the_cpu() -> None:
    samples = samples_of([3, 1, 5, 2], 70_001)
    total = ClippedSum(70_001, clip_norm=1.0, device="cuda")
    total.add(samples.gradients_BP.cuda(), samples.patient_B, samples.weight_B)
    result = total.close()
    assert result.sum_P.is_cuda
    assert torch.allclose(result.sum_P.cpu(), clipped(samples).sum_P, rtol=1e-12, atol=1e-15)
