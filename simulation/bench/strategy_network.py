"""The digits network as a model with an adapter: LoRA pairs on its hidden layers, and a head that trains.

The tensors are named as PEFT names them, so that rules find the pairs. Gradients of single records are outer products
u v^T of two vectors in every tensor, and stay so in every part of a tensor that a rule may train
(:mod:`strategies.subspace`): norms and clipped sums come from u and v, and no gradient of a record is ever written
down.

Legend: S seeds, K sites, B records at a time, I inputs and O outputs of a layer, R rank, Z coordinates that train.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor
from torch.nn import functional

from medfed.adapter_manifest import AdapterManifest, TensorSpec
from simulation.bench.digits import LAYERS, gradient_factors
from strategies.lora import LoraPair, lora_pairs
from strategies.strategy import Tree
from strategies.subspace import Core, Part, Slice, Subspace, Whole

HEAD = "base_model.model.head.weight"
"""The last layer, bias in its last column."""

LORA_SCALE = 1.0
"""s = alpha / r in W = W0 + s B A."""

Factors = dict[str, tuple[Tensor, Tensor]]
"""For each tensor (u, v), [S, K, B, rows] and [S, K, B, columns]: a record's gradient is their outer product."""


def adapter_manifest(rank: int | None) -> AdapterManifest:
    """Tensors of the adapter: LoRA pairs and the head; with rank None all weights, as full fine-tuning trains them."""
    shapes: dict[str, tuple[int, int]] = {HEAD: (LAYERS[-1], LAYERS[-2] + 1)}
    for index, (num_in, num_out) in enumerate(pairwise(LAYERS[:-1])):
        if rank is None:
            shapes[f"{_layer(index)}.weight"] = (num_out, num_in + 1)
        else:
            shapes[f"{_layer(index)}.lora_A.weight"] = (rank, num_in)
            shapes[f"{_layer(index)}.lora_B.weight"] = (num_out, rank)
    specs = tuple(TensorSpec(name=name, shape=shapes[name]) for name in sorted(shapes))
    return AdapterManifest(method="full" if rank is None else "lora", rank=rank, tensors=specs)


def first_adapter(manifest: AdapterManifest, start: Sequence[Tensor], seed: int) -> dict[str, Tensor]:
    """The adapter before training: A uniform within 1 / sqrt(I) and B zero, as PEFT has them; the rest as it starts."""
    generator = torch.Generator().manual_seed(seed)
    adapter = {HEAD: start[-1].float()}
    for index, layer in enumerate(start[:-1]):
        adapter[f"{_layer(index)}.weight"] = layer.float()
    for pair in lora_pairs(manifest):
        uniform = torch.rand(pair.rank, pair.d_in, generator=generator)
        adapter[pair.a] = (2 * uniform - 1) / math.sqrt(pair.d_in)
        adapter[pair.b] = torch.zeros(pair.d_out, pair.rank)
    return {spec.name: adapter[spec.name].clone() for spec in manifest.tensors}


def base_layers(start: Sequence[Tensor], pairs: tuple[LoraPair, ...], folds: Sequence[Tree]) -> list[Tensor]:
    """The layers without the adapter, in float64: the start and whatever was folded into it."""
    layers = [layer.double() for layer in start]
    for index, pair in enumerate(pairs):
        if folds:  # one product of all pairs side by side
            b_OR = torch.cat([fold[pair.b].double() for fold in folds], 1)
            a_RI = torch.cat([fold[pair.a].double() for fold in folds], 0)
            layers[index] = layers[index] + functional.pad(LORA_SCALE * (b_OR @ a_RI), (0, 1))
    return layers


def layers_with(base: Sequence[Tensor], adapter: Mapping[str, Tensor]) -> list[Tensor]:
    """The layers [..., O, I + 1] that an adapter [..., rows, columns] makes of a base [..., O, I + 1]."""
    made: list[Tensor] = []
    for index, layer in enumerate(base[:-1]):
        name = _layer(index)
        if f"{name}.weight" in adapter:
            made.append(adapter[f"{name}.weight"])
            continue
        update = LORA_SCALE * (adapter[f"{name}.lora_B.weight"] @ adapter[f"{name}.lora_A.weight"])
        made.append(layer + functional.pad(update, (0, 1)))
    return [*made, adapter[HEAD]]


