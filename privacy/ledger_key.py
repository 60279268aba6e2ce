"""The Ed25519 key with which a site signs its privacy ledger, as a file that only its owner may read."""

from __future__ import annotations

import os
import stat
from pathlib import Path

from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey

from medfed.durable_file import create_durably, make_private_folder
from medfed.errors import SiteError

_OTHERS = stat.S_IRWXG | stat.S_IRWXO


def create_key(path: Path) -> Ed25519PrivateKey:
    """A new key from the operating system's randomness, stored at ``path`` (PEM, PKCS #8, mode 0600).

    The folder is made, with mode 0700, if there is none.

    Raises:
        SiteError: if there is a file already (a key is never overwritten: what it signed could no longer be
            checked), or it cannot be written.
    """
    key = Ed25519PrivateKey.generate()
    pem = key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    try:
        make_private_folder(path.parent)
        try:
            create_durably(path, pem, mode=0o600)
        except FileExistsError:
            raise SiteError(f"Expected no key at {path} yet, got one; use it, or name another place.") from None
    except OSError as error:
        raise SiteError(f"Expected to write a new key to {path}, got: {error}; mend it and try again.") from None
    return key


def read_key(path: Path) -> Ed25519PrivateKey:
    """The key at ``path``.

    Raises:
        SiteError: if the file is missing, may be read or written by anybody but its owner, or holds no
            unencrypted Ed25519 key.
    """
    try:
        with path.open("rb") as file:
            mode = stat.S_IMODE(os.fstat(file.fileno()).st_mode)
            pem = file.read()
    except OSError as error:
        raise SiteError(f"Expected the site's key at {path}, got: {error}; create it or name its place.") from None
    if mode & _OTHERS:
        raise SiteError(
            f"Expected a key that only its owner may read (mode 0600), got mode {mode:04o} at {path}; "
            f"run chmod 600, and make a new key if others could have read this one."
        )
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
