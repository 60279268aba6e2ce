"""Fixed point: sums decode within the bound, none wraps, and a parameter set for which one could is refused."""

import dataclasses
import math
from fractions import Fraction

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from medfed.errors import SecureAggregationError
from privacy.secure_aggregation.encoding import FixedPoint, bounded, from_ring, integer_ring

clip_norms = st.floats(1e-30, 1e30)


@st.composite
def fixed_points(draw: st.DrawFn) -> FixedPoint:
    """A parameter set that is valid, with any number of summands that it allows."""
    ring_bits = draw(st.sampled_from([32, 64]))
    value_bits = draw(st.integers(2, ring_bits - 2))
    most = max(1, 2 ** (ring_bits - 1) // (2 ** (value_bits - 1) + 1) - 1)
    return FixedPoint(draw(clip_norms), draw(st.integers(1, most)), ring_bits, value_bits)


@st.composite
def cohorts(draw: st.DrawFn) -> tuple[FixedPoint, list[NDArray[np.floating]]]:
    """Vectors of up to six sites, some of them longer than the clip norm."""
    fixed = draw(fixed_points())
    num_sites = draw(st.integers(1, min(6, fixed.num_summands)))
    size = draw(st.integers(0, 5))
    dtype = draw(st.sampled_from([np.float64, np.float32] if 1e-20 < fixed.clip_norm < 1e20 else [np.float64]))
    element = st.floats(-2.0, 2.0)
    vectors = [draw(st.lists(element, min_size=size, max_size=size)) for _ in range(num_sites)]
    return fixed, [np.array(vector, dtype=np.float64).astype(dtype) * dtype(fixed.clip_norm) for vector in vectors]


def ring_sum(encoded: list[np.ndarray]) -> np.ndarray:
    return np.sum(encoded, axis=0, dtype=encoded[0].dtype)


def exact_norm_squared(vector_P: NDArray[np.float64]) -> Fraction:
    return sum((Fraction(float(x)) ** 2 for x in vector_P), Fraction(0))


# --- Sums of vectors ---------------------------------------------------------------------------------------


@given(cohorts())
def test_decoded_sum_of_encodings_is_the_sum_within_the_bound(case: tuple[FixedPoint, list[np.ndarray]]) -> None:
    fixed, vectors = case
    total_P = ring_sum([fixed.encode(vector_P) for vector_P in vectors])
    assert total_P.dtype == fixed.dtype
    decoded_P = fixed.decode(total_P, num_summands=len(vectors))
    assert decoded_P.dtype == np.float64
    bound = Fraction(fixed.quantisation_bound(len(vectors)))
    columns = zip(*(bounded(vector_P, fixed.clip_norm)[0].tolist() for vector_P in vectors), strict=True)
    for decoded, column in zip(decoded_P.tolist(), columns, strict=True):
        assert abs(Fraction(decoded) - sum(map(Fraction, column))) <= bound


@given(fixed_points(), st.lists(st.floats(-1.0, 1.0), max_size=5))
def test_encoding_equals_exact_rounding_element_by_element(fixed: FixedPoint, values: list[float]) -> None:
    vector_P = np.array(values) * (fixed.clip_norm / 4)
    scaled_P, was_scaled = bounded(vector_P, fixed.clip_norm)
    assert not was_scaled
    # Python rounds a Fraction to the nearest integer, a half to the even one.
    units = [round(Fraction(float(x)) * Fraction(2) ** fixed.fraction_bits) for x in scaled_P]
    assert fixed.encode(vector_P).tolist() == [unit % 2**fixed.ring_bits for unit in units]


@pytest.mark.parametrize("sign", [1.0, -1.0])
@pytest.mark.parametrize(
    "fixed",
    [
        FixedPoint(1.0, 255),
        FixedPoint(0.75, 341),
        FixedPoint(3.0, 1, value_bits=32),
        FixedPoint(1.0, 2**40 - 2**17, ring_bits=64),
        FixedPoint(1e-30, 100),
        FixedPoint(1e30, 100),
    ],
    ids=repr,
)
def test_no_sum_wraps_at_the_bound(fixed: FixedPoint, sign: float) -> None:
    # Every site at the clip norm in the same element: the largest sum there is.
    encoded_P = fixed.encode(np.array([sign * 9 * fixed.clip_norm, 0.0]))
    total_P = encoded_P * encoded_P.dtype.type(fixed.num_summands)
    decoded_P = fixed.decode(total_P, num_summands=fixed.num_summands)
    assert decoded_P.tolist() == [pytest.approx(sign * fixed.num_summands * fixed.clip_norm, rel=1e-6), 0.0]


def test_encoding_is_deterministic_and_does_not_depend_on_its_chunks() -> None:
    vector_P = np.random.default_rng(0).normal(size=70_000).astype(np.float32)
    fixed = FixedPoint(300.0, 10)
    whole_P = fixed.encode(vector_P)
    assert np.array_equal(whole_P, fixed.encode(vector_P.copy()))
    pieces = [fixed.encode(vector_P[start : start + 999]) for start in range(0, 70_000, 999)]
    assert np.array_equal(whole_P, np.concatenate(pieces))


def test_tensor_and_array_have_one_encoding() -> None:
    vector_P = torch.tensor([0.5, -0.25, 1e-4], requires_grad=True)
    fixed = FixedPoint(1.0, 3)
    assert np.array_equal(fixed.encode(vector_P), fixed.encode(vector_P.detach().numpy()))
    assert np.array_equal(fixed.encode(vector_P), fixed.encode(vector_P.double()))


def test_24_bits_keep_deltas_that_an_eight_bit_range_would_lose() -> None:
    # An adapter delta of norm 0.01 over 100 000 elements: 3e-5 each, beside a clip norm of 1.
    delta_P = np.random.default_rng(1).normal(scale=3e-5, size=100_000)
    fixed = FixedPoint(1.0, 32)
    error_P = fixed.decode(fixed.encode(delta_P), num_summands=1) - delta_P
    assert np.abs(error_P).max() <= fixed.quantisation_bound(1) == 2.0**-24
    assert np.linalg.norm(error_P) < 2e-3 * np.linalg.norm(delta_P)


# --- Vectors that are too long -----------------------------------------------------------------------------


@given(clip_norms, st.lists(st.floats(-1e60, 1e60), max_size=6))
def test_bounded_norm_is_at_most_the_clip_norm_in_exact_arithmetic(clip_norm: float, values: list[float]) -> None:
    vector_P = np.array(values, dtype=np.float64)
    scaled_P, was_scaled = bounded(vector_P, clip_norm)
    assert exact_norm_squared(scaled_P) <= Fraction(clip_norm) ** 2
    if was_scaled:
        assert math.sqrt(exact_norm_squared(scaled_P)) == pytest.approx(clip_norm, rel=1e-12)
    else:
        assert np.array_equal(scaled_P, vector_P)


@given(fixed_points(), st.floats(1.01, 1e6))
def test_oversized_vector_is_scaled_down_and_keeps_its_direction(fixed: FixedPoint, excess: float) -> None:
    direction_P = np.array([0.6, -0.8, 0.0])
    scaled_P, was_scaled = bounded(direction_P * fixed.clip_norm * excess, fixed.clip_norm)
    assert was_scaled
    assert scaled_P == pytest.approx(direction_P * fixed.clip_norm, rel=1e-12)
    decoded_P = fixed.decode(fixed.encode(direction_P * fixed.clip_norm * excess), num_summands=1)
    assert np.abs(decoded_P - scaled_P).max() <= fixed.quantisation_bound(1)


def test_vector_within_the_bound_is_not_changed() -> None:
    vector_P = np.array([0.6, 0.7], dtype=np.float32)
    scaled_P, was_scaled = bounded(vector_P, 1.0)
    assert (scaled_P.tolist(), was_scaled) == (vector_P.astype(np.float64).tolist(), False)
    assert scaled_P.dtype == np.float64


# --- The table of FixedPoint -------------------------------------------------------------------------------


@pytest.mark.parametrize("values", [[], [0.0, -0.0, 0.0]])
def test_nothing_and_zeros_are_encoded_as_they_are(values: list[float]) -> None:
    fixed = FixedPoint(1.0, 4)
    encoded_P = fixed.encode(np.array(values))
    assert encoded_P.tolist() == [0] * len(values)
    assert fixed.decode(encoded_P, num_summands=4).tolist() == [0.0] * len(values)


def test_half_a_unit_goes_to_the_even_neighbour() -> None:
    unit = 2.0**-23
    encoded_P = FixedPoint(1.0, 4).encode(np.array([0.5, 1.5, 2.5, -0.5, -1.5, -2.5]) * unit)
    assert encoded_P.view(np.int32).tolist() == [0, 2, 2, 0, -2, -2]


@pytest.mark.parametrize("wrong", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_nan_and_infinity_are_refused_with_the_name_of_the_tensor(wrong: float, dtype: type) -> None:
    vector_P = np.zeros(40_000, dtype=dtype)
    vector_P[[35_001, 35_002]] = wrong
    with pytest.raises(SecureAggregationError, match="NaN or infinity in 'lora.35001'"):
        FixedPoint(1.0, 4).encode(vector_P, names=lambda element: f"lora.{element}")
    with pytest.raises(SecureAggregationError, match="NaN or infinity in element 35001"):
        bounded(torch.from_numpy(vector_P), 1.0)


def test_norm_that_float64_cannot_hold_is_refused() -> None:
    with pytest.raises(SecureAggregationError, match="squares float64 can add up"):
        FixedPoint(1.0, 4).encode(np.array([1e200, 1.0]))
    assert FixedPoint(1.0, 4).encode(np.array([3e38, 0.0], dtype=np.float32)).tolist() == [2**23, 0]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.int32])
