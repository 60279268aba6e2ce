"""A PEFT folder with other LoRA pairs: longer ones that carry folds too, or shorter ones that come close."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

from safetensors.torch import load_file, save_file
from torch import Tensor

LORA_A, LORA_B = ".lora_A.weight", ".lora_B.weight"
"""How the tensors of a LoRA layer end in a PEFT file, after the layer's name."""

WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"
"""The files of a PEFT folder."""

_PREFIX = "base_model.model."


def replace_pairs(folder: Path, pairs: Mapping[str, tuple[Tensor, Tensor]]) -> None:
    """Replace the LoRA pairs of a PEFT folder by others with the same scale; all else in it stays.

    Args:
        folder: as ``save_pretrained`` wrote it.
        pairs: (B, A) of each layer, of any rank, for the scale alpha / r that the folder has now.
    """
    config = json.loads((folder / CONFIG).read_text())
    scale = config["lora_alpha"] / config["r"]
    tensors = load_file(folder / WEIGHTS)
    for layer, (b, a) in pairs.items():
        tensors[f"{layer}{LORA_B}"], tensors[f"{layer}{LORA_A}"] = b.float().contiguous(), a.float().contiguous()
    ranks = {layer.removeprefix(_PREFIX): b.shape[1] for layer, (b, _) in pairs.items()}
    config["r"] = max(ranks.values())
    config["lora_alpha"] = scale * config["r"]
    config["rank_pattern"] = {layer: rank for layer, rank in ranks.items() if rank != config["r"]}
    config["alpha_pattern"] = {layer: scale * rank for layer, rank in config["rank_pattern"].items()}
    save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})
    (folder / CONFIG).write_text(json.dumps(config, indent=2, sort_keys=True))
