"""Messages: exactly the agreed fields, nothing else."""

import json

import pytest

from medfed.errors import DataError, MessageError
from medfed.messages import Fields, Refusal, RoundInstruction, RoundReply, bytes_field

DIGEST = "a" * 64


def test_instruction_and_reply_survive_the_wire() -> None:
    instruction = RoundInstruction(study_digest=DIGEST, round=3, scope="local-north")
    assert RoundInstruction.parse(instruction.to_fields(study=b"s", adapter=b"a")) == instruction
    reply = RoundReply(site="north", study_digest=DIGEST, round=3, attempt=1, num_examples=4, metrics={"loss": 0.5})
    assert RoundReply.parse(reply.to_fields(adapter=b"x")) == reply
    assert bytes_field(reply.to_fields(adapter=b"x"), "adapter") == b"x"


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"header": b"{}"},
        {"header": "{}"},
        {"header": "not json"},
        {"header": json.dumps({"study_digest": DIGEST, "round": 1, "extra": 1})},
        {"header": json.dumps({"study_digest": DIGEST, "round": -1})},
        {"header": json.dumps({"study_digest": "short", "round": 1})},
        {"header": json.dumps({"study_digest": DIGEST, "round": 1, "scope": "../up"})},
    ],
)
def test_anything_but_an_instruction_is_refused(fields: Fields) -> None:
    with pytest.raises(MessageError):
        RoundInstruction.parse(fields)


def test_metrics_are_finite_numbers() -> None:
    with pytest.raises(ValueError, match="finite"):
        RoundReply(site="n", study_digest=DIGEST, round=1, attempt=1, metrics={"dice": float("nan")})


def test_missing_bytes_are_refused_by_name() -> None:
    with pytest.raises(MessageError, match="'adapter'"):
        bytes_field({"header": "{}"}, "adapter")


def test_refusal_carries_no_text_of_the_error() -> None:
    refusal = Refusal.of(DataError("/data/patient-0042.nii.gz is broken"))
    assert refusal.kind == "DataError"
    assert "0042" not in refusal.model_dump_json()
