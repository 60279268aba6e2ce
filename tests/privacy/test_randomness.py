"""The keystream: known answers, no byte twice, no two streams alike, and numbers with the right distribution."""

import copy
import math
import os
import pickle
import random
from collections.abc import Callable

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from medfed.errors import PrivacyError
from privacy.randomness import LARGEST_NORMAL, RandomStream

# A test on a fixed stream cannot fail by chance; the level says how wrong a stream may be and pass.
ACCEPT = 1e-3
REJECT = 1e-9


def stream_of(*context: str | int) -> RandomStream:
    return RandomStream.for_simulation(7, *context)


class ScriptedStream(RandomStream):
    """A stream whose next integers are given."""

    def __init__(self, *words: int) -> None:
        super().__init__(bytes(32))
        self.words = list(words)

    def uint64(self, n: int) -> np.ndarray:
        drawn, self.words = self.words[:n], self.words[n:]
        assert len(drawn) == n
        return np.array(drawn, dtype=np.uint64)


# --- The keystream -----------------------------------------------------------------------------------------


def test_keystream_is_aes_256_in_counter_mode() -> None:
    # E(0, counter) for counter 0, 1, 2 under the zero key: the hash key of GCM and its test cases 13 and 14
    # (McGrew and Viega, "The Galois/Counter Mode of Operation", appendix B).
    known = "dc95c078a2408989ad48a21492842087530f8afbc74536b9a963b4f1c4cb738bcea7403d4d606b6e074ec5d3baf39d18"
    assert RandomStream(bytes(32)).bytes(48).hex() == known


def test_simulation_stream_keeps_its_golden_bytes() -> None:
    assert RandomStream.for_simulation(1, "golden", 2).bytes(16).hex() == "4df69c953ae19cb601c1f2ce6ea022b7"


@given(st.lists(st.integers(0, 70), max_size=8))
def test_pieces_are_the_whole(sizes: list[int]) -> None:
    whole, pieces = stream_of("pieces"), stream_of("pieces")
    assert b"".join(pieces.bytes(size) for size in sizes) == whole.bytes(sum(sizes))


def test_no_byte_is_used_twice_by_the_different_kinds_of_numbers() -> None:
    raw, stream = stream_of("kinds").bytes(200), stream_of("kinds")
    assert stream.bytes(3) == raw[:3]
    assert stream.uint64(2).tolist() == [int.from_bytes(raw[i : i + 8], "little") for i in (3, 11)]
    stream.normal(3)  # two pairs, of two integers each
    assert stream.bytes(5) == raw[51:56]
    stream.below(4, 3)  # a divisor of 2**64: nothing is drawn again
    assert stream.bytes(2) == raw[80:82]
    assert (stream.bytes(0), len(stream.uint64(0)), len(stream.normal(0)), len(stream.below(9, 0))) == (b"", 0, 0, 0)
    assert stream.bytes(3) == raw[82:85]


