"""What a round of each strategy would send for a ViT-B: counted from the manifests that the strategies make.

LoRA on queries and values of the twelve blocks, twice the rank that the arm has on digits (8 for most), float32, no
head, no header (some hundred bytes). Full fine-tuning sends all weights of the backbone, ``head-only`` a head of ten
classes.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from medfed.adapter_manifest import AdapterManifest, TensorSpec
from simulation.bench.strategy_rounds import ROUNDS, Arm, strategy_for

NUM_BLOCKS, WIDTH, MLP_WIDTH = 12, 768, 3072
NUM_PATCHES, PATCH_VALUES = 196, 3 * 16 * 16
NUM_CLASSES = 10
RANK_SCALE = 2
FLOAT32_BYTES = 4
MEGABYTE = 1e6


@dataclass(frozen=True)
class Traffic:
    """Megabytes (10^6 bytes) of a round and site.

    Attributes:
        up: what a site sends.
        down: what it is sent, mean over :data:`~simulation.bench.strategy_rounds.ROUNDS` rounds.
        last_down: in the last of them: replay lists grow.
    """

    up: float
    down: float
    last_down: float

    @classmethod
    def of(cls, arm: Arm) -> Traffic | None:
        """Of an arm; none where nothing is sent in rounds."""
        if arm.alone or arm.pooled:
            return None
        manifest = vit_b_manifest(arm)
        strategy, adapter = strategy_for(arm, manifest, seed=0), manifest.num_elements
        phases = [strategy.plan(number) for number in range(1, ROUNDS + 1)]
        up = [phase.upload_manifest.num_elements for phase in phases]
        down = [adapter + (phase.broadcast.num_elements if phase.broadcast else 0) for phase in phases]
        return cls(_megabytes(up), _megabytes(down), _megabytes(down[-1:]))


def vit_b_manifest(arm: Arm) -> AdapterManifest:
    """The adapter that an arm would have on a ViT-B."""
    shapes: dict[str, tuple[int, ...]] = {}
    rank = None if arm.rank is None else RANK_SCALE * arm.rank
    if arm.rule == "head-only":
        shapes["head.weight"] = (NUM_CLASSES, WIDTH + 1)
    elif rank is None:
        shapes["embedding"] = (
            PATCH_VALUES + 1 + NUM_PATCHES + 1 + 1,
            WIDTH,
        )  # patches and bias, positions, class token
        shapes["norm"] = (2, WIDTH)
    for index in range(0 if arm.rule == "head-only" else NUM_BLOCKS):
        block = f"base_model.model.blocks.{index:02d}"
        if rank is None:
            shapes[f"{block}.attention"] = (4 * WIDTH, WIDTH + 1)
            shapes[f"{block}.mlp.in"] = (MLP_WIDTH, WIDTH + 1)
            shapes[f"{block}.mlp.out"] = (WIDTH, MLP_WIDTH + 1)
            shapes[f"{block}.norms"] = (4, WIDTH)
            continue
        for name in ("query", "value"):
            shapes[f"{block}.{name}.lora_A.weight"] = (rank, WIDTH)
            shapes[f"{block}.{name}.lora_B.weight"] = (WIDTH, rank)
    specs = tuple(TensorSpec(name=name, shape=shapes[name]) for name in sorted(shapes))
    return AdapterManifest(method="lora" if rank else "full", rank=rank, tensors=specs)


def _megabytes(counts: Iterable[int]) -> float:
    counted = list(counts)
    return FLOAT32_BYTES * sum(counted) / len(counted) / MEGABYTE