def test_other_dtypes_and_shapes_are_refused(dtype: torch.dtype) -> None:
    if dtype != torch.bfloat16:
        with pytest.raises(ValueError, match="Expected a float32 or float64 vector"):
            FixedPoint(1.0, 4).encode(torch.zeros(3, dtype=dtype))
    with pytest.raises(ValueError, match="Expected a float32 or float64 vector"):
        FixedPoint(1.0, 4).encode(np.zeros((2, 2)))


# --- Construction ------------------------------------------------------------------------------------------


@given(st.sampled_from([32, 64]), st.data())
def test_construction_accepts_up_to_the_bound_and_refuses_one_more(ring_bits: int, data: st.DataObject) -> None:
    value_bits = data.draw(st.integers(2, ring_bits))
    clip_norm = data.draw(clip_norms)
    # The oracle looks for the fraction bits one by one.
    fraction_bits = next(
        bits for bits in range(200, -200, -1) if Fraction(clip_norm) * Fraction(2) ** bits <= 2 ** (value_bits - 1)
    )
    worst = Fraction(clip_norm) * Fraction(2) ** fraction_bits + 1
    most = math.ceil(2 ** (ring_bits - 1) / worst) - 1
    assert most * worst < 2 ** (ring_bits - 1) <= (most + 1) * worst
    if most >= 1:
        assert FixedPoint(clip_norm, most, ring_bits, value_bits).fraction_bits == fraction_bits
    with pytest.raises(SecureAggregationError, match="so that no sum wraps") as refused:
        FixedPoint(clip_norm, most + 1, ring_bits, value_bits)
    assert (f"num_summands <= {most}" in str(refused.value)) is (most >= 1)


