"""An adapter folder of lower rank: the best approximation of each layer's update, and how good it is.

A study whose rule folds updates into the base ends with an adapter whose rank has grown. Where that is too large to
keep or to serve, the largest singular values of each update are kept; how much is lost is measured, not promised.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from medfed.errors import StudyError
from medfed.models.folding import compressed
from medfed.models.peft_folder import CONFIG, LORA_A, LORA_B, WEIGHTS, replace_pairs

_LARGEST = 1e9
"""No rank and no alpha is larger."""


@dataclass(frozen=True)
class CompressedLayer:
    """One layer's update before and after.

    Attributes:
        layer: its name in the file.
        rank: of the update as it was.
        kept: rank that was kept.
        norm: Frobenius norm of B A as it was, without the scale.
        lost: Frobenius norm of what is lost; norm and lost are of the same matrix, so their ratio is the error.
    """

    layer: str
    rank: int
    kept: int
    norm: float
    lost: float


def compress(folder: Path, out: Path, rank: int) -> list[CompressedLayer]:
    """Write a copy of a PEFT folder whose LoRA layers have at most a rank; the same scale, all else as it was.

    Args:
        folder: an adapter of PEFT.
        out: a folder that does not exist yet.
        rank: at least 1.

    Returns:
        What it cost, layer by layer.

    Raises:
        StudyError: if the folder holds no adapter with LoRA layers, layers differ in alpha / r, or ``out`` exists.
    """
    try:
        tensors = load_file(folder / WEIGHTS)
        config = json.loads((folder / CONFIG).read_text())
    except (OSError, SafetensorError, ValueError, RecursionError) as error:
        raise StudyError(f"Expected an adapter folder at {folder}, got: {error}; check the path.") from None
    layers = sorted(name.removesuffix(LORA_A) for name in tensors if name.endswith(LORA_A))
    if not layers:
        raise StudyError(f"Expected LoRA layers in {folder}, got none; there is nothing to compress.")
    _check_form(config, tensors, layers, folder)
    _check_scale(config, folder)
    if out.exists():
        raise StudyError(f"Expected a new folder to write to, got {out}, which exists; name another.")
    pairs, facts = {}, []
    for layer in layers:
        b, a = tensors[f"{layer}{LORA_B}"].double(), tensors[f"{layer}{LORA_A}"].double()
        kept = min(rank, b.shape[1])
        pairs[layer] = (b, a) if kept == b.shape[1] else compressed(b, a, kept)
        lost = b @ a - pairs[layer][0] @ pairs[layer][1]
        facts.append(CompressedLayer(layer, b.shape[1], kept, float((b @ a).norm()), float(lost.norm())))
    shutil.copytree(folder, out)
    replace_pairs(out, pairs)
    return facts


def _check_form(config: Any, tensors: Mapping[str, Tensor], layers: list[str], folder: Path) -> None:
    """Refuse a configuration without ranks and scales, and a layer that is not a pair of finite matrices.

    Raises:
        StudyError: says which.
    """
    found = config if isinstance(config, dict) else {}
    numbers = [found.get("r"), found.get("lora_alpha")]
    for key in ("rank_pattern", "alpha_pattern"):
        pattern = found.get(key) or {}
        numbers += pattern.values() if isinstance(pattern, dict) else [None]
    if not all(isinstance(number, (int, float)) and 0 < number < _LARGEST for number in numbers):
        raise StudyError(
            f"Expected ranks and alphas above 0 in {folder / CONFIG}, got something else; restore the file."
        )
    for layer in layers:
        b, a = tensors.get(f"{layer}{LORA_B}"), tensors[f"{layer}{LORA_A}"]
        if b is None or b.dim() != 2 or a.dim() != 2 or b.shape[1] != a.shape[0] or b.shape[1] < 1:
            raise StudyError(f"Expected a pair of matrices B A as {layer!r} in {folder}, got others; restore the file.")
        if not (
            a.is_floating_point()
            and b.is_floating_point()
            and a.double().isfinite().all()
            and b.double().isfinite().all()
        ):
            raise StudyError(f"Expected finite numbers as {layer!r} in {folder}, got others; restore the file.")


def _check_scale(config: dict[str, Any], folder: Path) -> None:
    """Refuse layers that PEFT scales otherwise than by one alpha / r for all.

    Raises:
        StudyError: names the setting.
    """
    for key in ("use_rslora", "use_dora"):
        if config.get(key):
            raise StudyError(
                f"Expected an adapter without {key} in {folder}, got one with it; it cannot be compressed."
            )
    ranks, alphas = config.get("rank_pattern") or {}, config.get("alpha_pattern") or {}
    scale = config["lora_alpha"] / config["r"]
    for layer in {**ranks, **alphas}:
        own = alphas.get(layer, config["lora_alpha"]) / ranks.get(layer, config["r"])
        if abs(own - scale) > 1e-9 * scale:
            raise StudyError(
                f"Expected one alpha / r for all layers in {folder}, got {own:g} for {layer!r} and {scale:g} for "
                "others; it cannot be compressed."
            )


def relative_error(layers: list[CompressedLayer]) -> float:
    """Norm of all that is lost over the norm of all updates; 0 for an update of zeros."""
    norm = sum(layer.norm**2 for layer in layers) ** 0.5
    return sum(layer.lost**2 for layer in layers) ** 0.5 / norm if norm else 0.0