def test_system_stream_takes_a_whole_key_from_the_operating_system(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def urandom(size: int) -> bytes:
        asked.append(size)
        return bytes(range(100, 100 + size))

    monkeypatch.setattr(os, "urandom", urandom)
    drawn = RandomStream.from_system().bytes(40)
    assert asked == [32]
    assert drawn == RandomStream(bytes(range(100, 132))).bytes(40)


def test_no_two_system_streams_coincide() -> None:
    assert len({RandomStream.from_system().bytes(16) for _ in range(200)}) == 200


def test_simulation_streams_are_fixed_by_seed_and_context_and_differ_by_both() -> None:
    contexts: list[tuple[str | int, ...]] = [
        (),
        ("a",),
        ("a", 1),
        ("a", "1"),
        ("a1",),
        (1,),
        ("1",),
        (1, "a"),
        ("a", 2),
    ]
    first = {(seed, *c): RandomStream.for_simulation(seed, *c).bytes(16) for seed in (0, 1, -1) for c in contexts}
    again = {(seed, *c): RandomStream.for_simulation(seed, *c).bytes(16) for seed in (0, 1, -1) for c in contexts}
    assert first == again
    assert len(set(first.values())) == 3 * len(contexts)


def test_module_level_generators_are_neither_read_nor_changed() -> None:
    def seed_all() -> None:
        random.seed(3)
        np.random.seed(3)  # noqa: NPY002 - the generator that must not matter
        torch.manual_seed(3)

    def states() -> tuple[object, ...]:
        return random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()  # noqa: NPY002

    seed_all()
    before = states()
    first = RandomStream.from_system().normal(4)
    assert states() == before
    seed_all()
    assert not np.array_equal(RandomStream.from_system().normal(4), first)


@pytest.mark.parametrize("key", [b"", bytes(16), bytes(31), bytes(33)])
def test_key_of_another_length_is_refused(key: bytes) -> None:
    with pytest.raises(ValueError, match=f"Expected a key of 32 bytes, got {len(key)}"):
        RandomStream(key)


@pytest.mark.parametrize("duplicate", [copy.copy, copy.deepcopy, pickle.dumps])
def test_copies_are_refused(duplicate: Callable[[RandomStream], object]) -> None:
    with pytest.raises(PrivacyError, match="attempt to copy it"):
        duplicate(RandomStream.from_system())


def test_key_is_not_shown() -> None:
    key = bytes(range(32))
    stream = RandomStream(key)
    assert key not in vars(stream).values()
    assert key.hex() not in repr(stream)


@pytest.mark.parametrize("draw", ["bytes", "uint64", "normal"])
def test_negative_count_is_refused(draw: str) -> None:
    with pytest.raises(ValueError, match="count >= 0, got -1"):
        getattr(stream_of(), draw)(-1)
    with pytest.raises(ValueError, match="count >= 0, got -1"):
        stream_of().below(5, -1)


# --- Processes ---------------------------------------------------------------------------------------------


def in_forked_child(task: Callable[[], bytes]) -> bytes:
    """What ``task`` returns in a forked child, or the name of what it raises."""
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:  # pragma: no cover - another process
        try:
            answer = task()
        except Exception as error:
            answer = type(error).__name__.encode()
        os.write(writer, answer)
        os._exit(0)
    os.close(writer)
    with os.fdopen(reader, "rb") as pipe:
        answer = pipe.read()
    os.waitpid(child, 0)
    return answer


@pytest.mark.process
@pytest.mark.parametrize("make", [RandomStream.from_system, stream_of])
def test_forked_child_cannot_use_the_stream_of_its_parent(make: Callable[[], RandomStream]) -> None:
    stream = make()
    stream.bytes(8)
    draws: list[Callable[[], object]] = [
        lambda: stream.bytes(8),
        lambda: stream.uint64(1),
        lambda: stream.below(10, 1),
        lambda: stream.normal(1),
    ]
    for draw in draws:
        assert in_forked_child(lambda draw=draw: repr(draw()).encode()) == b"PrivacyError"
    assert len(stream.bytes(8)) == 8


@pytest.mark.process
def test_new_streams_of_forked_children_are_new() -> None:
    drawn = {in_forked_child(lambda: RandomStream.from_system().bytes(16)) for _ in range(4)}
    assert len(drawn | {RandomStream.from_system().bytes(16)}) == 5
    assert {len(draw) for draw in drawn} == {16}


@pytest.mark.process
def test_simulation_streams_are_the_same_in_every_process() -> None:
    assert in_forked_child(lambda: stream_of("child").bytes(16)) == stream_of("child").bytes(16)


# --- Integers ----------------------------------------------------------------------------------------------


def test_integers_that_would_bias_the_remainder_are_drawn_again() -> None:
    # 2**64 = 3 * 6148914691236517205 + 1: only the very last integer has to go.
    stream = ScriptedStream(2**64 - 1, 2**64 - 2, 2**64 - 1, 7)
    assert stream.below(3, 2).tolist() == [2, 1]
    assert stream.words == []


def test_nothing_is_drawn_again_for_a_divisor_of_all_integers() -> None:
    stream = ScriptedStream(2**64 - 1, 2**64 - 1, 2**64 - 1)
    assert [stream.below(bound, 1).item() for bound in (1, 2**10, 2**63)] == [0, 2**10 - 1, 2**63 - 1]


@given(st.integers(1, 2**63), st.integers(0, 50))
def test_integers_keep_their_bounds(bound: int, n: int) -> None:
    drawn = stream_of(bound).below(bound, n)
    assert drawn.dtype == np.int64
    assert len(drawn) == n
    assert all(0 <= number < bound for number in drawn.tolist())


@given(st.integers(1, 2**63))
def test_every_remainder_has_equally_many_accepted_integers(bound: int) -> None:
    accepted = 2**64 // bound * bound
    assert ScriptedStream(accepted - 1).below(bound, 1).item() == bound - 1
    if accepted < 2**64:
        assert ScriptedStream(accepted, 0).below(bound, 1).item() == 0


def test_integers_are_uniform() -> None:
    counts = np.bincount(stream_of("die").below(6, 60_000), minlength=6)
    assert stats.chisquare(counts).pvalue > ACCEPT
    assert stats.chisquare(counts, 10_000 * np.array([1.05, 0.95, 1, 1, 1, 1])).pvalue < 1e-4


@pytest.mark.parametrize("bound", [0, -1, 2**63 + 1])
def test_bound_out_of_range_is_refused(bound: int) -> None:
    with pytest.raises(ValueError, match=rf"within 1\.\.2\*\*63, got {bound}"):
        stream_of().below(bound, 1)


# --- Normals -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("n", [1, 2, 7, 40])
def test_normals_equal_the_formula_pair_by_pair(n: int) -> None:
    pairs = (n + 1) // 2
    words = stream_of("oracle").uint64(2 * pairs).tolist()
    expected = []
    for number in range(n):
        radius_word, angle_word = words[number % pairs], words[pairs + number % pairs]
        radius = math.sqrt(-2 * math.log((radius_word + 0.5) / 2**64))
        turn = math.cos if number < pairs else math.sin
        expected.append(radius * turn(2 * math.pi * angle_word / 2**64))
    assert stream_of("oracle").normal(n) == pytest.approx(expected, rel=1e-12, abs=1e-14)
    assert stream_of("oracle").normal(n).dtype == np.float64


def test_normals_are_finite_at_both_ends_of_the_integers() -> None:
    farthest = ScriptedStream(0, 0).normal(1).item()
    assert farthest == pytest.approx(math.sqrt(2 * 65 * math.log(2)), rel=1e-14)
    assert LARGEST_NORMAL - 1e-4 < farthest < LARGEST_NORMAL
    assert ScriptedStream(2**64 - 1, 0).normal(1).item() == 0.0
    assert np.isfinite(ScriptedStream(2**64 - 1, 1, 2**64 - 1, 2**64 - 1).normal(4)).all()


def test_radius_has_more_than_53_bits_in_the_tail() -> None:
    near, far = ScriptedStream(1, 0).normal(1).item(), ScriptedStream(0, 0).normal(1).item()
    assert far**2 - near**2 == pytest.approx(2 * math.log(3), rel=1e-9)


def variance_is(sample: np.ndarray, std: float, level: float) -> bool:
    """Whether the mean square lies in the two-sided chi-square interval of N(0, std**2)."""
    low, high = stats.chi2.interval(1 - level, df=len(sample))
    return bool(low <= float(np.sum(sample**2)) / std**2 <= high)


def test_normals_have_the_standard_deviation_one_and_not_two_thirds_or_three_halves() -> None:
    sample = stream_of("normal").normal(40_000)
    assert variance_is(sample, 1.0, ACCEPT)
    assert stats.kstest(sample, "norm").pvalue > ACCEPT
    assert abs(sample.mean()) < 3.3 / math.sqrt(len(sample))
    for wrong in (2 / 3, 0.97, 1.03, 3 / 2):
        assert not variance_is(sample, wrong, ACCEPT)
    for wrong in (2 / 3, 3 / 2):
        assert not variance_is(sample, wrong, REJECT)
        assert stats.kstest(sample / wrong, "norm").pvalue < REJECT


def test_normals_have_the_tails_of_the_normal_distribution() -> None:
    sample = np.abs(stream_of("tails").normal(1_000_000))
    for limit in (3.0, 4.0):
        expected = 2 * stats.norm.sf(limit)
        assert stats.binomtest(int((sample > limit).sum()), len(sample), expected).pvalue > ACCEPT


def test_normals_are_independent_of_each_other_and_of_the_next_call() -> None:
    stream = stream_of("independent")
    first, second = stream.normal(40_000), stream.normal(40_000)
    neighbours = [(first[:-lag], first[lag:]) for lag in (1, 2, 19_999, 20_000, 20_001)]
    limit = 4 / math.sqrt(20_000)
    for a, b in [*neighbours, (first, second)]:
        size = min(len(a), 20_000)
        # Uncorrelated values could still share a radius: the squares tell.
        assert abs(np.corrcoef(a[:size], b[:size])[0, 1]) < limit
        assert abs(np.corrcoef(a[:size] ** 2, b[:size] ** 2)[0, 1]) < limit
    assert len(np.unique(np.concatenate([first, second]))) == 80_000
