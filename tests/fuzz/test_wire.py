"""What comes over the network as bytes: payloads, headers, messages of secure aggregation."""

import tracemalloc

import pytest
import torch
from hostile import examples, given, hostile, only
from hypothesis import strategies as st

from medfed.adapter_manifest import AdapterManifest
from medfed.errors import AdapterMismatchError, MessageError, SecureAggregationError
from medfed.messages import INSTRUCTION_FIELDS, Refusal, RoundInstruction, RoundReply, bytes_field, exact_fields
from medfed.payload import decode_adapter, encode_adapter
from privacy.secure_aggregation import messages as secure
from privacy.secure_aggregation.codec import WireMessage

TENSORS = {"a": torch.arange(6.0).reshape(2, 3), "b": torch.tensor(1.0), "c": torch.zeros(0, 4)}
MANIFEST = AdapterManifest.of(TENSORS, method="lora", rank=2)
PAYLOAD = encode_adapter(MANIFEST.flatten(TENSORS), MANIFEST)

DIGEST = "ab" * 32
INSTRUCTION = RoundInstruction(study_digest=DIGEST, round=3, attempt=2, scope="federated")
REPLY = RoundReply(site="north", study_digest=DIGEST, round=3, attempt=1, metrics={"dice": 0.5}, epsilon=1.25)
REFUSED = RoundReply(site="north", study_digest=DIGEST, round=3, attempt=1, refusal=Refusal(kind="A", reason="b"))

D, K, S = bytes(32), b"k" * 32, b"s" * 64
START = secure.RoundStart(D, 1, 2, D, K, ("north", "south"))
ADVERTISED = secure.Advertised("north", D, 1, K, S)
EXAMPLES: tuple[WireMessage, ...] = (
    ADVERTISED,
    secure.Roster(D, 1, (ADVERTISED, secure.Advertised("south", D, 1, K, S))),
    secure.SetupBody("north", D, 1, D, (K, K), (D, D), (D, D)),
    secure.Setup(b"body", S, (b"box", b"")),
    secure.RelayedSetup(b"body", S, b"box"),
    secure.Relay(D, 1, (secure.RelayedSetup(b"body", S, b"box"),)),
    secure.Acceptance("north", 1, ("south",), S),
    START,
    secure.Masked("north", D, S, bytes(40)),
    secure.Upload("north", D, S),
    secure.VoteRequest(START, ("north",)),
    secure.Vote("north", D, S),
    secure.OpenRequest(START, ("north",), (secure.Vote("north", D, S),), (secure.Upload("north", D, S),)),
    secure.Shares("north", D, (D, K), S),
)


@examples(150)
@given(hostile(PAYLOAD, PAYLOAD[:64]))
def test_a_payload_is_decoded_to_what_was_encoded_or_refused(data: bytes) -> None:
    vector_P = only(decode_adapter, data, MANIFEST, raises=(AdapterMismatchError,))
    if not isinstance(vector_P, Exception):
        assert encode_adapter(vector_P, MANIFEST) == data


@examples(100)
@given(hostile(INSTRUCTION.model_dump_json().encode()))
def test_an_instruction_is_read_or_refused(data: bytes) -> None:
    _read_header(data, RoundInstruction)


@examples(100)
@given(hostile(REPLY.model_dump_json().encode(), REFUSED.model_dump_json().encode()))
def test_a_reply_is_read_or_refused(data: bytes) -> None:
    _read_header(data, RoundReply)


def _read_header(data: bytes, model: type[RoundInstruction] | type[RoundReply]) -> None:
    for text in (data.decode(errors="replace"), data.decode("utf-8", errors="surrogateescape")):
        header = only(model.parse, {"header": text}, raises=(MessageError,))
        if isinstance(header, MessageError):
            assert len(str(header)) < 1000
            assert str(header).isprintable()
        else:
            assert model.parse({"header": header.model_dump_json()}) == header


@examples(100)
@given(
    st.dictionaries(
        st.sampled_from((*INSTRUCTION_FIELDS, "extra")),
        st.one_of(st.text(max_size=5), st.binary(max_size=5), st.integers(), st.floats(), st.lists(st.integers())),
    )
)
def test_fields_are_text_or_bytes_under_the_agreed_names(record: dict[str, object]) -> None:
    fields = only(exact_fields, record, INSTRUCTION_FIELDS, raises=(MessageError,))
    if not isinstance(fields, MessageError):
        only(bytes_field, fields, "study", raises=(MessageError,))


@pytest.mark.parametrize("example", EXAMPLES, ids=lambda example: type(example).__name__)
def test_a_message_of_secure_aggregation_is_read_exactly_or_refused(example: WireMessage) -> None:
    assert type(example).parse(example.to_bytes()) == example

    @examples(40)
    @given(hostile(example.to_bytes()))
    def check(data: bytes) -> None:
        read = only(type(example).parse, data, raises=(SecureAggregationError,))
        if not isinstance(read, SecureAggregationError):
            assert read.to_bytes() == data
        else:
            assert str(read).isprintable()

    check()


@pytest.mark.parametrize("example", EXAMPLES, ids=lambda example: type(example).__name__)
def test_a_length_that_lies_allocates_nothing(example: WireMessage) -> None:
    data = example.to_bytes()
    tracemalloc.start()
    try:
        for at in range(0, len(data) - 3):
            only(
                type(example).parse, data[:at] + b"\x7f\xff\xff\xff" + data[at + 4 :], raises=(SecureAggregationError,)
            )
        only(decode_adapter, PAYLOAD[:40] + b"\xff" * 8 + PAYLOAD[48:], MANIFEST, raises=(AdapterMismatchError,))
        _, peak_bytes = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak_bytes < 2**20
