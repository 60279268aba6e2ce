"""Shares over GF(256): every subset of the threshold restores, fewer are independent of the secret."""

import itertools
import os
import time

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from privacy.randomness import RandomStream
from privacy.secure_aggregation.shamir import reconstruct, split


def vector(*values: int) -> NDArray[np.uint8]:
    return np.array(values, dtype=np.uint8)


def product(a: int, b: int) -> int:
    """Multiplication as FIPS 197, section 4.2, has it: shift, add, reduce."""
    total = 0
    for bit in range(8):
        if b >> bit & 1:
            total ^= a
        a = a << 1 ^ (0x11B if a & 0x80 else 0)
    return total


def inverse(a: int) -> int:
    return next(b for b in range(256) if product(a, b) == 1)


def value_at(coefficients: list[int], x: int) -> int:
    """Horner's rule, one byte."""
    total = 0
    for coefficient in reversed(coefficients):
        total = product(total, x) ^ coefficient
    return total


# --- The field ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("a", "b", "ab"),
    [
        pytest.param(0x57, 0x83, 0xC1, id="FIPS 197, section 4.2"),
        pytest.param(0x57, 0x13, 0xFE, id="FIPS 197, section 4.2.1"),
        pytest.param(0x53, 0xCA, 0x01, id="inverses"),
        pytest.param(0x00, 0x83, 0x00, id="zero"),
    ],
)
def test_field_is_the_one_of_aes(a: int, b: int, ab: int) -> None:
    # The share at b of the secret 0 under the line with slope a is their product.
    shares_NS = split(vector(0), threshold=2, points=[b, 1], random_bytes=lambda _: bytes([a]))
    assert shares_NS.tolist() == [[ab], [a]]


def test_every_product_agrees_with_shift_and_reduce() -> None:
    slopes = bytes(range(256))
    points = list(range(1, 256))
    shares_NS = split(np.zeros(256, np.uint8), threshold=2, points=points, random_bytes=lambda _: slopes)
    assert shares_NS.tolist() == [[product(slope, point) for slope in slopes] for point in points]


# --- Oracle and properties ---------------------------------------------------------------------------------


@given(st.data())
def test_shares_equal_horners_rule_byte_by_byte(data: st.DataObject) -> None:
    points = data.draw(st.lists(st.integers(1, 255), min_size=2, max_size=6, unique=True))
    threshold = data.draw(st.integers(2, len(points)))
    secrets = data.draw(st.binary(max_size=5))
    drawn = data.draw(st.binary(min_size=(threshold - 1) * len(secrets), max_size=(threshold - 1) * len(secrets)))
    shares_NS = split(
        np.frombuffer(secrets, np.uint8), threshold=threshold, points=points, random_bytes=lambda _: drawn
    )
    assert shares_NS.shape == (len(points), len(secrets))
    assert shares_NS.dtype == np.uint8
    assert shares_NS.flags.c_contiguous
    for point, share_S in zip(points, shares_NS, strict=True):
        expected = [value_at([secret, *drawn[i :: len(secrets)]], point) for i, secret in enumerate(secrets)]
        assert share_S.tolist() == expected


@given(st.dictionaries(st.integers(1, 255), st.integers(0, 255), min_size=1, max_size=5), st.integers(0, 255))
def test_reconstruction_equals_the_formula_of_lagrange(shares: dict[int, int], at: int) -> None:
    expected = 0
    for i, share in shares.items():
        for j in shares:
            if j != i:
                share = product(product(share, at ^ j), inverse(i ^ j))
        expected ^= share
    assert reconstruct({point: vector(share) for point, share in shares.items()}, at=at).tolist() == [expected]


@given(st.data())
def test_threshold_shares_give_the_secrets_and_every_share(data: st.DataObject) -> None:
    points = data.draw(st.lists(st.integers(1, 255), min_size=2, max_size=20, unique=True))
    threshold = data.draw(st.integers(2, len(points)))
    secrets_S = np.frombuffer(data.draw(st.binary(max_size=9)), dtype=np.uint8)
    stream = RandomStream.for_simulation(data.draw(st.integers(0, 2**32)))
    shares_NS = split(secrets_S, threshold=threshold, points=points, random_bytes=stream.bytes)
    chosen = data.draw(st.permutations(range(len(points))))[:threshold]
    shares = {points[index]: shares_NS[index] for index in chosen}
    assert reconstruct(shares).tolist() == secrets_S.tolist()
    for point, share_S in zip(points, shares_NS, strict=True):
        assert reconstruct(shares, at=point).tolist() == share_S.tolist()


@pytest.mark.parametrize("threshold", [2, 3, 4, 5])
def test_every_subset_of_the_threshold_restores_and_none_below_it_does(threshold: int) -> None:
    secrets_S = np.frombuffer(os.urandom(32), dtype=np.uint8)
    shares_NS = split(secrets_S, threshold=threshold, points=range(1, 6), random_bytes=os.urandom)
    for size in range(1, 6):
        for points in itertools.combinations(range(1, 6), size):
            restored_S = reconstruct({point: shares_NS[point - 1] for point in points})
            assert np.array_equal(restored_S, secrets_S) is (size >= threshold)


@pytest.mark.parametrize("point", [1, 2, 3])
def test_wrong_share_makes_every_byte_of_it_wrong(point: int) -> None:
    secrets_S = vector(1, 2, 3)
    shares_NS = split(secrets_S, threshold=3, points=[1, 2, 3], random_bytes=os.urandom)
    shares_NS[point - 1, 1] ^= 0x40
    restored_S = reconstruct(dict(zip([1, 2, 3], shares_NS, strict=True)))
    assert (restored_S != secrets_S).tolist() == [False, True, False]


