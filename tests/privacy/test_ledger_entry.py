"""A charge that makes no sense is refused before it can be written."""

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from hypothesis import given
from hypothesis import strategies as st

from medfed.canonical import canonical_bytes
from medfed.errors import PrivacyError
from privacy.accounting import Mechanism
from privacy.ledger_entry import NO_DIGEST, Cap, Charge, Reserved, Settled, read_body, signed_entry

MakeCharge = Callable[..., Charge]


@pytest.mark.parametrize(
    "wrong",
    [
        {"cohort": ""},
        {"cohort": "Chest 2024"},
        {"cohort": "chest-2024\n"},
        {"study": "../x"},
        {"scope": ""},
        {"study_digest": "ab" * 31},
        {"study_digest": "AB" * 32},
        {"request_digest": "0" * 65},
        {"round": -1},
        {"steps": 0},
        {"clip_norm": 0.0},
        {"clip_norm": -1.0},
        {"clip_norm": math.inf},
        {"clip_norm": math.nan},
        {"delta": 0.0},
        {"delta": 1.0},
        {"delta": math.nan},
        {"unit": "image"},
        {"adjacency": "replace-one"},
    ],
    ids=str,
)
def test_charge_that_makes_no_sense_is_refused(make_charge: MakeCharge, wrong: dict[str, Any]) -> None:
    with pytest.raises(PrivacyError, match="Expected"):
        make_charge(**wrong)


@pytest.mark.parametrize(
    "wrong",
    [{"epsilon": 0.0}, {"epsilon": math.inf}, {"epsilon": math.nan}, {"delta": 0.0}, {"delta": 1.0}, {"unit": "x"}],
    ids=str,
)
def test_cap_that_makes_no_sense_is_refused(cap: Cap, wrong: dict[str, Any]) -> None:
    with pytest.raises(PrivacyError, match="Expected"):
        dataclasses.replace(cap, **wrong)


@given(
    round=st.integers(0, 10**6),
    steps=st.integers(1, 10**9),
    noise=st.floats(1e-3, 1e3),
    rate=st.floats(1e-9, 1.0),
    clip_norm=st.floats(1e-6, 1e6),
    delta=st.floats(1e-15, 0.5),
    facts=st.dictionaries(
        st.from_regex(r"[a-z][a-z0-9_]{0,20}", fullmatch=True), st.floats(allow_nan=False, allow_infinity=False)
    ),
)
def test_body_is_read_back_as_it_was_written(
    key: Ed25519PrivateKey, make_charge: MakeCharge, cap: Cap, round: int, steps: int, noise: float, rate: float,
    clip_norm: float, delta: float, facts: dict[str, float],
) -> None:  # fmt: skip
    charge = make_charge(round, mechanism=Mechanism(noise, rate, steps), clip_norm=clip_norm, delta=delta)
    for body in (
        Reserved(sequence=2, time_ms=1, charge=charge, cap=cap),
        Settled(sequence=3, time_ms=1, reservation=2, outcome="sent", reply_digest="00" * 32, facts=facts),
    ):
        entry = signed_entry(body, NO_DIGEST, key)
        assert read_body(entry.body) == body
        assert canonical_bytes(body.model_dump(mode="json")) == entry.body


def test_body_that_would_not_be_read_back_is_not_written(
    key: Ed25519PrivateKey, make_charge: MakeCharge, cap: Cap
) -> None:
    """One such entry would end the chain for good: no later process could verify past it."""
    charge = make_charge()
    object.__setattr__(charge, "round", "3")
    with pytest.raises(PrivacyError, match="read back"):
        signed_entry(Reserved(sequence=2, time_ms=1, charge=charge, cap=cap), NO_DIGEST, key)


@pytest.mark.parametrize(
    ("old", "new"),
    [
        (b'"kind":"reserve"', b'"kind":"refund"'),
        (b'"steps":3', b'"steps":-3'),
        (b'"steps":3', b'"steps":"3"'),
        (b'"round":1', b'"round":true'),
        (b'"round":1', b'"round":1,"patient":7'),
        (b'"sequence":2', b'"sequence":2.5'),
        (b'"sequence":2', b'"sequence":2,"patients":[1]'),
        (b'"epsilon":10.0', b'"epsilon":NaN'),
        (b'"unit":"patient"},"charge"', b'"unit":"image"},"charge"'),
        (b"{", b"["),
        (b"lesions", b"\xff"),
    ],
)
def test_bytes_that_are_no_body_are_none(
    key: Ed25519PrivateKey, make_charge: MakeCharge, cap: Cap, old: bytes, new: bytes
) -> None:
    data = signed_entry(Reserved(sequence=2, time_ms=1, charge=make_charge(), cap=cap), NO_DIGEST, key).body
    assert old in data
    assert read_body(data) is not None
    assert read_body(data.replace(old, new, 1)) is None
