"""FFA-LoRA: A is frozen, B is averaged (Sun et al. 2024, "Improving LoRA in Privacy-preserving Federated Learning").

Exact: mean(B_k) A = mean(B_k A). Noise enters the product once. A is orthonormal here, which makes the norm of B the
norm of the product: noise on B is noise on the product, of the same size in every direction. With such an A the SVD
that FedSVD (Lee et al. 2025) takes each round changes nothing, so this is that rule too (a test shows it).
"""

from __future__ import annotations

from torch import Tensor

from medfed.adapter_manifest import AdapterManifest, TensorSpec
from strategies.lora import frame, is_a, lora_pairs
from strategies.strategy import Rule, State, Tree
from strategies.subspace import Part, Subspace, Whole


class FfaLora(Rule):
    """B and whatever is no LoRA pair trains; A is a random orthonormal frame for good."""

    name = "ffa-lora"
    exact = True
    takes_ranks = True

    def start(self, adapter: Tree) -> State:
        """Orthonormal A; B is zero, so the model computes what it did."""
        return State({**adapter, **frames_of_a(self.manifest, self.setting.seed)})

    def trainable(self, round_number: int) -> Subspace:
        """All but A."""
        return Subspace.of(self.manifest, all_but_a)


def frames_of_a(manifest: AdapterManifest, *facts: str | int) -> dict[str, Tensor]:
    """An orthonormal A for each pair, drawn from ``facts``."""
    return {pair.a: frame(pair.d_in, pair.rank, *facts, pair.a).T.contiguous() for pair in lora_pairs(manifest)}


def all_but_a(spec: TensorSpec) -> Part | None:
    """Everything trains but the A of each pair."""
    return None if is_a(spec.name) else Whole()
