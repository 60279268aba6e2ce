"""Writes secure_aggregation.json: digests, keys and a mask of a fixed consortium, computed from the standards alone.

Nothing here is imported from medfed: frames, HKDF (RFC 5869) and AES-CTR are spelled out, X25519 alone is the
library's. A change of the JSON is a change of the protocol, and sites of two versions do not understand each other.
From the repository root:

    .venv/bin/python tests/golden/secure_aggregation.py
"""

from __future__ import annotations

import hashlib
import hmac
import json
from pathlib import Path

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey, X25519PublicKey
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes

GOLDEN = Path(__file__).with_suffix(".json")

SITES = ("north", "east", "south")


def frame(*fields: bytes) -> bytes:
    """Fields after their lengths, 4 bytes each, big-endian."""
    return b"".join(len(field).to_bytes(4, "big") + field for field in fields)


def labelled(label: str, *fields: bytes) -> bytes:
    """What is hashed, signed, or the info of a key derivation."""
    return frame(b"medfed secure aggregation v1", label.encode(), *fields)


def number(value: int) -> bytes:
    """8 bytes, big-endian."""
    return value.to_bytes(8, "big")


def hkdf(secret: bytes, label: str, *context: bytes) -> bytes:
    """RFC 5869 with SHA-256, no salt, one block."""
    extracted = hmac.digest(bytes(32), secret, "sha256")
    return hmac.digest(extracted, labelled(label, *context) + b"\x01", "sha256")


def main() -> None:
    """Writes the vectors."""
    members = []
    public = {}
    keys = {}
    for place, site in enumerate(SITES):
        secret = bytes([place]) * 32
        keys[site] = Ed25519PrivateKey.from_private_bytes(hkdf(secret, "identity: signing"))
        public[site] = keys[site].public_key().public_bytes_raw().hex()
        members.append(frame(site.encode(), keys[site].public_key().public_bytes_raw()))
    numbers = [number(value) for value in (3, 1, 3, 32)]  # t, c, k, rounds
    plan = hashlib.sha256(labelled("plan", bytes(range(32)), b"federated", frame(*members), *numbers)).digest()
    sites = frame(*(site.encode() for site in SITES))
    start = frame(plan, number(7), number(5), b"c" * 32, b"m" * 32, sites)
    digests = [bytes([16 + place]) * 32 for place in range(3)]
    round_id = hashlib.sha256(labelled("round", start, frame(*digests))).digest()
    own = hkdf(b"s" * 32, "own mask", round_id, b"east")
    first, second = (X25519PrivateKey.from_private_bytes(bytes([64 + place]) * 32) for place in range(2))
    shared = first.exchange(X25519PublicKey.from_public_bytes(second.public_key().public_bytes_raw()))
    pair = hkdf(shared, "pair mask", round_id, b"north", b"east")
    advertised = []
    for place, site in enumerate(SITES):
        box_key = X25519PrivateKey.from_private_bytes(bytes([64 + place]) * 32).public_key().public_bytes_raw()
        signature = keys[site].sign(labelled("advertised", plan, number(7), box_key))  # Ed25519 draws nothing
        advertised.append(frame(site.encode(), plan, number(7), box_key, signature))
    roster = frame(plan, number(7), frame(*advertised))
    roster_digest = hashlib.sha256(labelled("roster", roster)).digest()
    keystream = Cipher(algorithms.AES256(own), modes.CTR((2).to_bytes(16, "big"))).encryptor().update(bytes(16))
    golden = {
        "about": "secure aggregation, protocol v1; regenerate with tests/golden/secure_aggregation.py",
        "members": public,
        "plan_digest": plan.hex(),
        "start": start.hex(),
        "round_id": round_id.hex(),
        "own_mask_key": own.hex(),
        "pair_mask_key": pair.hex(),
        "own_mask": [int.from_bytes(keystream[i : i + 4], "little") for i in range(0, 16, 4)],
        "roster": roster.hex(),
        "roster_digest": roster_digest.hex(),
        "box_key": hkdf(shared, "box", plan, roster_digest, b"north", b"east").hex(),
    }
    GOLDEN.write_text(json.dumps(golden, indent=1) + "\n")


if __name__ == "__main__":
    main()
