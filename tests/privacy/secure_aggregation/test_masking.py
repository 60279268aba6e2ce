"""Masks: known answers, an oracle word by word, exact cancellation, and values that look uniform."""

from collections.abc import Callable

import numpy as np
import pytest
from cryptography.hazmat.primitives.ciphers import Cipher, CipherContext, algorithms, modes
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray
from scipy import stats

from privacy.secure_aggregation import masking
from privacy.secure_aggregation.masking import add_mask

ACCEPT = 1e-3  # a fixed keystream cannot fail by chance; the level says how wrong a mask may be and pass
REJECT = 1e-9

CHUNK_WORDS = 32_768  # of 4 bytes, in 128 KiB
DTYPES = [np.uint32, np.uint64]


@pytest.fixture(params=[masking._in_counter_mode, masking._in_gcm], ids=["counter mode", "GCM"])
def either_way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """One of the two ways to make the keystream, whichever is faster here."""
    monkeypatch.setattr(masking, "_fastest", lambda: request.param)


def key_of(number: int) -> bytes:
    return number.to_bytes(32, "big")


def mask_of(key: bytes, size: int, dtype: type = np.uint32) -> NDArray[np.uint32]:
    total_P = np.zeros(size, dtype=dtype)
    add_mask(total_P, key)
    return total_P


