"""FedNova: a site that takes more steps does not pull harder (Wang et al. 2020, equations 6 and 10, for plain SGD).

Each site tells its mean change of a step, and how many steps it took; the server goes the mean number of steps along
the mean of the former. Both are linear sums. Steps travel times the learning rate, so that they are of the size of a
change and bounds on what travels (``update_clip_norm``) do not meet them first. With [privacy] all sites take the
same number of steps, and this is plain averaging.
"""

from __future__ import annotations

import torch

from strategies.local_method import Combined, LocalMethod
from strategies.strategy import LocalResult, Stat, State, Tree

_STEP, _LENGTH = "step", "fednova"


def _mean_step(result: LocalResult) -> Tree:
    """Change over number of steps, by tensor."""
    return result.shared.unflatten(result.change / result.num_steps)


def _length(result: LocalResult) -> Tree:
    """Number of steps times the learning rate."""
    return {"length": torch.tensor([result.num_steps * result.learning_rate])}


class FedNova(LocalMethod):
    """Normalised averaging.

    Args:
        learning_rate: of local training.
    """

    name = "fednova"
    needs_sgd = True
    stats = (Stat(_STEP, _mean_step), Stat(_LENGTH, _length))

    def __init__(self, learning_rate: float) -> None:
        self._learning_rate = learning_rate

    def combine(self, state: State, statistics: Tree, participation: float) -> Combined:
        """Mean number of steps times mean step."""
        num_steps = statistics[f"{_LENGTH}:length"] / self._learning_rate
        steps = {name: tensor for name, tensor in statistics.items() if name.startswith(f"{_STEP}:")}
        return Combined({name.removeprefix(f"{_STEP}:"): num_steps * step for name, step in steps.items()}, state)
