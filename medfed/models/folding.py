"""Low-rank updates folded into base weights, in the same order and with the same arithmetic at every site.

A fold adds s B A to the weight of each LoRA layer. It is computed in float64 and rounded once to float32, layer by
layer, so that machines with other linear algebra agree to the last bit but for rare ties.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from medfed.errors import StudyError
from medfed.models.peft_folder import LORA_A, LORA_B


@dataclass(frozen=True)
class Fold:
    """LoRA pairs that become part of the base.

    Attributes:
        pairs: A and B of each layer, under the names of a PEFT file; other ranks than the adapter's are allowed.
        digest: SHA-256 of names, shapes and values.
    """

    pairs: Mapping[str, Tensor]
    digest: bytes

    @classmethod
    def of(cls, tensors: Mapping[str, Tensor]) -> Fold:
        """The fold of these pairs."""
        hashed = hashlib.sha256()
        for name in sorted(tensors):
            hashed.update(f"{name}{list(tensors[name].shape)}".encode())
            hashed.update(tensors[name].detach().cpu().contiguous().numpy().tobytes())
        return cls(dict(tensors), hashed.digest())

    @property
    def layers(self) -> list[str]:
        """Names of the layers, sorted."""
        return sorted(name.removesuffix(LORA_A) for name in self.pairs if name.endswith(LORA_A))


@dataclass(frozen=True)
class ModelState:
    """All that training made of a backbone.

    Attributes:
        adapter_P: the adapter, float32.
        folds: updates that became part of the base weights, in order.
    """

    adapter_P: Tensor
    folds: tuple[Fold, ...] = ()


class FoldableBase:
    """The base weights of LoRA layers, to which folds can be added and taken away again.

    Args:
        layers: the LoRA layer and its scale, by the name it has in a PEFT file.
    """

    def __init__(self, layers: Mapping[str, tuple[nn.Module, float]]) -> None:
        self._layers = layers
        self._original: dict[str, Tensor] = {}
        self._folded: tuple[bytes, ...] = ()

    def fold(self, folds: Sequence[Fold]) -> None:
        """Have the base weights be the backbone's with exactly these folds, in this order.

        Folds that are in place already are not added again; the bits do not depend on what was in place before.

        Raises:
            StudyError: if a fold names a layer that is none, or does not fit it; the base is then as it was.
        """
        wanted = tuple(one.digest for one in folds)
        if wanted == self._folded:
            return
        for one in folds:
            self._check(one)
        if wanted[: len(self._folded)] != self._folded:
            for name, weight in self._original.items():
                self._weight(name).copy_(weight)
            self._folded = ()
        for one in folds[len(self._folded) :]:
            self._add(one)
        self._folded = wanted

    def _check(self, one: Fold) -> None:
        for name in one.layers:
            weight = self._weight(name)
            a, b = one.pairs[f"{name}{LORA_A}"], one.pairs[f"{name}{LORA_B}"]
            if (b.shape[0], a.shape[1]) != tuple(weight.shape) or b.shape[1] != a.shape[0]:
                raise StudyError(
                    f"Expected a fold of shape {list(weight.shape)} for {name}, got "
                    f"{list(b.shape)} times {list(a.shape)}."
                )

    def _add(self, one: Fold) -> None:
        for name in one.layers:
            weight, scale = self._weight(name), self._scale(name)
            a, b = one.pairs[f"{name}{LORA_A}"], one.pairs[f"{name}{LORA_B}"]
            self._original.setdefault(name, weight.clone())
            update = scale * (b.cpu().double() @ a.cpu().double())
            weight.copy_((weight.cpu().double() + update).float())

    def _weight(self, name: str) -> Tensor:
        layer = self._layer(name)[0]
        base = layer.base_layer
        if not isinstance(base, nn.Linear):
            raise StudyError(f"Expected a linear layer at {name} to fold into, got {type(base).__name__}.")
        return base.weight.data

    def _scale(self, name: str) -> float:
        return self._layer(name)[1]

    def _layer(self, name: str) -> tuple[nn.Module, float]:
        if name not in self._layers:
            raise StudyError(f"Expected a fold into a LoRA layer of the adapter, got {name!r}.")
        return self._layers[name]


def lora_layers(peft_model: nn.Module) -> dict[str, tuple[nn.Module, float]]:
    """The LoRA layers of a PEFT model and their scales alpha / r, by the names they have in its file."""
    return {
        name: (module, float(module.scaling["default"]))
        for name, module in peft_model.named_modules()
        if hasattr(module, "lora_A") and hasattr(module, "base_layer")
    }


def stacked(folds: Sequence[Mapping[str, Tensor]]) -> dict[str, tuple[Tensor, Tensor]]:
    """The sum of several updates as one pair (B, A) a layer, ranks side by side; no longer than the layer allows.

    Exact up to float64 rounding: where the ranks add up to more than a layer's smaller side, the sum is factored
    anew at that rank.
    """
    layers = sorted({name.removesuffix(LORA_A) for fold in folds for name in fold if name.endswith(LORA_A)})
    pairs = {}
    for layer in layers:
        b = torch.cat([fold[f"{layer}{LORA_B}"].double() for fold in folds if f"{layer}{LORA_B}" in fold], dim=1)
        a = torch.cat([fold[f"{layer}{LORA_A}"].double() for fold in folds if f"{layer}{LORA_A}" in fold], dim=0)
        if b.shape[1] > min(b.shape[0], a.shape[1]):
            b, a = compressed(b, a, min(b.shape[0], a.shape[1]))
        pairs[layer] = (b, a)
    return pairs


def compressed(b: Tensor, a: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """The best pair of a rank for a product B A (Eckart and Young 1936), singular values shared out evenly; float64.

    Shorter than ``rank`` where the product cannot have as much: no longer than B A has rows or columns, or B columns.
    """
    q_b, r_b = torch.linalg.qr(b.double())
    q_a, r_a = torch.linalg.qr(a.double().T)
    u, s, v = torch.linalg.svd(r_b @ r_a.T, full_matrices=False)
    root = s[:rank].sqrt()
    return (q_b @ u[:, :rank]) * root, root[:, None] * (v[:rank] @ q_a.T)
