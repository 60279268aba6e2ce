"""Bytes that a decoder must refuse in its own words: noise, and valid examples that were damaged or forged.

A decoder passes when all that ever comes out of it is a value or the error that its docstring names, in bounded time,
and when nothing that it looked at has changed. Examples are the same in every run.
"""

import random
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

MAX_SECONDS = 5.0
"""Processor time of one decoding; the slowest measured one takes a tenth of a second."""

_NUMBERS = [(value % 2**bits).to_bytes(bits // 8, order) for value in (-1, -(2**31), 2**31 - 1, 2**63, 2**40, 0)
            for bits in (32, 64) for order in ("little", "big")]  # fmt: skip
"""Where a length or a count stands: huge, negative, nothing."""

_TEXTS = [
    *(b"[" * 2_000, b'{"a":' * 2_000, b"9" * 5_000, b"1e999", b"-1", b"NaN", b"Infinity", b"-Infinity", b"null"),
    *(b"true", b"[]", b"{}", b'""', b'"\\ud800"', b'"\\u0000"', b'"a":1,"a":2,', b"\xff", b"\x00", b"\xed\xa0\x80"),
    *(b"x = [" * 2_000, b"a." * 2_000, b'"""', b"[[a]]\n", b"= 0x" + b"f" * 5_000, b"1979-13-45", b"inf", b"nan"),
    *(b'\n"\\u001b[31m" = 1\n', b"x" * 5_000, b"0", b"1.5", b"9" * 30, b'"../../x"', b"\r", b"\xe2\x80\xa8"),
]
"""Where a value stands in JSON or TOML: too deep, too large, no number, no text, twice."""


def damaged(valid: bytes, source: random.Random) -> bytes:
    """``valid`` after one to three kinds of damage."""
    data = valid
    for _ in range(source.choice((1, 1, 1, 2, 3))):
        at, to = sorted((source.randint(0, len(data)), source.randint(0, len(data))))
        match source.randrange(8):
            case 0 if data:
                spot = source.randrange(len(data))
                data = data[:spot] + bytes([data[spot] ^ 1 << source.randrange(8)]) + data[spot + 1 :]
            case 1:
                data = data[:at]
            case 2:
                data = data[:to] + data[at:to] + data[to:]
            case 3:
                data = data[:at] + data[to:]
            case 4:
                number = source.choice(_NUMBERS)
                data = data[:at] + number + data[at + len(number) :]
            case 5:
                data = data[:at] + source.choice(_TEXTS) + data[at:]
            case 6:
                data = _with_another_value(data, source)
            case _:
                data = data + source.choice((b"\x00", b"\n", valid, b" "))
    return data


def _with_another_value(data: bytes, source: random.Random) -> bytes:
    """A value of JSON or TOML in place of another: what stands after a colon or an equals sign."""
    ends = [spot for spot, char in enumerate(data) if char in b":="]
    if not ends:
        return data
    start = end = source.choice(ends) + 1
    while end < len(data) and data[end] not in b",}]\n":
        end += 1
    return data[:start] + source.choice(_TEXTS) + data[end:]


def hostile(*valid: bytes) -> st.SearchStrategy[bytes]:
    """Noise, damaged examples, and the head of one before the tail of another."""

    def from_seed(seed: int) -> bytes:
        source = random.Random(seed)
        example = source.choice(valid)
        if source.randrange(8) == 0:
            other = source.choice(valid)
            return example[: source.randint(0, len(example))] + other[source.randint(0, len(other)) :]
        return damaged(example, source)

    return st.one_of(st.integers(0, 2**32).map(from_seed), st.integers(0, 2**32).map(from_seed), st.binary(max_size=80))


def examples(number: int) -> settings:
    """This many examples, the same each time. Fixtures are shared on purpose: nothing may change them."""
    return settings(
        derandomize=True,
        max_examples=number,
        deadline=None,
        suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow, HealthCheck.data_too_large],
    )


def only(decode: Callable[..., Any], *arguments: Any, raises: tuple[type[Exception], ...]) -> Any:
    """What ``decode`` makes of its arguments, or its error, which is one of these. Anything else fails the test."""
    began_s = time.thread_time()
    try:
        result = decode(*arguments)
    except raises as error:
        result = error
    if isinstance(result, Exception):
        assert len(str(result).encode()) < 100_000  # can be written to a terminal and a log
    assert time.thread_time() - began_s < MAX_SECONDS
    return result


def files_of(folder: Path) -> dict[str, bytes]:
    """Every file below a folder."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@contextmanager
def unchanged(folder: Path) -> Iterator[None]:
    """Fails if a file below the folder is another afterwards."""
    before = files_of(folder)
    yield
    assert files_of(folder) == before


__all__ = ["damaged", "examples", "files_of", "given", "hostile", "only", "unchanged"]
