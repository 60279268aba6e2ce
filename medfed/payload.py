"""The payload codec: an adapter vector as bytes, version 1.

::

    offset  size  field
    0       4     magic, ASCII "MFAP"
    4       2     version, little-endian, 1
    6       2     reserved, zero
    8       32    fingerprint of the adapter manifest (SHA-256)
    40      8     number of elements P, little-endian
    48      4     CRC-32 of the data
    52      12    reserved, zero
    64      4*P   data, IEEE 754 binary32, little-endian, manifest order

No pickle, no self-describing types: whoever decodes must already hold the manifest. The CRC finds damage,
not malice; authenticity is the transport's and secure aggregation's business.
"""

from __future__ import annotations

import struct
import zlib

import numpy as np
import torch
from torch import Tensor

from medfed.adapter_manifest import AdapterManifest
from medfed.errors import PayloadError

_MAGIC = b"MFAP"
_VERSION = 1
_HEADER = struct.Struct("<4sHH32sQI12s")
_NOTHING = bytes(12)

HEADER_BYTES = _HEADER.size
"""Bytes before the data: 64."""


def encode_adapter(vector_P: Tensor, manifest: AdapterManifest) -> bytes:
    """The payload of a flat float32 vector.

    Raises:
        AdapterMismatchError: if the vector is not a finite float32 one of the manifest's length; nothing
            that the manifest does not name can be encoded.
    """
    manifest.check_vector(vector_P)
    data = np.ascontiguousarray(vector_P.detach().cpu().numpy(), dtype="<f4").data.cast("B")
    header = _HEADER.pack(_MAGIC, _VERSION, 0, manifest.fingerprint, manifest.num_elements, zlib.crc32(data), _NOTHING)
    return b"".join((header, data))


def decode_adapter(payload: bytes, manifest: AdapterManifest) -> Tensor:
    """The flat float32 vector of a payload; a copy, so it may be changed.

    Raises:
        PayloadError: if the bytes are not a version-1 payload of this manifest, or are damaged.
        AdapterMismatchError: if a value is NaN or infinite; the message names its tensor.
    """
    if len(payload) < HEADER_BYTES:
        raise PayloadError(f"Expected a payload of at least {HEADER_BYTES} bytes, got {len(payload)}.")
    magic, version, reserved, fingerprint, count, checksum, padding = _HEADER.unpack_from(payload)
    if magic != _MAGIC:
        raise PayloadError(f"Expected a payload that starts with {_MAGIC!r}, got {magic!r}.")
    if version != _VERSION:
        raise PayloadError(
            f"Expected payload version {_VERSION}, got {version}; server and sites must run the same medfed."
        )
    if reserved != 0 or padding != _NOTHING:
        raise PayloadError("Expected zeros in the reserved bytes of the payload, got something else.")
    if fingerprint != manifest.fingerprint:
        raise PayloadError(
            f"Expected an adapter with manifest {manifest.fingerprint.hex()[:16]}, got {fingerprint.hex()[:16]}; "
            "both ends must use the same study, backbone and adapter settings."
        )
    if count != manifest.num_elements or len(payload) != HEADER_BYTES + 4 * count:
        raise PayloadError(
            f"Expected {manifest.num_elements} elements in {HEADER_BYTES + 4 * manifest.num_elements} bytes, "
            f"got {count} elements in {len(payload)} bytes."
        )
    if zlib.crc32(memoryview(payload)[HEADER_BYTES:]) != checksum:
        raise PayloadError("Expected the payload's checksum to match its data, got a damaged payload; resend it.")
    vector_P = torch.from_numpy(np.frombuffer(payload, dtype="<f4", offset=HEADER_BYTES).astype(np.float32))
    manifest.check_vector(vector_P)
    return vector_P
