"""Twin: two one-sided halves side by side, dW = B1 A^ + B^ A2 with public orthonormal frames A^ and B^.

Of an adapter of rank r (even), half is an FFA-LoRA with frozen A^ and half its mirror image with frozen B^::

    B = [ B1 | B^ ]     A = [ A^ ]      trains: B1, A2
                            [ A2 ]

So it is a plain LoRA adapter of rank r, in which both sides learn. Exact: the product is linear in (B1, A2). Noise
enters it linearly too, without a product of two noises.
"""

from __future__ import annotations

import torch
from torch import Tensor

from medfed.adapter_manifest import AdapterManifest, TensorSpec
from medfed.errors import StudyError
from strategies.lora import frame, is_a, is_b, lora_pairs
from strategies.strategy import Rule, Setting, State, Tree
from strategies.subspace import Part, Slice, Subspace, Whole


class Twin(Rule):
    """B1, A2 and whatever is no LoRA pair train; the frames stay for good.

    Raises:
        StudyError: for an odd rank, or a layer that has fewer dimensions than half the rank.
    """

    name = "twin"
    exact = True
    takes_ranks = True

    def __init__(self, setting: Setting) -> None:
        super().__init__(setting)
        half_of(setting.manifest, self.name)

    def start(self, adapter: Tree) -> State:
        """B1 and A2 are zero, so the model computes what it did."""
        return State({**adapter, **twin_frames(self.manifest, self.setting.seed)})

    def trainable(self, round_number: int) -> Subspace:
        """The first half of B's columns, the second half of A's rows."""
        return twin_subspace(self.manifest)


def half_of(manifest: AdapterManifest, rule: str) -> int:
    """Half the rank.

    Raises:
        StudyError: as :class:`Twin`.
    """
    rank = manifest.rank or 0
    if rank % 2:
        raise StudyError(
            f"Expected an even adapter.rank for strategy {rule!r}, which trains half of each side, got {rank}; "
            f"use {rank + 1}."
        )
    for pair in lora_pairs(manifest):
        if rank // 2 > min(pair.d_in, pair.d_out):
            raise StudyError(f"Expected adapter.rank of at most {2 * min(pair.d_in, pair.d_out)}, got {rank}.")
    return rank // 2


def twin_frames(manifest: AdapterManifest, *facts: str | int) -> dict[str, Tensor]:
    """The pairs of an adapter with new frames, drawn from ``facts``, and zeros in what trains."""
    tensors: dict[str, Tensor] = {}
    for pair in lora_pairs(manifest):
        half = pair.rank // 2
        frame_a, frame_b = frame(pair.d_in, half, *facts, pair.a).T, frame(pair.d_out, half, *facts, pair.b)
        tensors[pair.a] = torch.cat([frame_a, torch.zeros(half, pair.d_in)])
        tensors[pair.b] = torch.cat([torch.zeros(pair.d_out, half), frame_b], dim=1)
    return tensors


def twin_subspace(manifest: AdapterManifest) -> Subspace:
    """What trains between the frames."""

    def part_of(spec: TensorSpec) -> Part:
        if is_a(spec.name):
            return Slice(axis=0, start=spec.shape[0] // 2, stop=spec.shape[0])
        if is_b(spec.name):
            return Slice(axis=1, start=0, stop=spec.shape[1] // 2)
        return Whole()

    return Subspace.of(manifest, part_of)
