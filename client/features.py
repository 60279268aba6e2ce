"""The frozen-prefix feature cache: an image is encoded once, not once per round.

Features are patient data. They are held in memory, and on disk only encrypted: AES-256-GCM under a key that
stays in the site's configuration folder, readable by its owner alone. A key of an entry names the weights
and how far the prefix reaches, the preprocessing, and the image's bytes; change any and it is another entry.
"""

from __future__ import annotations

import contextlib
import logging
import os
import secrets
from collections import OrderedDict
from collections.abc import Sequence
from pathlib import Path

import torch
from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from safetensors.torch import load, save
from torch import Tensor

from client.data import Item
from medfed.canonical import canonical_bytes, sha256_hex
from medfed.errors import SiteError
from medfed.models.adapted import AdaptedModel

_log = logging.getLogger("medfed.client.features")

FEATURES_VERSION = 1
"""Raised when a backbone's code computes other features from the same weights."""

_NONCE_BYTES = 12


class FeatureCache:
    """Features by key: recent ones in memory, all of them encrypted on disk.

    Args:
        directory: where entries are kept; None keeps memory only.
        key: 32 bytes; needed with a directory.
        max_memory_bytes: least recently used features beyond it are dropped from memory.
        max_disk_bytes: no further entry is written beyond it; oldest entries are dropped first.
    """

    def __init__(
        self,
        directory: Path | None = None,
        key: bytes | None = None,
        *,
        max_memory_bytes: int = 2 * 2**30,
        max_disk_bytes: int = 16 * 2**30,
    ) -> None:
        if directory is not None and key is None:
            raise ValueError("Expected a key for a feature cache on disk, got none; features are patient data.")
        self._directory = directory
        self._cipher = AESGCM(key) if key is not None else None
        self._memory: OrderedDict[str, Tensor] = OrderedDict()
        self._memory_bytes = 0
        self._max_memory_bytes = max_memory_bytes
        self._max_disk_bytes = max_disk_bytes
        if directory is not None:
            directory.mkdir(parents=True, exist_ok=True, mode=0o700)

    def batch(self, items: Sequence[Item], model: AdaptedModel) -> Tensor:
        """Features of several images, stacked, on the model's device."""
        return torch.stack([self._features_of(item, model) for item in items]).to(model.device)

    def features_of(self, item: Item, model: AdaptedModel) -> Tensor:
        """Features of one image after the model's frozen prefix, on the model's device, without batch axis.

        Images are encoded one at a time: a batched product may round otherwise, and features must not
        depend on which images they were computed beside.
        """
        return self._features_of(item, model).to(model.device)

    def _features_of(self, item: Item, model: AdaptedModel) -> Tensor:
        """Features of one image, on the CPU."""
        if model.num_frozen_stages == 0:
            return as_three_channels(item.image_CHW)
        parts = [
            FEATURES_VERSION,
            torch.__version__,
            model.prefix_digest,
            model.pixels.digest,
            item.image_digest,
            str(model.device),
        ]
        key = sha256_hex(canonical_bytes(parts))
        features = self._recall(key)
        if features is None:
            features = model.encode(as_three_channels(item.image_CHW)[None].to(model.device))[0].cpu()
            self._keep_on_disk(key, features)
            self._keep_in_memory(key, features)
        return features

    def _recall(self, key: str) -> Tensor | None:
        if key in self._memory:
            self._memory.move_to_end(key)
            return self._memory[key]
        if self._directory is None or self._cipher is None:
            return None
        try:
            sealed = (self._directory / key).read_bytes()
            opened = self._cipher.decrypt(sealed[:_NONCE_BYTES], sealed[_NONCE_BYTES:], key.encode())
        except (FileNotFoundError, InvalidTag, ValueError):
            return None  # never stored, another key, or damaged: compute it again
        features = load(opened)["features"]
        self._keep_in_memory(key, features)
        return features

    def _keep_in_memory(self, key: str, features: Tensor) -> None:
        self._memory[key] = features
        self._memory_bytes += features.nbytes
        while self._memory_bytes > self._max_memory_bytes and len(self._memory) > 1:
            _, dropped = self._memory.popitem(last=False)
            self._memory_bytes -= dropped.nbytes

    def _keep_on_disk(self, key: str, features: Tensor) -> None:
        if self._directory is None or self._cipher is None:
            return
        nonce = secrets.token_bytes(_NONCE_BYTES)
        sealed = nonce + self._cipher.encrypt(nonce, save({"features": features.contiguous()}), key.encode())
        partial = self._directory / f".{key}.{os.getpid()}.{secrets.token_hex(4)}"
        try:
            self._make_room(len(sealed))
            partial.write_bytes(sealed)
            partial.replace(self._directory / key)
        except OSError as error:  # a full disk, another process that tidies up: the cache is a convenience
            partial.unlink(missing_ok=True)
            _log.warning("event=feature_not_stored kind=%s", type(error).__name__)

    def _make_room(self, num_bytes: int) -> None:
        assert self._directory is not None
        entries = [(entry.stat(), entry) for entry in self._directory.iterdir() if not entry.name.startswith(".")]
        used = sum(stat.st_size for stat, _ in entries)
        for stat, entry in sorted(entries, key=lambda pair: pair[0].st_mtime):
            if used + num_bytes <= self._max_disk_bytes:
                return
            entry.unlink(missing_ok=True)
            used -= stat.st_size


def as_three_channels(image_CHW: Tensor) -> Tensor:
    """A one-channel image as three equal channels; anything else as it is."""
    if image_CHW.dim() == 3 and image_CHW.shape[0] == 1:
        return image_CHW.expand(3, -1, -1)
    return image_CHW


def cache_key(path: Path) -> bytes:
    """The site's cache key: 32 random bytes in a file that only its owner can read; made at the first call.

    Raises:
        SiteError: if others may read the file, or it holds no key.
    """
    path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    if not path.exists():
        # Written beside its place and linked there: another process finds it whole or not at all.
        partial = path.with_name(f".{path.name}.{os.getpid()}")
        with os.fdopen(os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "wb") as file:
            file.write(secrets.token_bytes(32))
            file.flush()
            os.fsync(file.fileno())
        with contextlib.suppress(FileExistsError):
            os.link(partial, path)
        partial.unlink()
    if path.stat().st_mode & 0o077:
        raise SiteError(f"Expected {path} to be readable by its owner only; run: chmod 600 {path}")
    key = path.read_bytes()
    if len(key) != 32:
        raise SiteError(f"Expected 32 bytes in {path}, got {len(key)}; remove it and its cache to make a new one.")
    return key