def test_refusal_has_the_inequality_the_numbers_and_the_nearest_valid_values() -> None:
    with pytest.raises(SecureAggregationError) as refused:
        FixedPoint(1.0, 256)
    assert str(refused.value) == (
        "Expected num_summands * (clip_norm * 2**fraction_bits + 1) < 2**(ring_bits - 1), so that no sum wraps, got "
        "256 * (1.0 * 2**23 + 1) = 2147483904, not below 2147483648; use num_summands <= 255 or value_bits <= 23 or "
        "ring_bits 64."
    )
    for valid in ({"num_summands": 255}, {"value_bits": 23}, {"ring_bits": 64}):
        FixedPoint(**{"clip_norm": 1.0, "num_summands": 256, **valid})


def test_refusal_names_no_value_that_is_invalid_too() -> None:
    with pytest.raises(SecureAggregationError) as refused:
        FixedPoint(1.0, 2**62, ring_bits=64)
    assert str(refused.value).endswith("use num_summands <= 1099511496704.")
    FixedPoint(1.0, 1099511496704, ring_bits=64)


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("clip_norm", 0.0, "clip_norm within"),
        ("clip_norm", -1.0, "clip_norm within"),
        ("clip_norm", math.nan, "clip_norm within"),
        ("clip_norm", math.inf, "clip_norm within"),
        ("num_summands", 0, "num_summands >= 1, got 0"),
        ("ring_bits", 16, "ring_bits 32 or 64, got 16"),
        ("value_bits", 1, r"value_bits within 2\.\.32, got 1"),
        ("value_bits", 33, r"value_bits within 2\.\.32, got 33"),
    ],
)
def test_field_out_of_range_is_refused(field: str, value: float, message: str) -> None:
    with pytest.raises(SecureAggregationError, match=message):
        dataclasses.replace(FixedPoint(1.0, 4), **{field: value})


# --- Decoding ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("num_summands", [0, 5, -1])
def test_sum_of_more_vectors_than_planned_is_refused(num_summands: int) -> None:
    fixed = FixedPoint(1.0, 4)
    with pytest.raises(SecureAggregationError, match=rf"sum of 1\.\.4 vectors, got {num_summands}"):
        fixed.decode(np.zeros(2, np.uint32), num_summands=num_summands)
    with pytest.raises(SecureAggregationError, match=rf"sum of 1\.\.4 vectors, got {num_summands}"):
        fixed.quantisation_bound(num_summands)


