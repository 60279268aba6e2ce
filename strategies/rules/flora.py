"""FLoRA: stack the sites' pairs, fold the stack into the base, begin anew.

Wang et al. 2024, "FLoRA: Federated Fine-Tuning Large Language Models with Heterogeneous Low-Rank Adaptations". The
stack's product is the mean of the sites' products. Exact, and what is told grows with the number of sites; a
fresh pair has no memory of where learning was heading.
"""

from __future__ import annotations

import torch
from torch import Tensor

from medfed.canonical import derive_seed
from strategies.lora import LoraPair, lora_pairs
from strategies.rules.site_adapters import SiteAdapters
from strategies.rules.told_folds import Factors, FoldingRule


class Flora(FoldingRule):
    """Each round's mean product becomes part of the base; pairs start afresh, the rest is averaged."""

    name = "flora"
    fixed_subspace = False

    def merged(self, round_number: int, sites: SiteAdapters) -> tuple[dict[str, Tensor], Factors]:
        """A new random A and a B of zeros; and all that the sites' pairs were."""
        adapter, pairs = sites.mean(), lora_pairs(self.manifest)
        for pair in pairs:
            adapter[pair.a] = initial_a(pair, self.setting.seed, round_number)
            adapter[pair.b] = torch.zeros(pair.d_out, pair.rank)
        return adapter, {pair.layer: sites.side_by_side(pair) for pair in pairs}


def initial_a(pair: LoraPair, *facts: str | int) -> Tensor:
    """An A as LoRA begins with, drawn from ``facts``: uniform within 1 / sqrt(d_in) of zero, as PEFT has it."""
    generator = torch.Generator().manual_seed(derive_seed(0, "initial-a", *facts, pair.a))
    bound = pair.d_in**-0.5
    return torch.empty(pair.rank, pair.d_in).uniform_(-bound, bound, generator=generator)
