"""FedDyn: sites' objectives are regularised towards a common optimum (Acar et al. 2021, Algorithm 1).

Both the sites' linear terms and the server's h are kept over alpha, in units of a change. Weights are those of the
mean change, where the paper has one over the number of sites. A site whose reply was lost after it trained is ahead of
h for good, by its change of that round.
"""

from __future__ import annotations

import torch
from torch import Tensor

from medfed.adapter_manifest import AdapterManifest
from strategies.local_method import Combined, LocalMethod, with_memory
from strategies.strategy import LocalResult, State, Tree

_LINEAR, _SERVER = "feddyn:linear", "feddyn:"


class FedDyn(LocalMethod):
    """Minimises a site's loss ``- <lambda_k, z> + alpha / 2 |z - z0|^2``.

    Args:
        alpha: strength.
    """

    name = "feddyn"
    needs_fixed_subspace = True

    def __init__(self, alpha: float) -> None:
        self._alpha = alpha

    def start(self, shared: AdapterManifest, state: State) -> State:
        """H is zero."""
        return with_memory(state, **{f"{_SERVER}{spec.name}": torch.zeros(spec.shape) for spec in shared.tensors})

    def pull(self, offset_Z: Tensor, broadcast: Tree, memory: Tree) -> Tensor:
        """``alpha (z - z0) - lambda_k``."""
        linear_Z = memory[_LINEAR].to(offset_Z) if _LINEAR in memory else 0.0
        return self._alpha * (offset_Z - linear_Z)

    def remember(self, result: LocalResult) -> Tree:
        """lambda_k less alpha times the change: the gradient of the loss where training ended, if it converged."""
        return {_LINEAR: result.memory[_LINEAR] - result.change if _LINEAR in result.memory else -result.change}

    def combine(self, state: State, statistics: Tree, participation: float) -> Combined:
        """H less alpha times the sites' share of the mean change; the change less h over alpha."""
        drift = {name: state.memory[f"{_SERVER}{name}"] - participation * mean for name, mean in statistics.items()}
        delta = {name: mean - drift[name] for name, mean in statistics.items()}
        return Combined(delta, with_memory(state, **{f"{_SERVER}{name}": h for name, h in drift.items()}))
