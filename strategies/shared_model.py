"""The shared model of a round: the adapter, and what the rule folded into the base."""

from __future__ import annotations

from torch import Tensor

from medfed.models.folding import Fold, ModelState
from strategies.federation import Strategy
from strategies.strategy import Tree


def shared_state(strategy: Strategy, adapter_P: Tensor, broadcast: Tree) -> ModelState:
    """What sites put into the model, and what a run ends with.

    Args:
        strategy: of the study.
        adapter_P: the global adapter, float32, shape (P,).
        broadcast: what the strategy tells beside it.
    """
    return ModelState(adapter_P, tuple(Fold.of(pairs) for pairs in strategy.rule.folds(broadcast)))
