"""Ed25519 keys that sign what a site or a coordinator stands for, as files that only their owner may read."""

from __future__ import annotations

from pathlib import Path

from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey

from medfed.canonical import sha256_hex
from medfed.errors import SiteError
from medfed.private_file import create_private, read_private

_FINGERPRINT_DIGITS = 28  # 112 bits: nobody finds a second key with the same ones
_GROUP = 4


def create_key(path: Path) -> Ed25519PrivateKey:
    """A new key from the operating system's randomness, stored at ``path`` (PEM, PKCS #8, mode 0600).

    The folder is made, with mode 0700, if there is none.

    Raises:
        SiteError: if there is a file already (a key is never overwritten: what it signed could no longer be
            checked), or it cannot be written.
    """
    key = Ed25519PrivateKey.generate()
    pem = key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    create_private(path, pem, "key")
    return key


def read_key(path: Path) -> Ed25519PrivateKey:
    """The key at ``path``.

    Raises:
        SiteError: if the file is missing, may be read or written by anybody but its owner, or holds no
            unencrypted Ed25519 key.
    """
    pem = read_private(path, "key")
    try:
        key = serialization.load_pem_private_key(pem, password=None)
    except (ValueError, TypeError, UnsupportedAlgorithm):
        key = None
    if not isinstance(key, Ed25519PrivateKey):
        raise SiteError(f"Expected an unencrypted Ed25519 key (PEM) at {path}, got something else; name another file.")
    return key


def public_pem(key: Ed25519PublicKey) -> bytes:
    """A public key as PEM."""
    return key.public_bytes(serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo)


def read_public_key(path: Path) -> Ed25519PublicKey:
    """The public key at ``path`` (PEM).

    Raises:
        SiteError: if the file is missing or holds no Ed25519 public key.
    """
    try:
        pem = path.read_bytes()
    except OSError as error:
        raise SiteError(f"Expected a public key at {path}, got: {error}; name the file that holds it.") from None
    try:
        key = serialization.load_pem_public_key(pem)
    except (ValueError, UnsupportedAlgorithm):
        key = None
    if not isinstance(key, Ed25519PublicKey):
        raise SiteError(f"Expected an Ed25519 public key (PEM) at {path}, got something else; name another file.")
    return key


def public_hex(key: Ed25519PrivateKey) -> str:
    """The public half of a key, raw, as 64 hexadecimal digits: how documents and studies name a signer."""
    return key.public_key().public_bytes_raw().hex()


def fingerprint(public_key: str) -> str:
    """A public key in seven groups of four digits, to be compared by telephone: 112 bits of its SHA-256.

    Args:
        public_key: raw, hexadecimal.
    """
    digits = sha256_hex(bytes.fromhex(public_key))[:_FINGERPRINT_DIGITS]
    return "-".join(digits[start : start + _GROUP] for start in range(0, len(digits), _GROUP))