# --- Secrecy -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("secret", [0, 1, 0xA7, 255])
def test_one_share_of_two_takes_every_value_once(secret: int) -> None:
    secrets_S = np.full(256, secret, dtype=np.uint8)
    shares_NS = split(secrets_S, threshold=2, points=[1, 7, 255], random_bytes=lambda _: bytes(range(256)))
    for share_S in shares_NS:
        assert sorted(share_S.tolist()) == list(range(256))


@pytest.mark.parametrize("secret", [0, 0xA7])
def test_two_shares_of_three_take_every_pair_of_values_once(secret: int) -> None:
    # All 2**16 polynomials of degree 2 at once: the pair of shares has the same distribution for every secret.
    every = np.indices((256, 256), dtype=np.uint8).reshape(2, -1)
    shares_NS = split(
        np.full(2**16, secret, dtype=np.uint8), threshold=3, points=[9, 1, 200], random_bytes=lambda _: every.tobytes()
    )
    for first, second in itertools.combinations(shares_NS.astype(int), 2):
        assert len(np.unique(256 * first + second)) == 2**16


def test_all_randomness_comes_from_the_caller_in_one_call() -> None:
    asked = []

    def random_bytes(count: int) -> bytes:
        asked.append(count)
        return bytes(range(count))

    first = split(vector(5, 6), threshold=4, points=[1, 2, 3, 4], random_bytes=random_bytes)
    assert asked == [6]
    assert np.array_equal(split(vector(5, 6), threshold=4, points=[1, 2, 3, 4], random_bytes=random_bytes), first)


# --- The tables of the docstrings --------------------------------------------------------------------------


def test_no_secrets_have_shares_of_no_bytes() -> None:
    shares_NS = split(vector(), threshold=2, points=[1, 2, 3], random_bytes=os.urandom)
    assert shares_NS.shape == (3, 0)
    assert reconstruct({1: shares_NS[0], 3: shares_NS[2]}).shape == (0,)


@pytest.mark.parametrize(
    ("threshold", "points", "message"),
    [
        (1, [1, 2], r"threshold within 2\.\.2, the number of points, got 1"),
        (3, [1, 2], r"threshold within 2\.\.2, the number of points, got 3"),
        (2, [0, 1], r"points within 1\.\.255, got \[0, 1\]"),
        (2, [1, 256], r"points within 1\.\.255, got \[1, 256\]"),
        (2, [4, 4], r"distinct points within 1\.\.255, got \[4, 4\]"),
        (2, [], r"threshold within 2\.\.0"),
    ],
)
def test_impossible_split_is_refused(threshold: int, points: list[int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        split(vector(1), threshold=threshold, points=points, random_bytes=os.urandom)


@pytest.mark.parametrize("count", [0, 3, 5])
def test_source_that_returns_another_number_of_bytes_is_refused(count: int) -> None:
    with pytest.raises(ValueError, match=f"Expected 4 random bytes, got {count}"):
        split(vector(1, 2), threshold=3, points=[1, 2, 3], random_bytes=lambda _: bytes(count))


@pytest.mark.parametrize("secrets", [np.zeros(2, np.int64), np.zeros((2, 2), np.uint8), np.zeros(2, np.int8)])
def test_secrets_must_be_a_vector_of_bytes(secrets: np.ndarray) -> None:
    with pytest.raises(ValueError, match="Expected secrets as a vector of uint8"):
        split(secrets, threshold=2, points=[1, 2], random_bytes=os.urandom)


@pytest.mark.parametrize(
    ("shares", "at", "message"),
    [
        ({}, 0, "got points \\[\\]"),
        ({0: vector(1)}, 0, "within 1..255, got points \\[0\\]"),
        ({256: vector(1)}, 0, "within 1..255, got points \\[256\\]"),
        ({1: vector(1)}, 256, "0..255 to evaluate at, got 256"),
        ({1: vector(1)}, -1, "0..255 to evaluate at, got -1"),
        ({1: vector(1), 2: vector(1, 2)}, 0, r"one length, got \[1, 2\]"),
        ({1: vector(1), 2: np.zeros(1)}, 0, "the share of point 2 as a vector of uint8, got float64"),
    ],
)
def test_impossible_reconstruction_is_refused(shares: dict[int, np.ndarray], at: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        reconstruct(shares, at=at)


def test_arguments_are_not_changed_and_results_are_not_views() -> None:
    secrets_S = vector(1, 2)
    shares_NS = split(secrets_S, threshold=2, points=[3, 4], random_bytes=os.urandom)
    kept = shares_NS.copy()
    for at in (0, 3):
        reconstruct({3: shares_NS[0], 4: shares_NS[1]}, at=at)[:] = 77
    assert np.array_equal(shares_NS, kept)
    assert secrets_S.tolist() == [1, 2]


def test_epoch_of_secrets_takes_milliseconds() -> None:
    # 128 sites, threshold 86, 32 rounds of two secrets: measured 4 ms and 0.4 ms; pure Python takes minutes.
    stream = RandomStream.for_simulation(1)
    secrets_S = np.frombuffer(stream.bytes(32 * 64), dtype=np.uint8)
    split(secrets_S, threshold=2, points=[1, 2], random_bytes=stream.bytes)
    start_s = time.process_time()
    shares_NS = split(secrets_S, threshold=86, points=range(1, 129), random_bytes=stream.bytes)
    split_s = time.process_time() - start_s
    start_s = time.process_time()
    restored_S = reconstruct(dict(zip(range(40, 126), shares_NS[39:125], strict=True)))
    reconstruct_s = time.process_time() - start_s
    assert np.array_equal(restored_S, secrets_S)
    assert split_s < 0.1
    assert reconstruct_s < 0.02
