"""The server's steps, held against Flower's own strategies on the same mean changes."""

import logging
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest
import torch
from flwr.common import Code, FitRes, Status, ndarrays_to_parameters, parameters_to_ndarrays
from flwr.server.strategy import FedAdagrad as FlowerAdagrad
from flwr.server.strategy import FedAdam as FlowerAdam
from flwr.server.strategy import FedAvgM as FlowerAvgM
from flwr.server.strategy import FedYogi as FlowerYogi
from torch import Tensor

from medfed.adapter_manifest import AdapterManifest
from medfed.study import StudyConfig
from strategies.federation import Strategy
from strategies.local_method import LocalMethod
from strategies.personal import Personalisation
from strategies.registry import RULES, strategy_of
from strategies.server_optimizer import (
    AdaptiveOptimizer,
    FedAdagrad,
    FedAdam,
    FedAvgM,
    FedYogi,
    ServerOptimizer,
)
from strategies.strategy import Setting

MANIFEST = AdapterManifest.of({"a": torch.zeros(3, 2), "b": torch.zeros(4)}, method="full", rank=None)
ETA, BETA_1, BETA_2, TAU, MOMENTUM = 0.3, 0.8, 0.95, 1e-3, 0.7
ROUNDS = 6


def mean_changes() -> list[dict[str, Tensor]]:
    """Of every size, as shrinking as changes are."""
    generator = torch.Generator().manual_seed(0)
    return [
        {spec.name: torch.randn(spec.shape, generator=generator) / (1 + number) ** 2 for spec in MANIFEST.tensors}
        for number in range(ROUNDS)
    ]


def strategy_with(server: ServerOptimizer) -> Strategy:
    setting: Any = Setting(config=None, manifest=MANIFEST, seed=0, num_sites=2)  # type: ignore[arg-type]
    return Strategy(RULES["fedit"](setting), LocalMethod(), Personalisation(), server)


def ours(server: ServerOptimizer, changes: Sequence[dict[str, Tensor]]) -> list[Tensor]:
    """The shared model after each round, by way of the strategy and its state."""
    strategy, states = strategy_with(server), []
    state = strategy.start(MANIFEST.unflatten(torch.ones(MANIFEST.num_elements)))
    for number, change in enumerate(changes, start=1):
        state = strategy.post(number, state, change, 1.0)
        states.append(MANIFEST.flatten(state.adapter))
    return states


def flowers(strategy: Any, changes: Sequence[dict[str, Tensor]]) -> list[Tensor]:
    """The same by Flower: two clients whose weighted mean is the model moved by the mean change."""
    logging.getLogger("flwr").setLevel(logging.ERROR)
    current, states = [np.ones(spec.shape, dtype=np.float64) for spec in MANIFEST.tensors], []
    for number, change in enumerate(changes, start=1):
        moved = [array + change[spec.name].numpy() for array, spec in zip(current, MANIFEST.tensors, strict=True)]
        results: Any = [
            (
                None,
                FitRes(
                    Status(Code.OK, ""),
                    ndarrays_to_parameters([m + sign * 0.1 for m in moved]),
                    num_examples=examples,
                    metrics={},
                ),
            )
            for sign, examples in ((1, 2), (-2, 1))
        ]
        parameters, _ = strategy.aggregate_fit(number, results, [])
        current = parameters_to_ndarrays(parameters)
        states.append(torch.cat([torch.from_numpy(array).reshape(-1) for array in current]).float())
    return states


def initial() -> Any:
    return ndarrays_to_parameters([np.ones(spec.shape, dtype=np.float64) for spec in MANIFEST.tensors])


class UncorrectedFlowerAdam(FlowerAdam):
    """Without the bias correction that Flower adds to the paper's algorithm, with exponents of round + 1."""

    def aggregate_fit(self, server_round: int, results: Any, failures: Any) -> Any:
        corrected = np.sqrt(1 - BETA_2 ** (server_round + 1.0)) / (1 - BETA_1 ** (server_round + 1.0))
        self.eta = ETA / corrected
        return super().aggregate_fit(server_round, results, failures)


