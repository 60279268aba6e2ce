"""LoRA pairs in an adapter: which tensors belong together, frames, and factorisations of the same product.

Notation: the update of a layer is s B A, B of shape (d_out, r), A of shape (r, d_in), s = alpha / r.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from medfed.adapter_manifest import AdapterManifest
from medfed.canonical import derive_seed
from medfed.errors import StudyError
from medfed.models.peft_folder import LORA_A, LORA_B


@dataclass(frozen=True)
class LoraPair:
    """The two tensors of one layer's update.

    Attributes:
        layer: their common name.
        d_out: rows of B.
        rank: r.
        d_in: columns of A.
    """

    layer: str
    d_out: int
    rank: int
    d_in: int

    @property
    def a(self) -> str:
        """Name of A."""
        return f"{self.layer}{LORA_A}"

    @property
    def b(self) -> str:
        """Name of B."""
        return f"{self.layer}{LORA_B}"


def lora_pairs(manifest: AdapterManifest) -> tuple[LoraPair, ...]:
    """The pairs of an adapter, in the order of their layers; heads and the like are in none.

    Raises:
        StudyError: for a pair of a convolution, whose product is no matrix.
    """
    shapes = {spec.name: spec.shape for spec in manifest.tensors}
    layers = [name.removesuffix(LORA_A) for name in shapes if name.endswith(LORA_A)]
    for layer in layers:
        if len(shapes[f"{layer}{LORA_A}"]) != 2:
            raise StudyError(
                f"Expected adapter.targets of linear layers for this strategy, got {layer}, a convolution; choose "
                "other targets, or strategy.name = 'fedit'."
            )
    return tuple(
        LoraPair(layer, shapes[f"{layer}{LORA_B}"][0], shapes[f"{layer}{LORA_A}"][0], shapes[f"{layer}{LORA_A}"][1])
        for layer in layers
    )


def is_a(name: str) -> bool:
    """Whether a tensor is the A of a pair."""
    return name.endswith(LORA_A)


def is_b(name: str) -> bool:
    """Whether a tensor is the B of a pair."""
    return name.endswith(LORA_B)


def frame(rows: int, columns: int, *facts: str | int) -> Tensor:
    """A random orthonormal frame, uniform among them: float32, orthonormal columns.

    Everybody who knows ``facts`` draws the same one, so nobody needs to send it. Computed in float64 and rounded
    once: machines with other linear algebra may differ in the last bit of an element.

    Args:
        rows: length of a column, at least ``columns``.
        columns: how many.
        facts: what it is drawn from: the study's seed, a layer, a round.

    Raises:
        StudyError: if there are more columns than rows.
    """
    _check_room(rows, columns)
    generator = torch.Generator().manual_seed(derive_seed(0, "frame", *facts))
    normal = torch.randn(rows, columns, generator=generator, dtype=torch.float64)
    q, r = torch.linalg.qr(normal)
    orthonormal: Tensor = q * torch.sign(torch.diagonal(r))
    return orthonormal.float()


def products(adapter: Mapping[str, Tensor], pairs: tuple[LoraPair, ...]) -> dict[str, Tensor]:
    """B A of each layer, float64, without the scale."""
    return {pair.layer: adapter[pair.b].double() @ adapter[pair.a].double() for pair in pairs}


def with_orthonormal_a(b: Tensor, a: Tensor) -> tuple[Tensor, Tensor]:
    """The same product with orthonormal rows of A: A^T = Q R, so B A = (B R^T) Q^T.

    Raises:
        StudyError: if A has more rows than columns.
    """
    _check_room(a.shape[1], a.shape[0])
    q, r = torch.linalg.qr(a.double().T)
    return (b.double() @ r.T).float(), q.T.contiguous().float()


def with_orthonormal_b(b: Tensor, a: Tensor) -> tuple[Tensor, Tensor]:
    """The same product with orthonormal columns of B: B = Q R, so B A = Q (R A).

    Raises:
        StudyError: if B has more columns than rows.
    """
    _check_room(*b.shape)
    q, r = torch.linalg.qr(b.double())
    return q.contiguous().float(), (r @ a.double()).float()


def _check_room(dimensions: int, rank: int) -> None:
    if rank > dimensions:
        raise StudyError(
            f"Expected adapter.rank of at most {dimensions} for orthonormal frames in the smallest layer, got {rank}; "
            "lower it, or use strategy 'rolora'."
        )