def words_one_by_one(key: bytes, size: int, word_bytes: int) -> list[int]:
    """The mask by encrypting one counter after the other, without a counter mode."""
    encryptor = Cipher(algorithms.AES256(key), modes.ECB()).encryptor()
    blocks = -(-size * word_bytes // 16)
    keystream = b"".join(encryptor.update(counter.to_bytes(16, "big")) for counter in range(2, 2 + blocks))
    return [int.from_bytes(keystream[i * word_bytes :][:word_bytes], "little") for i in range(size)]


# --- Known answers and oracle ------------------------------------------------------------------------------


@pytest.mark.usefixtures("either_way")
def test_mask_of_the_zero_key_is_known() -> None:
    # The ciphertext of zeros under the zero key: test case 14 of GCM, and the counter mode that goes on from there
    # (McGrew and Viega, "The Galois/Counter Mode of Operation", appendix B); words have their lowest byte first.
    assert mask_of(bytes(32), 4).astype("<u4").tobytes().hex() == "cea7403d4d606b6e074ec5d3baf39d18"
    assert [f"{word:08x}" for word in mask_of(bytes(32), 4)] == ["3d40a7ce", "6e6b604d", "d3c54e07", "189df3ba"]
    assert [f"{word:016x}" for word in mask_of(bytes(32), 2, np.uint64)] == ["6e6b604d3d40a7ce", "189df3bad3c54e07"]


@pytest.mark.usefixtures("either_way")
@pytest.mark.parametrize(
    ("key", "keystream"),
    [
        (bytes(range(32)), "0ebcb5deb52c83bd08a8a935182c9199d24356532881602f809eb383c5ff5d56"),
        (key_of(1), "59976dafc8624bcf50214183c21d8df10c3182efd8ec45b905edf0dbd465a407"),
    ],
)
def test_mask_is_the_keystream_that_openssl_prints(key: bytes, keystream: str) -> None:
    # head -c 32 /dev/zero | openssl enc -aes-256-ctr -K <key> -iv 00000000000000000000000000000002 | xxd -p -c 64
    assert mask_of(key, 8).astype("<u4").tobytes().hex() == keystream
    assert mask_of(key, 4, np.uint64).astype("<u8").tobytes().hex() == keystream


@pytest.mark.parametrize("way", [masking._in_counter_mode, masking._in_gcm])
@pytest.mark.parametrize("dtype", DTYPES)
@given(key=st.binary(min_size=32, max_size=32), size=st.integers(0, 40))
def test_mask_equals_the_keystream_word_by_word(
    way: Callable[[bytes], CipherContext], dtype: type, key: bytes, size: int
) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(masking, "_fastest", lambda: way)
        assert mask_of(key, size, dtype).tolist() == words_one_by_one(key, size, np.dtype(dtype).itemsize)


@pytest.mark.usefixtures("either_way")
@pytest.mark.parametrize("size", [CHUNK_WORDS - 1, CHUNK_WORDS, CHUNK_WORDS + 1, 3 * CHUNK_WORDS + 5])
def test_mask_does_not_depend_on_how_it_is_cut(size: int) -> None:
    start = (2).to_bytes(16, "big")
    whole = Cipher(algorithms.AES256(key_of(5)), modes.CTR(start)).encryptor().update(bytes(8 * size))
    assert np.array_equal(mask_of(key_of(5), size), np.frombuffer(whole[: 4 * size], dtype="<u4"))
    assert np.array_equal(mask_of(key_of(5), size, np.uint64), np.frombuffer(whole, dtype="<u8"))


def test_prefix_of_a_mask_is_the_mask_of_a_prefix() -> None:
    long_P = mask_of(key_of(6), CHUNK_WORDS + 40)
    for size in (0, 1, 31, CHUNK_WORDS, CHUNK_WORDS + 3):
        assert np.array_equal(mask_of(key_of(6), size), long_P[:size])


@pytest.mark.parametrize("faster", [masking._in_counter_mode, masking._in_gcm])
def test_faster_way_is_taken_and_found_once(monkeypatch: pytest.MonkeyPatch, faster: object) -> None:
    tried = []

    def chunk_s(way: object) -> float:
        tried.append(way)
        return 0.5 if way is faster else 1.0

    monkeypatch.setattr(masking, "_chunk_s", chunk_s)
    masking._fastest.cache_clear()
    assert masking._fastest() is masking._fastest() is faster
    assert len(tried) == len(set(tried)) == 2
    masking._fastest.cache_clear()


# --- Sums --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
@given(st.data())
def test_adding_and_taking_away_a_mask_changes_nothing(dtype: type, data: st.DataObject) -> None:
    values = data.draw(st.lists(st.integers(0, int(np.iinfo(dtype).max)), max_size=20))
    key = data.draw(st.binary(min_size=32, max_size=32))
    total_P = np.array(values, dtype=dtype)
    first_negative = data.draw(st.booleans())
    add_mask(total_P, key, negative=first_negative)
    modulus = int(np.iinfo(dtype).max) + 1
    sign = -1 if first_negative else 1
    words = words_one_by_one(key, len(values), np.dtype(dtype).itemsize)
    assert total_P.tolist() == [(value + sign * word) % modulus for value, word in zip(values, words, strict=True)]
    add_mask(total_P, key, negative=not first_negative)
    assert total_P.tolist() == values


def test_masks_of_all_pairs_cancel_in_the_sum() -> None:
    num_sites, size = 6, 1000
    plain_NP = np.random.default_rng(0).integers(0, 2**32, (num_sites, size), dtype=np.uint32)
    masked_NP = plain_NP.copy()
    for i in range(num_sites):
        for j in range(num_sites):
            if i != j:
                add_mask(masked_NP[i], key_of(100 * min(i, j) + max(i, j)), negative=i > j)
        assert not (masked_NP[i] == plain_NP[i]).any()
    assert np.array_equal(masked_NP.sum(axis=0, dtype=np.uint32), plain_NP.sum(axis=0, dtype=np.uint32))


# --- Uniformity --------------------------------------------------------------------------------------------


def byte_pvalues(masked_P: NDArray[np.uint32]) -> list[float]:
    """For each byte of the words, how likely counts that uneven are."""
    bytes_P4 = masked_P.view(np.uint8).reshape(-1, 4)
    return [float(stats.chisquare(np.bincount(bytes_P, minlength=256)).pvalue) for bytes_P in bytes_P4.T]


@pytest.mark.parametrize("plain", [0, 1, 2**31, 2**32 - 1])
def test_masked_vector_is_uniform_whatever_the_vector_is(plain: int) -> None:
    total_P = np.full(2**17, plain, dtype=np.uint32)
    add_mask(total_P, key_of(plain + 1))
    assert min(byte_pvalues(total_P)) > ACCEPT
    neighbours_P = (total_P[1:] >> 28).astype(int) * 16 + (total_P[:-1] >> 28)
    assert stats.chisquare(np.bincount(neighbours_P, minlength=256)).pvalue > ACCEPT


@pytest.mark.parametrize("spoil", [np.uint32(0xFFFFFFFE), np.uint32(0x7FFFFFFF), np.uint32(0xFFFEFFFF)])
def test_uniformity_test_notices_one_missing_bit(spoil: np.uint32) -> None:
    assert min(byte_pvalues(mask_of(key_of(9), 2**17) & spoil)) < REJECT


def test_uniformity_test_notices_a_modulus_that_is_one_short() -> None:
    # randint(0, range - 1) leaves out one value; over a byte that is 1/256 of the mass.
    short_P = np.random.default_rng(0).integers(0, 255, 4 * 2**17, dtype=np.uint8).view(np.uint32)
    assert min(byte_pvalues(short_P)) < REJECT


def test_keys_that_differ_in_one_bit_have_unrelated_masks() -> None:
    first_P = mask_of(key_of(0), 2**15)
    for bit in (0, 100, 255):
        differing_P = first_P ^ mask_of(key_of(1 << bit), 2**15)
        ones = int(np.unpackbits(differing_P.view(np.uint8)).sum())
        assert stats.binomtest(ones, 32 * 2**15).pvalue > ACCEPT


# --- The table of the docstring ----------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [np.int32, np.int64, np.uint16, np.float32, ">u4", ">u8"])
def test_other_dtypes_are_refused(dtype: str | type) -> None:
    with pytest.raises(ValueError, match="Expected a vector of native uint32 or uint64, got"):
        add_mask(np.zeros(4, dtype=dtype), bytes(32))


def read_only() -> NDArray[np.uint32]:
    total_P = np.zeros(4, dtype=np.uint32)
    total_P.flags.writeable = False
    return total_P


@pytest.mark.parametrize(
    "total", [np.zeros(8, np.uint32)[::2], np.zeros((2, 4), np.uint32), read_only()], ids=["strided", "matrix", "fixed"]
)
def test_what_cannot_be_changed_in_place_is_refused(total: NDArray[np.uint32]) -> None:
    with pytest.raises(ValueError, match="Expected a contiguous, writeable vector"):
        add_mask(total, bytes(32))
    assert not total.any()


@pytest.mark.parametrize("size", [0, 16, 31, 33])
def test_key_of_another_length_is_refused(size: int) -> None:
    total_P = np.zeros(4, dtype=np.uint32)
    with pytest.raises(ValueError, match=f"Expected a key of 32 bytes, got {size}"):
        add_mask(total_P, bytes(size))
    assert not total_P.any()


def test_vector_longer_than_a_keystream_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    assert masking.LONGEST_BYTES == 16 * (2**32 - 2)
    monkeypatch.setattr(masking, "LONGEST_BYTES", 16)
    add_mask(np.zeros(4, dtype=np.uint32), bytes(32))
    total_P = np.zeros(5, dtype=np.uint32)
    with pytest.raises(ValueError, match="Expected at most 16 bytes, got 20"):
        add_mask(total_P, bytes(32))
    assert not total_P.any()
