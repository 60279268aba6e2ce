"""How far averaging A and B apart is from averaging updates, told by one number a layer.

The error E = mean(B) mean(A) - mean(B A) of a layer cannot be computed from the means. But u^T B_k A_k v, for public
random u and v, is one number, and linear in the site's product: its mean and the means of B and A give u^T E v. For
standard normal u and v the expected square of that is the squared Frobenius norm of E (Hutchinson 1989), so the sum
over layers estimates how large the error is beside the mean update. It costs one float a layer, and no privacy where
the adapters are private already.

An estimate from few layers is rough: its spread is about that of a chi-square of as many degrees of freedom.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from medfed.adapter_manifest import AdapterManifest
from medfed.canonical import derive_seed
from strategies.lora import LoraPair, lora_pairs
from strategies.strategy import LocalResult, Stat, Tree

NAIVE_ERROR = "naive-error"
"""Name of the statistic, and of the estimate in the server's memory."""

LARGE = 0.2
"""Share of the mean update from which another rule is worth a look; measured in ``docs/benchmarks/strategies.md``."""


def naive_error_stat(manifest: AdapterManifest, seed: int, round_number: int) -> Stat:
    """The statistic: change of u^T B A v of each layer, with u and v of this study and round."""
    pairs = lora_pairs(manifest)

    def told(result: LocalResult) -> Tree:
        before, after = manifest.unflatten(result.before_Z), manifest.unflatten(result.after_Z)
        return {
            pair.layer: torch.tensor(_seen(after, pair, seed, round_number) - _seen(before, pair, seed, round_number))
            for pair in pairs
        }

    return Stat(NAIVE_ERROR, told)


def naive_error(before: Tree, after: Tree, told: Mapping[str, Tensor], seed: int, round_number: int) -> float:
    """Norm of the error over that of the mean update, estimated; 0 where nothing moved.

    Args:
        before: the adapter before the round.
        after: with the means of A and B.
        told: mean of the statistic, by layer.
        seed: of the study.
        round_number: from 1 on.
    """
    error = change = 0.0
    for layer, mean in told.items():
        d_out, rank = before[f"{layer}.lora_B.weight"].shape
        pair = LoraPair(layer, d_out, rank, before[f"{layer}.lora_A.weight"].shape[1])
        naive = _seen(after, pair, seed, round_number) - _seen(before, pair, seed, round_number)
        error += (naive - float(mean)) ** 2
        change += float(mean) ** 2
    return (error / change) ** 0.5 if change else 0.0


def _seen(adapter: Tree, pair: LoraPair, seed: int, round_number: int) -> float:
    """u^T B A v."""
    generator = torch.Generator().manual_seed(derive_seed(seed, NAIVE_ERROR, round_number, pair.layer))
    u = torch.randn(pair.d_out, generator=generator, dtype=torch.float64)
    v = torch.randn(pair.d_in, generator=generator, dtype=torch.float64)
    return float((u @ adapter[pair.b].double()) @ (adapter[pair.a].double() @ v))
