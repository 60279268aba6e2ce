"""A signing key is made once, and is for its owner's eyes alone."""

import stat
from pathlib import Path

import pytest
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric.ec import SECP256R1, generate_private_key
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from medfed.errors import SiteError
from medfed.signing import create_key, public_pem, read_key, read_public_key


def raw(key: Ed25519PrivateKey) -> bytes:
    return key.private_bytes_raw()


def test_key_is_read_as_it_was_made(tmp_path: Path) -> None:
    path = tmp_path / "site" / "site.key"
    made = create_key(path)
    assert raw(read_key(path)) == raw(made)
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert stat.S_IMODE(path.parent.stat().st_mode) == 0o700
    assert raw(create_key(tmp_path / "other.key")) != raw(made)


def test_key_is_never_overwritten(tmp_path: Path) -> None:
    made = create_key(tmp_path / "site.key")
    with pytest.raises(SiteError, match="Expected no key at"):
        create_key(tmp_path / "site.key")
    assert raw(read_key(tmp_path / "site.key")) == raw(made)


@pytest.mark.parametrize("mode", [0o640, 0o620, 0o610, 0o604, 0o602, 0o601])
def test_key_that_others_could_touch_is_refused(tmp_path: Path, mode: int) -> None:
    create_key(tmp_path / "site.key")
    (tmp_path / "site.key").chmod(mode)
    with pytest.raises(SiteError, match=f"mode 0600.*got mode {mode:04o}"):
        read_key(tmp_path / "site.key")


def test_key_of_another_kind_is_refused(tmp_path: Path) -> None:
    pem, pkcs8 = serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8
    contents = (
        b"",
        b"not a key",
        generate_private_key(SECP256R1()).private_bytes(pem, pkcs8, serialization.NoEncryption()),
        Ed25519PrivateKey.generate().private_bytes(pem, pkcs8, serialization.BestAvailableEncryption(b"secret")),
        public_pem(Ed25519PrivateKey.generate().public_key()),
    )
    path = tmp_path / "site.key"
    path.touch(mode=0o600)
    for content in contents:
        path.write_bytes(content)
        with pytest.raises(SiteError, match="unencrypted Ed25519 key"):
            read_key(path)
    with pytest.raises(SiteError, match="No such file"):
        read_key(tmp_path / "none.key")


def test_folder_that_cannot_be_made_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(SiteError, match="Expected to write a new key"):
        create_key(tmp_path / "file" / "site.key")


def test_public_key_is_read_as_it_was_written(tmp_path: Path) -> None:
    key = Ed25519PrivateKey.generate().public_key()
    path = tmp_path / "site.pub"
    path.write_bytes(public_pem(key))
    assert read_public_key(path) == key
    other = generate_private_key(SECP256R1()).public_key()
    spki = serialization.PublicFormat.SubjectPublicKeyInfo
    for content in (b"", b"not a key", other.public_bytes(serialization.Encoding.PEM, spki)):
        path.write_bytes(content)
        with pytest.raises(SiteError, match="Ed25519 public key"):
            read_public_key(path)
    with pytest.raises(SiteError, match="No such file"):
        read_public_key(tmp_path / "none.pub")