def record_gradients(x_SKBI: Tensor, y_SKB: Tensor, base: Sequence[Tensor], adapter: Mapping[str, Tensor]) -> Factors:
    """Factors of the gradients of each record's cross-entropy in every tensor of the adapter."""
    made: Factors = {}
    factors = gradient_factors(x_SKBI, y_SKB, layers_with(base, adapter))
    made[HEAD] = factors[-1]
    for index, (u, v) in enumerate(factors[:-1]):
        name = _layer(index)
        if f"{name}.weight" in adapter:
            made[f"{name}.weight"] = (u, v)
            continue
        b, a = adapter[f"{name}.lora_B.weight"], adapter[f"{name}.lora_A.weight"]
        made[f"{name}.lora_A.weight"] = (LORA_SCALE * (u @ b), v[..., :-1])
        made[f"{name}.lora_B.weight"] = (LORA_SCALE * u, v[..., :-1] @ a.mT)
    return made


@dataclass(frozen=True, eq=False)
class Directions:
    """What trains, for several seeds at once; each has the frames of its own seed.

    Attributes:
        subspaces: of each seed, of the same shapes.
    """

    subspaces: Sequence[Subspace]

    @property
    def manifest(self) -> AdapterManifest:
        """Of the coordinates."""
        return self.subspaces[0].manifest

    def factors(self, full: Factors) -> Factors:
        """Factors of the coordinates of gradients."""
        return {name: self._project(name, *full[name]) for name in self._names}

    def move(self, adapter: dict[str, Tensor], change_SKZ: Tensor) -> None:
        """Add coordinates to the tensors [S, K, rows, columns] of an adapter, in place."""
        pieces = change_SKZ.split_with_sizes([spec.num_elements for spec in self.manifest.tensors], -1)
        for spec, piece in zip(self.manifest.tensors, pieces, strict=True):
            change, target, part = (
                piece.reshape(*piece.shape[:-1], *spec.shape),
                adapter[spec.name],
                self._part(spec.name),
            )
            match part:
                case Whole():
                    target += change
                case Slice():
                    part.coordinates(target).add_(change)
                case Core():
                    target += self._frames(spec.name) @ change
                case _:
                    raise _unknown(part)

    @property
    def _names(self) -> list[str]:
        return [spec.name for spec in self.manifest.tensors]

    def _part(self, name: str) -> Part:
        return self.subspaces[0].parts[name]

    def _frames(self, name: str) -> Tensor:
        """Frames of a core, [S, 1, O, R]."""
        return torch.stack([_core(subspace.parts[name]).frame_OR for subspace in self.subspaces])[:, None]

    def _project(self, name: str, u: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        part = self._part(name)
        match part:
            case Whole():
                return u, v
            case Slice(axis=0):
                return u[..., part.start : part.stop], v
            case Slice():
                return u, v[..., part.start : part.stop]
            case Core():
                return u @ self._frames(name), v
            case _:
                raise _unknown(part)


def clipped_sum(factors: Factors, weight_SKB: Tensor, clip_norm_l2: float) -> Tensor:
    """The sum [S, K, Z] of the records' gradients, each of norm ``clip_norm_l2`` at most.

    Args:
        factors: of the gradients, in the order of the coordinates.
        weight_SKB: 1 for a drawn record, 0 for padding.
        clip_norm_l2: C; infinity clips nothing.
    """
    square = torch.zeros_like(weight_SKB)
    for u, v in factors.values():
        square += u.square().sum(-1) * v.square().sum(-1)
    # A zero gradient stays zero: C / 0 is infinite, and the factor is 1.
    scale_SKB = weight_SKB * (clip_norm_l2 / square.sqrt()).clamp(max=1.0)
    return torch.cat([((u * scale_SKB[..., None]).mT @ v).flatten(-2) for u, v in factors.values()], -1)


def _layer(index: int) -> str:
    return f"base_model.model.layer{index + 1}"


def _core(part: Part) -> Core:
    assert isinstance(part, Core)
    return part


def _unknown(part: Part) -> NotImplementedError:
    return NotImplementedError(f"Expected Whole, Slice or Core, got {type(part).__name__}; add it to Directions.")
