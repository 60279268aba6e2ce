"""Who a site is to the other sites: a signing key, from a secret that never leaves the site.

The public key stands in the study, which every hospital approves before anything runs: that is how each site knows
the others without believing the server. The identity signs and does nothing else: whoever gets hold of it later can
open nothing that was sent before.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey, X25519PublicKey
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

from medfed.errors import SecureAggregationError, SiteError
from medfed.private_file import create_private, read_private
from medfed.signed_document import DocumentBody, sign_document
from privacy.secure_aggregation.framing import labelled

SECRET_BYTES = 32
KEY_BYTES = 32
SIGNATURE_BYTES = 64

_RAW = (serialization.Encoding.Raw, serialization.PublicFormat.Raw)
_ANY_KEY = X25519PrivateKey.from_private_bytes(bytes(32))


@dataclass(frozen=True)
class Member:
    """A site as the others know it.

    Attributes:
        site: its name in the study.
        signing_key: Ed25519 public key, 32 bytes.

    Raises:
        SecureAggregationError: if the key does not have 32 bytes.
    """

    site: str
    signing_key: bytes

    def __post_init__(self) -> None:
        if len(self.signing_key) != KEY_BYTES:
            raise SecureAggregationError(
                f"Expected signing_key of site {self.site!r} in {KEY_BYTES} bytes, got {len(self.signing_key)}; ask "
                "the site for it."
            )

    def has_signed(self, signature: bytes, label: str, *fields: bytes) -> bool:
        """Whether this site signed these fields under this label."""
        try:
            Ed25519PublicKey.from_public_bytes(self.signing_key).verify(signature, labelled(label, *fields))
        except InvalidSignature:
            return False
        return True


class Identity:
    """The private side of a :class:`Member`.

    Args:
        secret: 32 random bytes; the key is derived from it.
    """

    def __init__(self, secret: bytes) -> None:
        if len(secret) != SECRET_BYTES:
            raise SiteError(f"Expected an identity of {SECRET_BYTES} bytes, got {len(secret)}; restore the file.")
        self._signing = Ed25519PrivateKey.from_private_bytes(derived_key(secret, "identity: signing"))

    @cached_property
    def signing_key(self) -> bytes:
        """The public key that checks this site's signatures."""
        return self._signing.public_key().public_bytes(*_RAW)

    def member(self, site: str) -> Member:
        """What the others are told."""
        return Member(site, self.signing_key)

    def sign(self, label: str, *fields: bytes) -> bytes:
        """An Ed25519 signature of the fields under a label."""
        return self._signing.sign(labelled(label, *fields))

    def signed_document(self, body: DocumentBody) -> bytes:
        """A document that this site stands for; signed apart from all steps of secure aggregation."""
        return sign_document(body, self._signing)


def shared_secret(key: X25519PrivateKey, public_key: bytes) -> bytes:
    """X25519 (RFC 7748).

    Raises:
        SecureAggregationError: for a public key of small order, with which the secret would be known to all.
    """
    try:
        return key.exchange(X25519PublicKey.from_public_bytes(public_key))
    except ValueError as error:
        raise SecureAggregationError(f"Expected an X25519 public key, got one that gives no secret: {error}") from None


def gives_secrets(public_key: bytes) -> bool:
    """Whether an X25519 public key is of large order: every private key is a multiple of the cofactor."""
    try:
        shared_secret(_ANY_KEY, public_key)
    except SecureAggregationError:
        return False
    return True


def derived_key(secret: bytes, label: str, *context: bytes) -> bytes:
    """32 bytes from a secret, for this use and no other: HKDF-SHA256 (RFC 5869) with the context as info."""
    return HKDF(algorithm=SHA256(), length=KEY_BYTES, salt=None, info=labelled(label, *context)).derive(secret)


def create_identity(path: Path) -> Identity:
    """A new identity from the operating system, stored at ``path`` with mode 0600.

    Raises:
        SiteError: if there is one already, or it cannot be written.
    """
    secret = os.urandom(SECRET_BYTES)
    create_private(path, secret, "identity")
    return Identity(secret)


def read_identity(path: Path) -> Identity:
    """The identity stored at ``path``.

    Raises:
        SiteError: if it is missing, damaged, or anybody but the owner may read it.
    """
    return Identity(read_private(path, "identity"))
