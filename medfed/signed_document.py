"""A small JSON document that somebody stands for: what it says, a public key, and an Ed25519 signature.

The signature covers the kind of the document and the canonical bytes of what it says, so that a document of one kind
never passes for another, nor for an entry of a ledger or a step of secure aggregation, which are signed under names of
their own. A document is read whole or not at all: one that is too large, not canonical, of another kind, signed by
another key or not as it was signed is refused with one line.

Not guaranteed: that a document is the newest of its signer. Where that matters, the body says for what it holds.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, ClassVar, TypeVar

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from pydantic import BaseModel, ConfigDict, Field, JsonValue, ValidationError

from medfed.canonical import canonical_bytes
from medfed.errors import DocumentError
from medfed.signing import public_hex
from medfed.study_sections import Digest, Name

MAX_DOCUMENT_BYTES = 8 * 2**20
"""No document is larger: a study that names ten thousand tensors has two megabytes."""

_SIGNED = b"medfed document v1\0"


class DocumentBody(BaseModel):
    """What a document says; a subclass for each kind.

    Attributes:
        kind: what it is: covered by the signature, and different for every subclass.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    kind: ClassVar[str]


class SelfSignedBody(DocumentBody):
    """What a document says that names its own signer; who that is has to be made sure of in another way."""

    @property
    def signer(self) -> str:
        """Raw public key, hexadecimal."""
        raise NotImplementedError


class _Document(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    kind: Name
    body: dict[str, JsonValue]
    public_key: Digest
    signature: Annotated[str, Field(pattern=r"^[0-9a-f]{128}$")]


Body = TypeVar("Body", bound=DocumentBody)
SelfSigned = TypeVar("SelfSigned", bound=SelfSignedBody)


def sign_document(body: DocumentBody, key: Ed25519PrivateKey) -> bytes:
    """The document's bytes: canonical JSON and a line feed. Equal bodies and keys give equal bytes."""
    said = body.model_dump(mode="json")
    signature = key.sign(_signed_bytes(body.kind, said))
    document = _Document(kind=body.kind, body=said, public_key=public_hex(key), signature=signature.hex())
    return _bytes_of(document)


def verify_document(data: bytes, model: type[Body], *, public_key: str, origin: str) -> Body:
    """What a document says, if this key signed it.

    Args:
        data: as :func:`sign_document` made it, byte for byte.
        model: kind that it must be.
        public_key: the only key that is believed, raw, hexadecimal.
        origin: file or sender, for messages.

    Raises:
        DocumentError: says what is wrong.
    """
    document, body = _read(data, model, origin)
    _require_signer(document, public_key, origin)
    return body


def verify_self_signed(data: bytes, model: type[SelfSigned], *, origin: str) -> SelfSigned:
    """What a document says, if the key that it names signed it.

    Raises:
        DocumentError: says what is wrong.
    """
    document, body = _read(data, model, origin)
    _require_signer(document, body.signer, origin)
    return body


def read_document(path: Path) -> bytes:
    """The bytes of a document's file; no more than a document may have.

    Raises:
        DocumentError: if there is none, or it is too large.
    """
    try:
        with path.open("rb") as file:
            data = file.read(MAX_DOCUMENT_BYTES + 1)
    except OSError as error:
        raise DocumentError(f"Expected a signed document at {path}, got: {error}; check the path.") from None
    return data


def _read(data: bytes, model: type[Body], origin: str) -> tuple[_Document, Body]:
    """A document of the right form, with its body; its signature has not been looked at."""
    if len(data) > MAX_DOCUMENT_BYTES:
        raise DocumentError(
            f"{origin}: expected a document of at most {MAX_DOCUMENT_BYTES} bytes, got more; ask for it again."
        )
    try:
        document = _Document.model_validate_json(data)
        is_canonical = _bytes_of(document) == data
    except (ValidationError, ValueError, RecursionError):
        is_canonical = False
    if not is_canonical:
        raise DocumentError(f"{origin}: expected a signed document, got other or damaged bytes; ask for it again.")
    if document.kind != model.kind:
        raise DocumentError(
            f"{origin}: expected a document of kind {model.kind!r}, got {document.kind!r}; name another file."
        )
    try:
        body = model.model_validate_json(canonical_bytes(document.body))
    except (ValidationError, ValueError) as error:
        detail = error.errors(include_url=False)[0] if isinstance(error, ValidationError) else None
        where = "" if detail is None else f" at {'.'.join(map(str, detail['loc']))!r}: {detail['msg']}"
        raise DocumentError(
            f"{origin}: expected a {model.kind} of this version of medfed, got another{where}; ask for it again."
        ) from None
    if body.model_dump(mode="json") != document.body:
        raise DocumentError(
            f"{origin}: expected a {model.kind} that says everything itself, got one that leaves something out; ask "
            "for it again."
        )
    return document, body


def _require_signer(document: _Document, public_key: str, origin: str) -> None:
    if document.public_key != public_key:
        raise DocumentError(
            f"{origin}: expected the signature of {public_key[:16]}..., got one of {document.public_key[:16]}..., "
            "which is not believed here; find out who made it."
        )
    try:
        key = Ed25519PublicKey.from_public_bytes(bytes.fromhex(public_key))
        key.verify(bytes.fromhex(document.signature), _signed_bytes(document.kind, document.body))
    except (ValueError, InvalidSignature):
        raise DocumentError(
            f"{origin}: expected the {document.kind} as it was signed, got another: it was changed or damaged; ask for "
            "it again, and find out who changed it."
        ) from None


def _signed_bytes(kind: str, said: object) -> bytes:
    return _SIGNED + canonical_bytes([kind, said])


def _bytes_of(document: _Document) -> bytes:
    return canonical_bytes(document.model_dump(mode="json")) + b"\n"
