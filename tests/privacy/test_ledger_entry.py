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
from privacy.skellam_accounting import SkellamMechanism

MakeCharge = Callable[..., Charge]

SHARED = SkellamMechanism(6.2244, 0.2, 1, 10528, 50_000)


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


@given(
    steps=st.integers(1, 10**9),
    noise=st.floats(1e-3, 1e3),
    rate=st.floats(1e-9, 1.0),
    l2_bound=st.integers(1, 2**30),
    num_parameters=st.integers(1, 10**9),
)
def test_charge_of_shared_noise_is_read_back_as_it_was_written(
    key: Ed25519PrivateKey, make_charge: MakeCharge, cap: Cap,
    steps: int, noise: float, rate: float, l2_bound: int, num_parameters: int,
) -> None:  # fmt: skip
    mechanism = SkellamMechanism(noise, rate, steps, l2_bound, num_parameters)
    body = Reserved(sequence=2, time_ms=1, charge=make_charge(mechanism=mechanism), cap=cap)
    entry = signed_entry(body, NO_DIGEST, key)
    read = read_body(entry.body)
    assert read == body
    assert isinstance(read, Reserved)
    assert isinstance(read.charge.mechanism, SkellamMechanism)
    assert canonical_bytes(body.model_dump(mode="json")) == entry.body


def test_charges_are_written_as_they_always_were(key: Ed25519PrivateKey, make_charge: MakeCharge, cap: Cap) -> None:
    gaussian, shared = (
        signed_entry(Reserved(sequence=2, time_ms=1, charge=charge, cap=cap), NO_DIGEST, key).body
        for charge in (make_charge(), make_charge(mechanism=SHARED))
    )
    before, after = (
        b'{"cap":{"delta":1e-05,"epsilon":10.0,"unit":"patient"},"charge":{"adjacency":"add-remove","clip_norm":1.0,'
        b'"cohort":"chest-2024","delta":1e-05,"mechanism":{',
        b'},"request_digest":"%s","round":1,"scope":"federated","study":"lesions","study_digest":"%s",'
        b'"unit":"patient"},"kind":"reserve","sequence":2,"time_ms":1}' % (b"%064x" % 1, b"ab" * 32),
    )
    assert gaussian == before + b'"noise_multiplier":1.1,"sampling_rate":0.2,"steps":3' + after
    assert shared == (
        before
        + b'"l2_bound":10528,"noise_multiplier":6.2244,"num_parameters":50000,"sampling_rate":0.2,"steps":1'
        + after
    )


def test_mechanism_is_gaussian_or_shared_and_nothing_between(
    key: Ed25519PrivateKey, make_charge: MakeCharge, cap: Cap
) -> None:
    charge = make_charge(mechanism=SHARED)
    data = signed_entry(Reserved(sequence=2, time_ms=1, charge=charge, cap=cap), NO_DIGEST, key).body
    assert read_body(data) is not None
    for old, new in (
        (b'"l2_bound":10528,', b""),
        (b'"num_parameters":50000,', b""),
        (b'"l2_bound":10528', b'"l2_bound":10528.5'),
        (b'"l2_bound":10528', b'"l2_bound":0'),
        (b'"l2_bound":10528', b'"l2_bound":true'),
        (b'"l2_bound":10528', b'"l2_bound":"10528"'),
        (b'"steps":1', b'"steps":1,"variance":1'),
    ):
        assert old in data
        assert read_body(data.replace(old, new, 1)) is None


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


def test_cap_below_one_is_as_good_as_any() -> None:
    assert Cap(epsilon=0.5, delta=1e-5, unit="patient").epsilon == 0.5
