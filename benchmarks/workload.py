"""The two workloads: architectures, data and study, the same for the plain loop and for the apps.

``vit16q``: 16 sites x 16 images, a small vision transformer (192 wide, 6 blocks, 3 heads, 64 tokens) with
LoRA of rank 8 on queries and values, and its head. One step is tens of milliseconds: what an engine adds
should not show. ``tiny100``: 100 sites x 16 vectors, a multilayer perceptron of 9,957 parameters, all of them
trained. One step is under a millisecond: what an engine adds is nearly all there is to see.

Legend: B images, C channels, H height, W width, D features.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

SEED = 0
NUM_CLASSES = 10
BATCH_SIZE = 16
LEARNING_RATE = 0.05
LORA_RANK, LORA_ALPHA = 8, 8.0
TARGET = "label"
NO_WEIGHTS = "0" * 64


class VisionTransformer(nn.Module):
    """Random weights in the shape of a ViT; both stages adapt, so no prefix can be cached and every step is full.

    The product's feature cache would skip the patch embedding, which no adapter reaches; one stage for the whole
    transformer keeps the work equal to the plain loop's.
    """

    stages: Sequence[str] = ("vit", "head")
    targets = r"vit\.layers\.\d+\.attention\.(q_proj|v_proj)"
    heads = ("head",)

    def __init__(self) -> None:
        super().__init__()
        from transformers import ViTConfig, ViTModel

        config = ViTConfig(
            hidden_size=192, num_hidden_layers=6, num_attention_heads=3, intermediate_size=768, image_size=64,
            patch_size=8, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
        )  # fmt: skip
        config._attn_implementation = "sdpa"
        self.vit = ViTModel(config, add_pooling_layer=False)
        self.head = nn.Linear(192, NUM_CLASSES)

    def resume(self, image_BCHW: Tensor, num_stages: int) -> Tensor:
        embedding_BD: Tensor = self.vit(pixel_values=image_BCHW).last_hidden_state[:, 0]
        return embedding_BD

    def classify(self, embedding_BD: Tensor) -> dict[str, Tensor]:
        return {TARGET: self.head(embedding_BD)}


class Perceptron(nn.Module):
    """192 -> 49 -> 10: 9,957 parameters."""

    stages: Sequence[str] = ("f1", "f2")
    targets = None
    heads = ("f1", "f2")

    def __init__(self) -> None:
        super().__init__()
        self.f1, self.f2 = nn.Linear(192, 49), nn.Linear(49, NUM_CLASSES)

    def resume(self, image_BD: Tensor, num_stages: int) -> Tensor:
        return nn.functional.relu(self.f1(image_BD))

    def classify(self, embedding_BD: Tensor) -> dict[str, Tensor]:
        return {TARGET: self.f2(embedding_BD)}


@dataclass(frozen=True)
class Workload:
    """Who trains what, on how much.

    Attributes:
        name: also the backbone's name in studies, after ``benchmark-``.
        architecture: of the module.
        image_shape: of one image.
        num_sites: virtual hospitals.
        num_images: training images of each; one step per round and batch of 16.
    """

    name: str
    architecture: Callable[[], Any]
    image_shape: tuple[int, ...]
    num_sites: int
    num_images: int = 16

    def module(self) -> Any:
        """The module, the same at every call."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(SEED)
            return self.architecture()

    def data(self, site: int) -> tuple[Tensor, Tensor]:
        """Images and classes of a site: noise, for nothing is to be learnt here."""
        generator = torch.Generator().manual_seed(1000 + site)
        images = torch.randn(self.num_images, *self.image_shape, generator=generator)
        return images, torch.randint(0, NUM_CLASSES, (self.num_images,), generator=generator)

    def site_names(self) -> list[str]:
        return [f"site-{site:03d}" for site in range(self.num_sites)]

    def write_cohorts(self, folder: Path) -> list[Path]:
        """Write every site's images as files, and return their manifests."""
        return [self._write_cohort(site, name, folder) for site, name in enumerate(self.site_names())]

    def _write_cohort(self, site: int, name: str, folder: Path) -> Path:
        (folder / name).mkdir(parents=True)
        images, classes = self.data(site)
        rows = [f"image,patient_id,split,{TARGET}"]
        for index, (image, label) in enumerate(zip(images, classes.tolist(), strict=True)):
            np.save(folder / name / f"{index}.npy", image.numpy())
            rows.append(f"{index}.npy,{name}-{index},train,{label}")
        # A cohort needs a held-out patient; the benchmark never evaluates.
        np.save(folder / name / "held-out.npy", np.zeros(self.image_shape, dtype=np.float32))
        rows.append(f"held-out.npy,{name}-held-out,test,0")
        manifest = folder / name / "manifest.csv"
        manifest.write_text("\n".join(rows) + "\n")
        return manifest

    def study(self, num_rounds: int) -> dict[str, Any]:
        """The study, as its file would say it; plain SGD, sequential order, every site weighs the same."""
        targets = self.architecture.targets  # type: ignore[attr-defined]
        lora = {"method": "lora", "rank": LORA_RANK, "alpha": LORA_ALPHA, "targets": f"regex:{targets}"}
        return {
            "name": self.name,
            "seed": SEED,
            "backbone": {"name": f"benchmark-{self.name}", "sha256": NO_WEIGHTS},
            "adapter": lora if targets else {"method": "heads"},
            "task": {
                "kind": "classification",
                "targets": {TARGET: [f"class-{index}" for index in range(NUM_CLASSES)]},
            },
            "training": {
                "local_epochs": 1,
                "batch_size": BATCH_SIZE,
                "learning_rate": LEARNING_RATE,
                "optimizer": "sgd",
                "order": "sequential",
            },
            "rounds": {"num_rounds": num_rounds},
            "strategy": {"name": "fedit", "weighting": "uniform"},
            "sites": [{"name": name} for name in self.site_names()],
        }


WORKLOADS = {
    "vit16q": Workload("vit16q", VisionTransformer, (3, 64, 64), num_sites=16),
    "tiny100": Workload("tiny100", Perceptron, (192,), num_sites=100),
}


def workload(name: str, num_sites: int | None = None) -> Workload:
    """A workload by name, with fewer sites if asked."""
    return WORKLOADS[name] if num_sites is None else replace(WORKLOADS[name], num_sites=num_sites)