@pytest.mark.parametrize("sign", [1, -1])
@pytest.mark.parametrize("num_summands", [1, 3])
def test_sum_beyond_what_its_vectors_can_make_is_refused(num_summands: int, sign: int) -> None:
    fixed = FixedPoint(1.0, 4)
    worst = num_summands * (2**23 + 1)
    assert fixed.decode(np.array([sign * worst % 2**32], np.uint32), num_summands=num_summands).item() == pytest.approx(
        sign * num_summands, abs=1e-6
    )
    with pytest.raises(SecureAggregationError, match=f"Expected integers within -{worst}..{worst}"):
        fixed.decode(np.array([0, sign * (worst + 1) % 2**32], np.uint32), num_summands=num_summands)


def test_sum_that_still_has_a_mask_is_refused() -> None:
    masked_P = np.random.default_rng(0).integers(0, 2**32, 1000, dtype=np.uint32)
    with pytest.raises(SecureAggregationError, match="masks are left"):
        FixedPoint(1.0, 10).decode(masked_P, num_summands=10)


@pytest.mark.parametrize("dtype", [np.uint64, np.int32, np.float64])
def test_sum_of_another_ring_is_refused(dtype: type) -> None:
    with pytest.raises(ValueError, match="Expected a sum of dtype uint32"):
        FixedPoint(1.0, 4).decode(np.zeros(2, dtype=dtype), num_summands=1)


# --- Integers ----------------------------------------------------------------------------------------------


@given(st.sampled_from([32, 64]), st.data())
def test_integers_come_back_from_the_ring(ring_bits: int, data: st.DataObject) -> None:
    limit = data.draw(st.integers(0, 2 ** (ring_bits - 1) - 1))
    values = data.draw(st.lists(st.integers(-limit, limit), max_size=8))
    ring_P = integer_ring(np.array(values, dtype=np.int64), limit=limit, ring_bits=ring_bits)
    assert ring_P.dtype.itemsize * 8 == ring_bits
    assert ring_P.tolist() == [value % 2**ring_bits for value in values]
    back_P = from_ring(ring_P, limit=limit)
    assert back_P.dtype == np.int64
    assert back_P.tolist() == values


@given(st.lists(st.lists(st.integers(-(2**28), 2**28), min_size=3, max_size=3), min_size=1, max_size=7))
def test_sum_in_the_ring_is_the_sum_of_the_integers(rows: list[list[int]]) -> None:
    total_P = ring_sum([integer_ring(np.array(row, dtype=np.int64), limit=2**28) for row in rows])
    assert from_ring(total_P, limit=7 * 2**28).tolist() == [sum(column) for column in zip(*rows, strict=True)]


@pytest.mark.parametrize("value", [-11, 11, 2**40, -(2**63), 2**63 - 1])
def test_integer_beyond_its_limit_is_refused(value: int) -> None:
    with pytest.raises(SecureAggregationError, match=r"Expected integers within -10\.\.10"):
        integer_ring(np.array([1, value], dtype=np.int64), limit=10)
    if abs(value) < 2**31:
        with pytest.raises(SecureAggregationError, match=r"Expected integers within -10\.\.10"):
            from_ring(np.array([1, value % 2**32], dtype=np.uint32), limit=10)


@pytest.mark.parametrize("bits", [32, 64])
def test_most_negative_integer_is_beyond_every_limit(bits: int) -> None:
    lowest_P = np.array([2 ** (bits - 1)], dtype=f"uint{bits}")
    with pytest.raises(SecureAggregationError, match=f"got -{2 ** (bits - 1)}"):
        from_ring(lowest_P, limit=2 ** (bits - 1) - 1)


@pytest.mark.parametrize(("limit", "ring_bits"), [(2**31, 32), (-1, 32), (2**63, 64), (1, 16)])
def test_limit_that_the_ring_does_not_have_is_refused(limit: int, ring_bits: int) -> None:
    with pytest.raises(ValueError, match="Expected a limit within"):
        integer_ring(np.zeros(1, np.int64), limit=limit, ring_bits=ring_bits)


@pytest.mark.parametrize("wrong", [np.zeros(2, np.int32), np.zeros(2), np.zeros((2, 2), np.int64)])
def test_integers_must_be_an_int64_vector(wrong: np.ndarray) -> None:
    with pytest.raises(ValueError, match="Expected an int64 vector"):
        integer_ring(wrong, limit=1)


@pytest.mark.parametrize("wrong", [np.zeros(2, np.int32), np.zeros(2, np.uint8), np.zeros((2, 2), np.uint32)])
def test_ring_elements_must_be_an_unsigned_vector(wrong: np.ndarray) -> None:
    with pytest.raises(ValueError, match="Expected a uint32 or uint64 vector"):
        from_ring(wrong, limit=1)


def test_arguments_are_not_changed_and_results_are_not_views() -> None:
    values_P = np.array([1, -2], dtype=np.int64)
    ring_P = integer_ring(values_P, limit=5, ring_bits=64)
    from_ring(ring_P, limit=5)[:] = 9
    ring_P[:] = 7
    assert values_P.tolist() == [1, -2]
