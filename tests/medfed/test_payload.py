"""The wire format: golden bytes, round trips, and a refusal for everything else."""

import json
import struct
import zlib
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from medfed.adapter_manifest import AdapterManifest
from medfed.errors import AdapterMismatchError, PayloadError
from medfed.payload import HEADER_BYTES, decode_adapter, encode_adapter

GOLDEN = json.loads((Path(__file__).parents[1] / "golden" / "adapter_payload_v1.json").read_text())
TENSORS = {name: torch.tensor(value) for name, value in GOLDEN["tensors"].items()}
MANIFEST = AdapterManifest.of(TENSORS, method="lora", rank=1)
PAYLOAD = bytes.fromhex(GOLDEN["payload"])


def test_payload_equals_the_golden_bytes() -> None:
    assert MANIFEST.fingerprint.hex() == GOLDEN["fingerprint"]
    assert encode_adapter(MANIFEST.flatten(TENSORS), MANIFEST) == PAYLOAD


def test_golden_bytes_decode_to_the_tensors() -> None:
    tree = MANIFEST.unflatten(decode_adapter(PAYLOAD, MANIFEST))
    assert all(torch.equal(tree[name], tensor) for name, tensor in TENSORS.items())


@settings(derandomize=True, max_examples=60)
@given(st.lists(st.floats(width=32, allow_nan=False, allow_infinity=False), min_size=3, max_size=3))
def test_decode_inverts_encode_bit_for_bit(values: list[float]) -> None:
    vector_P = torch.tensor(values, dtype=torch.float32)
    decoded_P = decode_adapter(encode_adapter(vector_P, MANIFEST), MANIFEST)
    assert torch.equal(decoded_P.view(torch.int32), vector_P.view(torch.int32))


@settings(derandomize=True, max_examples=200)
@given(st.integers(0, 8 * len(PAYLOAD) - 1))
def test_every_flipped_bit_is_found(bit: int) -> None:
    damaged = bytearray(PAYLOAD)
    damaged[bit // 8] ^= 1 << (bit % 8)
    with pytest.raises(AdapterMismatchError):
        decode_adapter(bytes(damaged), MANIFEST)


@settings(derandomize=True, max_examples=100)
@given(st.binary(max_size=200))
def test_arbitrary_bytes_are_refused_without_any_other_error(data: bytes) -> None:
    with pytest.raises(PayloadError):
        decode_adapter(data, MANIFEST)


@pytest.mark.parametrize("cut", [0, 1, HEADER_BYTES - 1, HEADER_BYTES, len(PAYLOAD) - 1])
def test_truncated_payload_is_refused(cut: int) -> None:
    with pytest.raises(PayloadError):
        decode_adapter(PAYLOAD[:cut], MANIFEST)


def test_longer_payload_is_refused() -> None:
    with pytest.raises(PayloadError, match="3 elements in 76 bytes"):
        decode_adapter(PAYLOAD + b"\0\0\0\0", MANIFEST)


def test_other_version_names_both_versions() -> None:
    newer = PAYLOAD[:4] + struct.pack("<H", 2) + PAYLOAD[6:]
    with pytest.raises(PayloadError, match="version 1, got 2"):
        decode_adapter(newer, MANIFEST)


def test_payload_of_another_manifest_is_refused() -> None:
    other = AdapterManifest.of({"a": torch.zeros(1), "c": torch.zeros(1, 2)}, method="lora", rank=1)
    with pytest.raises(PayloadError, match="manifest"):
        decode_adapter(PAYLOAD, other)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_non_finite_value_is_refused_at_both_ends_with_its_tensor(bad: float) -> None:
    vector_P = torch.tensor([1.0, 2.0, bad])
    with pytest.raises(AdapterMismatchError, match="'b'"):
        encode_adapter(vector_P, MANIFEST)
    data = vector_P.numpy().tobytes()
    forged = bytearray(PAYLOAD[:HEADER_BYTES] + data)
    struct.pack_into("<I", forged, 48, zlib.crc32(data))
    with pytest.raises(AdapterMismatchError, match="'b'"):
        decode_adapter(bytes(forged), MANIFEST)


def test_infinities_that_cancel_are_found() -> None:
    with pytest.raises(AdapterMismatchError, match="'a'"):
        encode_adapter(torch.tensor([float("inf"), -float("inf"), 0.0]), MANIFEST)


def test_decoded_vector_may_be_changed() -> None:
    decode_adapter(PAYLOAD, MANIFEST).zero_()
    assert decode_adapter(PAYLOAD, MANIFEST)[0] == 1.5
