"""RoLoRA: B and A take turns (Chen et al. 2024, "Robust Federated Finetuning of LLMs via Alternating Optimization").

Exact in every round: one factor is the same at all sites. ``alt-gauge`` also makes that factor orthonormal first, by
a QR decomposition that leaves the product as it is: clipping and noise then act on the product itself, whatever the
scale to which earlier rounds let the frozen factor grow.
"""

from __future__ import annotations

from dataclasses import replace

from medfed.adapter_manifest import TensorSpec
from strategies.lora import is_a, is_b, lora_pairs, with_orthonormal_a, with_orthonormal_b
from strategies.strategy import Rule, State
from strategies.subspace import Part, Subspace, Whole


class RoLora(Rule):
    """B trains in odd rounds, A in even ones; whatever is no LoRA pair trains in all."""

    name = "rolora"
    exact = True
    takes_ranks = True
    fixed_subspace = False

    def trainable(self, round_number: int) -> Subspace:
        """All but the factor whose turn it is not."""
        is_frozen = is_a if _trains_b(round_number) else is_b

        def part_of(spec: TensorSpec) -> Part | None:
            return None if is_frozen(spec.name) else Whole()

        return Subspace.of(self.manifest, part_of)


class AltGauge(RoLora):
    """RoLoRA with an orthonormal frozen factor."""

    name = "alt-gauge"

    def gauge(self, round_number: int, state: State) -> State:
        """The same product; orthonormal is whichever factor is frozen in the round."""
        refactored = with_orthonormal_a if _trains_b(round_number) else with_orthonormal_b
        adapter = dict(state.adapter)
        for pair in lora_pairs(self.manifest):
            adapter[pair.b], adapter[pair.a] = refactored(adapter[pair.b], adapter[pair.a])
        return replace(state, adapter=adapter)


def _trains_b(round_number: int) -> bool:
    return round_number % 2 == 1