PAIRS: dict[str, tuple[ServerOptimizer, Callable[[], Any]]] = {
    "fedavgm": (
        FedAvgM(ETA, MOMENTUM),
        lambda: FlowerAvgM(
            initial_parameters=initial(), server_learning_rate=ETA, server_momentum=MOMENTUM, accept_failures=True
        ),
    ),
    "fedavgm without momentum": (
        FedAvgM(ETA, 0.0),
        lambda: FlowerAvgM(initial_parameters=initial(), server_learning_rate=ETA, server_momentum=0.0),
    ),
    "fedadagrad": (
        FedAdagrad(ETA, 0.0, 0.0, TAU),
        lambda: FlowerAdagrad(initial_parameters=initial(), eta=ETA, tau=TAU),
    ),
    "fedyogi": (
        FedYogi(ETA, BETA_1, BETA_2, TAU),
        lambda: FlowerYogi(initial_parameters=initial(), eta=ETA, beta_1=BETA_1, beta_2=BETA_2, tau=TAU),
    ),
    "fedadam": (
        FedAdam(ETA, BETA_1, BETA_2, TAU),
        lambda: UncorrectedFlowerAdam(initial_parameters=initial(), eta=ETA, beta_1=BETA_1, beta_2=BETA_2, tau=TAU),
    ),
}


@pytest.mark.parametrize("name", PAIRS)
def test_steps_agree_with_flower(name: str) -> None:
    server, flower = PAIRS[name]
    for here, there in zip(ours(server, mean_changes()), flowers(flower(), mean_changes()), strict=True):
        torch.testing.assert_close(here, there, rtol=1e-4, atol=1e-5)


def test_flower_would_show_another_optimiser() -> None:
    """The comparison has power: no two of the optimisers agree."""
    ends = [ours(server, mean_changes())[-1] for server, _ in PAIRS.values()]
    for index, one in enumerate(ends):
        assert all(not torch.allclose(one, other, rtol=1e-2) for other in ends[index + 1 :])


def test_momentum_of_zero_and_rate_of_one_is_plain_addition() -> None:
    for here, there in zip(
        ours(FedAvgM(1.0, 0.0), mean_changes()), ours(ServerOptimizer(), mean_changes()), strict=True
    ):
        assert torch.equal(here, there)


@pytest.mark.parametrize("server", [FedAdagrad, FedYogi, FedAdam])
def test_change_of_zero_moves_nothing(server: type[AdaptiveOptimizer]) -> None:
    zero = {spec.name: torch.zeros(spec.shape) for spec in MANIFEST.tensors}
    (state_Z,) = ours(server(ETA, 0.0, BETA_2, TAU), [zero])
    assert torch.equal(state_Z, torch.ones_like(state_Z))


def test_all_that_is_remembered_is_in_the_state() -> None:
    """A run that is resumed from its state goes on as one that was not."""
    strategy, changes = strategy_with(FedAdam(ETA, BETA_1, BETA_2, TAU)), mean_changes()
    state = strategy.start(MANIFEST.unflatten(torch.ones(MANIFEST.num_elements)))
    state = strategy.post(1, state, changes[0], 1.0)
    assert set(state.memory) == {f"server:{which}:{name}" for which in ("first", "second") for name in ("a", "b")}
    again = strategy_with(FedAdam(ETA, BETA_1, BETA_2, TAU)).post(2, state, changes[1], 1.0)
    expected = ours(FedAdam(ETA, BETA_1, BETA_2, TAU), changes[:2])[-1]
    assert torch.equal(MANIFEST.flatten(again.adapter), expected)


@pytest.mark.parametrize(("given", "beta_1"), [({}, 0.9), ({"beta_1": 0.5}, 0.5), ({"optimizer": "fedadagrad"}, 0.0)])
def test_numbers_that_are_left_out_are_the_papers(
    make_study: Callable[..., StudyConfig], given: dict[str, Any], beta_1: float
) -> None:
    server = {"optimizer": "fedadam", "learning_rate": ETA, **given}
    study = make_study(("here",)).replace(strategy={"server": server}).with_manifest(MANIFEST)
    made = strategy_of(study).server
    betas = {"fedadam": (beta_1, 0.99), "fedadagrad": (beta_1, 0.0)}[server["optimizer"]]
    oracle = PAIRS[server["optimizer"]][0].__class__(ETA, *betas, 1e-3)  # type: ignore[call-arg]
    for here, there in zip(ours(made, mean_changes()), ours(oracle, mean_changes()), strict=True):
        assert torch.equal(here, there)
