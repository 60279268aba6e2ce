"""A document says what its signer signed, or nothing."""

import json
from pathlib import Path
from typing import ClassVar

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ConfigDict

from medfed.canonical import canonical_bytes
from medfed.errors import DocumentError
from medfed.signed_document import (
    MAX_DOCUMENT_BYTES,
    DocumentBody,
    SelfSignedBody,
    read_document,
    sign_document,
    verify_document,
    verify_self_signed,
)
from medfed.signing import fingerprint, public_hex

KEY, OTHER = (Ed25519PrivateKey.from_private_bytes(bytes([number]) * 32) for number in (1, 2))


class Note(DocumentBody):
    kind: ClassVar[str] = "note"
    text: str
    pages: int = 1


class Letter(DocumentBody):
    kind: ClassVar[str] = "letter"
    text: str
    pages: int = 1


class Card(SelfSignedBody):
    kind: ClassVar[str] = "card"
    key: str

    @property
    def signer(self) -> str:
        return self.key


def verify(data: bytes, model: type[DocumentBody] = Note, key: Ed25519PrivateKey = KEY) -> DocumentBody:
    return verify_document(data, model, public_key=public_hex(key), origin="note.json")


@given(text=st.text(max_size=40), pages=st.integers(-(2**62), 2**62))
def test_what_was_signed_is_read_back(text: str, pages: int) -> None:
    note = Note(text=text, pages=pages)
    assert verify(sign_document(note, KEY)) == note


def test_equal_documents_have_equal_bytes_and_these() -> None:
    data = sign_document(Note(text="yes"), KEY)
    assert data == sign_document(Note(text="yes", pages=1), KEY)
    fields = json.loads(data)
    KEY.public_key().verify(
        bytes.fromhex(fields["signature"]), b'medfed document v1\0["note",{"pages":1,"text":"yes"}]'
    )


def test_every_flipped_bit_is_refused() -> None:
    data = sign_document(Note(text="yes"), KEY)
    for position in range(len(data)):
        for bit in (0, 4):
            changed = data[:position] + bytes([data[position] ^ (1 << bit)]) + data[position + 1 :]
            with pytest.raises(DocumentError):
                verify(changed)


@pytest.mark.parametrize(
    "change",
    [
        lambda data: data[:-1],
        lambda data: data + b" ",
        lambda data: b"",
        lambda data: data.replace(b":1", b": 1", 1),
        lambda data: b'{"body":{},' + data[1:],
        lambda data: json.dumps(json.loads(data), indent=1).encode(),
        lambda data: b"[" * 100_000,
        lambda data: b'{"a":' * 5_000,
        lambda data: data.replace(b'"yes"', b'"\\ud800"'),
        lambda data: data.replace(b"1", b"NaN", 1),
    ],
)
def test_bytes_that_are_not_the_document_are_refused(change) -> None:
    with pytest.raises(DocumentError, match="other or damaged bytes"):
        verify(change(sign_document(Note(text="yes"), KEY)))


def test_unknown_key_is_refused_though_its_signature_is_good() -> None:
    with pytest.raises(DocumentError, match="not believed here"):
        verify(sign_document(Note(text="yes"), OTHER))
    forged = json.loads(sign_document(Note(text="yes"), OTHER)) | {"public_key": public_hex(KEY)}
    with pytest.raises(DocumentError, match="as it was signed"):
        verify(canonical_bytes(forged) + b"\n")


def test_a_document_of_one_kind_is_none_of_another() -> None:
    data = sign_document(Note(text="yes"), KEY)
    with pytest.raises(DocumentError, match="kind 'letter', got 'note'"):
        verify(data, Letter)
    renamed = json.loads(data) | {"kind": "letter"}
    with pytest.raises(DocumentError, match="as it was signed"):
        verify(canonical_bytes(renamed) + b"\n", Letter)


@pytest.mark.parametrize("body", [{"text": "yes"}, {"text": "yes", "pages": 1, "more": 2}, {"text": 3, "pages": 1}])
def test_a_signed_body_of_another_form_is_refused(body: dict) -> None:
    class Loose(DocumentBody):
        model_config = ConfigDict(extra="allow")
        kind: ClassVar[str] = "note"

    with pytest.raises(DocumentError):
        verify(sign_document(Loose(**body), KEY))


def test_a_self_signed_document_needs_the_key_that_it_names() -> None:
    card = Card(key=public_hex(KEY))
    assert verify_self_signed(sign_document(card, KEY), Card, origin="card") == card
    with pytest.raises(DocumentError, match="not believed here"):
        verify_self_signed(sign_document(card, OTHER), Card, origin="card")


def test_a_file_that_is_too_large_is_refused_before_it_is_parsed(tmp_path: Path) -> None:
    path = tmp_path / "note.json"
    path.write_bytes(b" " * (2 * MAX_DOCUMENT_BYTES))
    data = read_document(path)
    assert len(data) == MAX_DOCUMENT_BYTES + 1
    with pytest.raises(DocumentError, match=f"at most {MAX_DOCUMENT_BYTES} bytes"):
        verify(data)
    with pytest.raises(DocumentError, match="No such file"):
        read_document(tmp_path / "none.json")


def test_fingerprint_is_the_digest_in_groups() -> None:
    # printf '00%.0s' {1..32} | xxd -r -p | sha256sum
    assert fingerprint("00" * 32) == "6668-7aad-f862-bd77-6c8f-c18b-8e9f"
