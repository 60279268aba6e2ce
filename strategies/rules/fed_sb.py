"""Fed-SB: between two fixed frames a small square core is averaged, dW = s B^ R A^ (Singhal et al. 2025, "Fed-SB").

Exact, and by far the smallest upload: r x r numbers a layer, so that much larger ranks are affordable. DP noise falls
on r x r coordinates instead of (d_out + d_in) r. Here the frames are random and public; the paper takes them from the
singular vectors of a first gradient step, which would cost privacy.
"""

from __future__ import annotations

from functools import cached_property

from medfed.adapter_manifest import TensorSpec
from strategies.lora import frame, is_a, is_b, lora_pairs
from strategies.rules.ffa_lora import frames_of_a
from strategies.strategy import Rule, State, Tree
from strategies.subspace import Core, Part, Subspace, Whole


class FedSB(Rule):
    """The core of each pair, carried as B = B^ R, and whatever is no LoRA pair trains."""

    name = "fed-sb"
    exact = True
    takes_ranks = True

    def start(self, adapter: Tree) -> State:
        """Orthonormal A; the core is zero, so the model computes what it did."""
        return State({**adapter, **frames_of_a(self.manifest, self.setting.seed)})

    def trainable(self, round_number: int) -> Subspace:
        """B within the span of its frame."""
        return self._cores

    @cached_property
    def _cores(self) -> Subspace:
        rows = {pair.b: pair.d_out for pair in lora_pairs(self.manifest)}

        def part_of(spec: TensorSpec) -> Part | None:
            if is_a(spec.name):
                return None
            if is_b(spec.name):
                return Core(frame(rows[spec.name], spec.shape[1], self.setting.seed, spec.name))
            return Whole()

        return Subspace.of(self.manifest, part_of)
