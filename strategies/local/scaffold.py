"""SCAFFOLD: control variates take out each site's drift (Karimireddy et al. 2020, Algorithm 1, option II).

All control variates are kept in units of a step, that is times the learning rate: they are then of the size of a
change, and bounds on what travels (``update_clip_norm``) mean the same for both. Weights are those of the mean
change, so the server's variate is the weighted mean of the sites'.

A site that was away for long comes back with an old variate, as in the paper. What the paper does not have: a site
whose reply was lost after it trained remembers a variate that the server's mean never saw, and the difference stays in
the mean for good.
"""

from __future__ import annotations

import torch
from torch import Tensor

from medfed.adapter_manifest import AdapterManifest
from strategies.local_method import Combined, LocalMethod, with_broadcast
from strategies.strategy import DELTA, LocalResult, Stat, State, Tree

_CONTROL = "scaffold:control"


def _own_control(memory: Tree, like_Z: Tensor) -> Tensor:
    """c_k, zero in a site's first round."""
    return memory[_CONTROL].to(like_Z) if _CONTROL in memory else torch.zeros_like(like_Z)


def _control_change(result: LocalResult) -> Tree:
    """c_k+ - c_k = -c + (x - y_k) / steps, (Z,)."""
    return {"control": -result.change / result.num_steps - result.broadcast[_CONTROL]}


class Scaffold(LocalMethod):
    """The gradient is corrected by ``c - c_k``.

    Args:
        learning_rate: of local training.
    """

    name = "scaffold"
    needs_fixed_subspace = True
    needs_sgd = True
    stats = (DELTA, Stat("scaffold", _control_change))

    def __init__(self, learning_rate: float) -> None:
        self._learning_rate = learning_rate

    def broadcast(self, shared: AdapterManifest) -> dict[str, tuple[int, ...]]:
        """c, (Z,)."""
        return {_CONTROL: (shared.num_elements,)}

    def start(self, shared: AdapterManifest, state: State) -> State:
        """C is zero."""
        return with_broadcast(state, **{_CONTROL: torch.zeros(shared.num_elements)})

    def pull(self, offset_Z: Tensor, broadcast: Tree, memory: Tree) -> Tensor:
        """``c - c_k``, as a gradient."""
        return (broadcast[_CONTROL].to(offset_Z) - _own_control(memory, offset_Z)) / self._learning_rate

    def remember(self, result: LocalResult) -> Tree:
        """c_k+."""
        change_Z = _control_change(result)["control"]
        return {_CONTROL: _own_control(result.memory, change_Z) + change_Z}

    def combine(self, state: State, statistics: Tree, participation: float) -> Combined:
        """C moves by the mean change of the variates, times the share of sites that took part."""
        delta = {name: tensor for name, tensor in statistics.items() if name != _CONTROL}
        control_Z = state.broadcast[_CONTROL] + participation * statistics[_CONTROL]
        return Combined(delta, with_broadcast(state, **{_CONTROL: control_Z}))
