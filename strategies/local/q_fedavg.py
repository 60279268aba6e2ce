"""q-FedAvg: sites with a higher loss count more (Li et al. 2020, "Fair Resource Allocation", Algorithm 2).

The paper's step is a quotient of two sums over sites, with L = 1 / learning rate and both multiplied by it here::

    sum F^q change  /  sum (F^q + q F^(q-1) |change|^2 / learning rate)

F is a site's loss before training. Sites are weighed in both sums by the public weights; the paper's own objective
has ``weighting = "uniform"``.
"""

from __future__ import annotations

import torch

from strategies.local_method import Combined, LocalMethod
from strategies.strategy import LocalResult, Stat, State, Tree

_LOSS_FLOOR = 1e-10
"""Added to losses, as in the paper's code: F^(q-1) is infinite at 0 for q < 1."""

_LIFTED, _CURVATURE = "lifted", "q-fedavg"


class QFedAvg(LocalMethod):
    """Averages changes by the q-th power of losses.

    Args:
        q: 0 is plain averaging.
    """

    name = "q-fedavg"
    needs_sgd = True
    needs_start_loss = True

    def __init__(self, q: float) -> None:
        self._q = q
        self.stats = (Stat(_LIFTED, self._lifted), Stat(_CURVATURE, self._curvature))

    def combine(self, state: State, statistics: Tree, participation: float) -> Combined:
        """The quotient."""
        curvature = statistics[f"{_CURVATURE}:sum"]
        lifted = {name: tensor for name, tensor in statistics.items() if name.startswith(f"{_LIFTED}:")}
        return Combined(
            {name.removeprefix(f"{_LIFTED}:"): tensor / curvature for name, tensor in lifted.items()}, state
        )

    def _lifted(self, result: LocalResult) -> Tree:
        return result.shared.unflatten((result.start_loss + _LOSS_FLOOR) ** self._q * result.change)

    def _curvature(self, result: LocalResult) -> Tree:
        loss = result.start_loss + _LOSS_FLOOR
        squared = float(result.change.double().square().sum()) / result.learning_rate
        return {"sum": torch.tensor([loss**self._q + self._q * loss ** (self._q - 1) * squared])}
