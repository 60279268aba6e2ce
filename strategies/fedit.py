"""FedIT: average every adapter tensor, A and B alike (Zhang et al. 2023, "Towards Building the Federated GPT").

Sum-only. Not exact for LoRA: mean(B) mean(A) is not mean(B A); the error grows with the sites' disagreement
and with noise, which is why private studies use other rules.
"""

from __future__ import annotations

from strategies.strategy import Phase, Stat, Strategy, Tree, everything


def adapter_delta(before: Tree, after: Tree) -> Tree:
    """What local training changed: ``after - before``, tensor by tensor."""
    return {name: after[name] - before[name] for name in before}


class FedIT(Strategy):
    """Adds the weighted mean of the sites' adapter deltas to the global adapter."""

    name = "fedit"
    _phase = Phase(trainable=everything, stats=(Stat("adapter", adapter_delta, elementwise=True),))

    def plan(self, round_number: int) -> Phase:
        """Everything trains, every round."""
        return self._phase

    def post(self, round_number: int, global_adapter: Tree, aggregated: Tree) -> Tree:
        """``global + mean(delta)``."""
        return {name: global_adapter[name] + aggregated[name] for name in global_adapter}
