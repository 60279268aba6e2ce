"""Local methods on toy federations: each against its paper's algorithm, and against what it is there for.

Sites have quadratic losses f_k(x) = (x - m_k)^T D_k (x - m_k) / 2 with diagonal D_k. Legend: Z coordinates.
"""

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import Tensor

from medfed.adapter_manifest import AdapterManifest
from medfed.errors import StudyError
from medfed.study import StudyConfig
from strategies.federation import Strategy
from strategies.local.feddyn import FedDyn
from strategies.local.fednova import FedNova
from strategies.local.fedprox import FedProx
from strategies.local.q_fedavg import QFedAvg
from strategies.local.scaffold import Scaffold
from strategies.local_method import LocalMethod
from strategies.personal import Personalisation
from strategies.registry import RULES, strategy_of
from strategies.server_optimizer import ServerOptimizer
from strategies.strategy import LocalResult, Setting, State
from strategies.weighted_sum import weighted_sum

SITES = ("north", "south", "west")
WEIGHTS = {"north": 3.0, "south": 1.0, "west": 2.0}
LEARNING_RATE = 0.05
MANIFEST = AdapterManifest.of(
    {"layer.bias": torch.zeros(2), "layer.lora_A.weight": torch.zeros(1, 2), "layer.lora_B.weight": torch.zeros(2, 1)},
    method="lora",
    rank=1,
)
NUM = MANIFEST.num_elements
START_Z = torch.linspace(-1, 1, NUM)


@dataclass
class Quadratics:
    """Three sites that disagree, in curvature as well as in optimum."""

    curvature: dict[str, Tensor] = field(default_factory=dict)
    optimum: dict[str, Tensor] = field(default_factory=dict)
    num_steps: dict[str, int] = field(default_factory=lambda: {"north": 4, "south": 9, "west": 6})

    def __post_init__(self) -> None:
        generator = torch.Generator().manual_seed(1)
        for site in SITES:
            self.curvature[site] = 0.2 + 3 * torch.rand(NUM, generator=generator)
            self.optimum[site] = 2 * torch.randn(NUM, generator=generator)

    def gradient(self, site: str, x_Z: Tensor) -> Tensor:
        return self.curvature[site] * (x_Z - self.optimum[site])

    def loss(self, site: str, x_Z: Tensor) -> float:
        return float((self.curvature[site] * (x_Z - self.optimum[site]) ** 2).sum() / 2)

    def best(self) -> Tensor:
        """Minimum of the weighted sum of losses."""
        total = sum(WEIGHTS[s] * self.curvature[s] for s in SITES)
        return sum(WEIGHTS[s] * self.curvature[s] * self.optimum[s] for s in SITES) / total

    def equal_steps(self, number: int = 8) -> "Quadratics":
        self.num_steps = dict.fromkeys(SITES, number)
        return self


def strategy_with(local: LocalMethod) -> Strategy:
    study = StudyConfig.model_construct(strategy=None)
    setting = Setting(config=study.strategy, manifest=MANIFEST, seed=0, num_sites=3)
    return Strategy(RULES["fedit"](setting), local, Personalisation(), ServerOptimizer())


def federated(
    local: LocalMethod, world: Quadratics, taking_part: Sequence[Sequence[str]], learning_rate: float = LEARNING_RATE
) -> list[Tensor]:
    """The shared model after each round, by way of statistics, one weighted sum and the strategy."""
    strategy = strategy_with(local)
    state = strategy.start(MANIFEST.unflatten(START_Z))
    memories: dict[str, Any] = {site: {} for site in SITES}
    states = []
    for number, present in enumerate(taking_part, start=1):
        phase = strategy.plan(number)
        before_Z = MANIFEST.flatten(state.adapter)
        told = {} if phase.broadcast is None else phase.broadcast.unflatten(phase.broadcast.flatten(state.broadcast))
        uploads = {}
        for site in present:
            x_Z = before_Z.clone()
            for _ in range(world.num_steps[site]):
                pull_Z = local.pull(x_Z - before_Z, told, memories[site])
                x_Z = x_Z - learning_rate * (world.gradient(site, x_Z) + (0 if pull_Z is None else pull_Z))
            start_loss = world.loss(site, before_Z) if phase.needs_start_loss else 0.0
            result = LocalResult(
                MANIFEST, before_Z, x_Z, world.num_steps[site], learning_rate, start_loss, told, memories[site]
            )
            uploads[site] = phase.upload_vector(result)
            assert uploads[site].shape == (phase.upload_manifest.num_elements,)
            memories[site] = local.remember(result)
        weight = sum(WEIGHTS[site] for site in present)
        statistics = phase.statistics(weighted_sum(uploads, WEIGHTS, SITES), weight)
        state = strategy.post(number, state, statistics, weight / sum(WEIGHTS.values()))
        states.append(MANIFEST.flatten(state.adapter))
    return states


EVERYBODY = [SITES] * 4
IN_TURNS = [("north", "south"), SITES, ("west",), ("south", "west"), ("north", "west"), SITES, ("north",)]

Oracle = Callable[[Quadratics, Sequence[Sequence[str]]], list[Tensor]]


def share(present: Sequence[str]) -> dict[str, float]:
    return {site: WEIGHTS[site] / sum(WEIGHTS[s] for s in present) for site in present}


def overall(site: str) -> float:
    return WEIGHTS[site] / sum(WEIGHTS.values())


def fedprox_of_the_paper(mu: float) -> Oracle:
    def run(world: Quadratics, taking_part: Sequence[Sequence[str]]) -> list[Tensor]:
        w, states = START_Z, []
        for present in taking_part:
            ends = {}
            for site in present:
                x = w.clone()
                for _ in range(world.num_steps[site]):
                    x = x - LEARNING_RATE * (world.gradient(site, x) + mu * (x - w))
                ends[site] = x
            w = sum(share(present)[site] * ends[site] for site in present)
            states.append(w)
        return states

    return run


def scaffold_of_the_paper(world: Quadratics, taking_part: Sequence[Sequence[str]]) -> list[Tensor]:
    """Algorithm 1 with option II and a server step of one, in units of gradients; weights beside the paper's 1/N."""
    x, c = START_Z, torch.zeros(NUM)
    c_of = {site: torch.zeros(NUM) for site in SITES}
    states = []
    for present in taking_part:
        y_of, dc_of = {}, {}
        for site in present:
            y = x.clone()
            for _ in range(world.num_steps[site]):
                y = y - LEARNING_RATE * (world.gradient(site, y) - c_of[site] + c)
            new = c_of[site] - c + (x - y) / (world.num_steps[site] * LEARNING_RATE)
            y_of[site], dc_of[site] = y, new - c_of[site]
            c_of[site] = new
        x = x + sum(share(present)[site] * (y_of[site] - x) for site in present)
        c = c + sum(overall(site) * dc_of[site] for site in present)
        states.append(x)
    return states


def fednova_of_the_paper(world: Quadratics, taking_part: Sequence[Sequence[str]]) -> list[Tensor]:
    """Equation 6: x - tau_eff * sum p_k eta d_k with d_k the mean gradient and tau_eff = sum p_k tau_k."""
    x, states = START_Z, []
    for present in taking_part:
        mean_gradient = {}
        for site in present:
            y, gradients = x.clone(), []
            for _ in range(world.num_steps[site]):
                gradients.append(world.gradient(site, y))
                y = y - LEARNING_RATE * gradients[-1]
            mean_gradient[site] = torch.stack(gradients).mean(dim=0)
        tau = sum(share(present)[site] * world.num_steps[site] for site in present)
        x = x - tau * LEARNING_RATE * sum(share(present)[site] * mean_gradient[site] for site in present)
        states.append(x)
    return states


def feddyn_of_the_paper(alpha: float) -> Oracle:
    """Algorithm 1; gradients of losses and h in units of gradients."""

    def run(world: Quadratics, taking_part: Sequence[Sequence[str]]) -> list[Tensor]:
        theta, h = START_Z, torch.zeros(NUM)
        linear_of = {site: torch.zeros(NUM) for site in SITES}
        states = []
        for present in taking_part:
            ends = {}
            for site in present:
                x = theta.clone()
                for _ in range(world.num_steps[site]):
                    x = x - LEARNING_RATE * (world.gradient(site, x) - linear_of[site] + alpha * (x - theta))
                linear_of[site] = linear_of[site] - alpha * (x - theta)
                ends[site] = x
            h = h - alpha * sum(overall(site) * (ends[site] - theta) for site in present)
            theta = sum(share(present)[site] * ends[site] for site in present) - h / alpha
            states.append(theta)
        return states

    return run


def q_fedavg_of_the_paper(q: float) -> Oracle:
    """Algorithm 2, with L = 1 / learning rate."""

    def run(world: Quadratics, taking_part: Sequence[Sequence[str]]) -> list[Tensor]:
        w, lipschitz, states = START_Z, 1 / LEARNING_RATE, []
        for present in taking_part:
            top, bottom = torch.zeros(NUM), 0.0
            for site in present:
                x = w.clone()
                for _ in range(world.num_steps[site]):
                    x = x - LEARNING_RATE * world.gradient(site, x)
                loss, change = world.loss(site, w), lipschitz * (w - x)
                top = top + WEIGHTS[site] * loss**q * change
                bottom += WEIGHTS[site] * (q * loss ** (q - 1) * float(change @ change) + lipschitz * loss**q)
            w = w - top / bottom
            states.append(w)
        return states

    return run


METHODS: dict[str, tuple[LocalMethod, Oracle]] = {
    "fedprox": (FedProx(0.7), fedprox_of_the_paper(0.7)),
    "scaffold": (Scaffold(LEARNING_RATE), scaffold_of_the_paper),
    "fednova": (FedNova(LEARNING_RATE), fednova_of_the_paper),
    "feddyn": (FedDyn(0.4), feddyn_of_the_paper(0.4)),
    "q-fedavg": (QFedAvg(1.5), q_fedavg_of_the_paper(1.5)),
    "q-fedavg below one": (QFedAvg(0.3), q_fedavg_of_the_paper(0.3)),
}


@pytest.mark.parametrize("taking_part", [EVERYBODY, IN_TURNS], ids=["everybody", "in turns"])
@pytest.mark.parametrize("name", METHODS)
def test_method_agrees_with_the_algorithm_of_its_paper(name: str, taking_part: Sequence[Sequence[str]]) -> None:
    local, oracle = METHODS[name]
    world = Quadratics()
    plain = federated(LocalMethod(), world, taking_part)
    for here, there, without in zip(
        federated(local, world, taking_part), oracle(world, taking_part), plain, strict=True
    ):
        torch.testing.assert_close(here, there, rtol=1e-4, atol=1e-5)
        if name != "scaffold":  # whose first round is plain
            assert not torch.allclose(here, without, rtol=1e-3)


@pytest.mark.parametrize(
    ("local", "world"),
    [
        (FedProx(0.0), Quadratics()),
        (QFedAvg(0.0), Quadratics()),
        (FedNova(LEARNING_RATE), Quadratics().equal_steps()),
    ],
    ids=["fedprox mu=0", "q-fedavg q=0", "fednova of equal steps"],
)
def test_method_reduces_to_plain_training(local: LocalMethod, world: Quadratics) -> None:
    plain = federated(LocalMethod(), world, IN_TURNS)
    for here, there in zip(federated(local, world, IN_TURNS), plain, strict=True):
        torch.testing.assert_close(here, there, rtol=1e-5, atol=1e-6)


def distance(local: LocalMethod, world: Quadratics, rounds: int = 400, learning_rate: float = LEARNING_RATE) -> float:
    end_Z = federated(local, world, [SITES] * rounds, learning_rate)[-1]
    return float(torch.linalg.vector_norm(end_Z - world.best()))


def test_plain_local_steps_stop_beside_the_optimum_and_scaffold_and_feddyn_reach_it() -> None:
    world = Quadratics().equal_steps()
    assert distance(LocalMethod(), world) > 0.1
    assert distance(Scaffold(LEARNING_RATE), world) < 1e-4
    assert distance(FedDyn(0.5), Quadratics().equal_steps(200), 60) < 1e-3  # each site minimises, as the paper assumes


def test_scaffold_reaches_the_optimum_of_sites_that_take_turns() -> None:
    world = Quadratics().equal_steps()
    turns = list(itertools.islice(itertools.cycle([("north", "south"), ("south", "west"), ("west", "north")]), 900))
    end_Z = federated(Scaffold(LEARNING_RATE), world, turns)[-1]
    assert float(torch.linalg.vector_norm(end_Z - world.best())) < 1e-3


def test_fednova_takes_out_what_unequal_numbers_of_steps_do() -> None:
    """With small steps drift within a round is small, and what is left is who takes more of them."""
    world = Quadratics(num_steps={"north": 2, "south": 20, "west": 2})
    plain = distance(LocalMethod(), world, 1000, 0.004)
    assert distance(FedNova(0.004), world, 1000, 0.004) < plain / 8


def test_fedprox_keeps_sites_closer_to_where_they_began() -> None:
    world = Quadratics().equal_steps(50)
    plain, pulled = (federated(local, world, [("south",)])[0] for local in (LocalMethod(), FedProx(5.0)))
    assert torch.linalg.vector_norm(pulled - START_Z) < torch.linalg.vector_norm(plain - START_Z) / 2


def test_q_fedavg_lowers_the_loss_of_the_worst_site() -> None:
    world = Quadratics().equal_steps(2)

    def worst(local: LocalMethod) -> float:
        end_Z = federated(local, world, [SITES] * 300)[-1]
        return max(world.loss(site, end_Z) for site in SITES)

    assert worst(QFedAvg(3.0)) < worst(LocalMethod()) * 0.95


def test_loss_of_zero_is_no_division_by_zero() -> None:
    result = LocalResult(MANIFEST, START_Z, START_Z + 1, 3, LEARNING_RATE, start_loss=0.0)
    phase = strategy_with(QFedAvg(0.5)).plan(1)
    assert phase.upload_vector(result).isfinite().all()


def test_control_variates_of_the_server_are_the_mean_of_the_sites() -> None:
    """What the participation is for: c stays the weighted mean of all c_k, whoever takes part."""
    world, local = Quadratics(), Scaffold(LEARNING_RATE)
    strategy, memories = strategy_with(local), {site: {} for site in SITES}
    state: State = strategy.start(MANIFEST.unflatten(START_Z))
    for number, present in enumerate(IN_TURNS, start=1):
        phase, before_Z = strategy.plan(number), MANIFEST.flatten(state.adapter)
        uploads = {}
        for site in present:
            after_Z = before_Z - LEARNING_RATE * world.gradient(site, before_Z)
            result = LocalResult(
                MANIFEST, before_Z, after_Z, 1, LEARNING_RATE, broadcast=state.broadcast, memory=memories[site]
            )
            uploads[site], memories[site] = phase.upload_vector(result), local.remember(result)
        weight = sum(WEIGHTS[site] for site in present)
        statistics = phase.statistics(weighted_sum(uploads, WEIGHTS, SITES), weight)
        state = strategy.post(number, state, statistics, weight / sum(WEIGHTS.values()))
        (mean_Z,) = (sum(overall(s) * memories[s].get("scaffold:control", torch.zeros(NUM)) for s in SITES),)
        torch.testing.assert_close(state.broadcast["scaffold:control"], mean_Z, rtol=1e-4, atol=1e-6)


@pytest.fixture
def made(make_study: Callable[..., StudyConfig]) -> Callable[..., Strategy]:
    """The strategy of a resolved study with these keys of [strategy]; other sections may be replaced."""

    plain = make_study(("here",))

    def make(optimizer: str = "sgd", study: StudyConfig | None = None, **strategy: Any) -> Strategy:
        study = study or plain
        training = study.training.model_copy(update={"optimizer": optimizer})
        return strategy_of(study.replace(training=training, strategy=strategy).with_manifest(MANIFEST))

    return make


LOCAL: dict[str, dict[str, Any]] = {
    "fedprox": {"mu": 0.1},
    "scaffold": {},
    "fednova": {},
    "feddyn": {"alpha": 0.1},
    "q-fedavg": {"q": 1.0},
}


def local(method: str) -> dict[str, Any]:
    return {"method": method, **LOCAL[method]}


@pytest.mark.parametrize("method", LOCAL)
def test_study_names_its_local_method(made: Callable[..., Strategy], method: str) -> None:
    assert made(local=local(method)).local.name == method
    assert made().local.name == "plain"


@pytest.mark.parametrize("method", ["scaffold", "fednova", "q-fedavg"])
def test_method_for_plain_steps_is_refused_with_adamw(made: Callable[..., Strategy], method: str) -> None:
    with pytest.raises(StudyError, match=f"optimizer = 'sgd' for '{method}'"):
        made("adamw", local=local(method))
    made("adamw", local=local("fedprox"))
    made("adamw", local=local("feddyn"))


@pytest.mark.parametrize("rule", ["rolora", "alt-gauge", "ffa-fresh"])
@pytest.mark.parametrize("method", ["scaffold", "feddyn"])
def test_method_with_a_memory_is_refused_where_coordinates_change(
    made: Callable[..., Strategy], rule: str, method: str
) -> None:
    with pytest.raises(StudyError, match=f"same coordinates in every round for '{method}'"):
        made(name=rule, local=local(method))
    made(name=rule, local=local("fedprox"))
    made(name="ffa-lora", local=local(method))


def test_start_loss_is_refused_with_privacy(
    made: Callable[..., Strategy], make_private_study: Callable[..., StudyConfig]
) -> None:
    private = make_private_study()
    with pytest.raises(StudyError, match=r"no \[privacy\] with 'q-fedavg'"):
        made(study=private, local=local("q-fedavg"))
    for method in ("fedprox", "scaffold", "feddyn", "fednova"):
        made(study=private, local=local(method))


@pytest.mark.parametrize("changes", [{"local": local(method)} for method in LOCAL] + [{"name": "fedsa"}])
def test_shared_noise_is_for_plain_steps_and_a_mean_change_alone(
    made: Callable[..., Strategy], make_study: Callable[..., StudyConfig], changes: dict[str, Any]
) -> None:
    study = make_study(("north", "south", "west", "east", "centre"))
    shared = study.replace(
        training={"batch_size": 2, "learning_rate": 0.01, "optimizer": "sgd"},
        secure_aggregation={"enabled": True, "max_colluding": 1},
        sites=[site.model_copy(update={"declared_patients": 3}) for site in study.sites],
        privacy={
            "trust": "consortium",
            "unit": "patient",
            "noise_multiplier": 1.0,
            "delta": 0.01,
            "clip_norm": 1.0,
            "sampling_rate": 0.5,
            "steps_per_round": 1,
            "images_per_patient": 2,
            "evaluation": "exact",
        },
    )
    made(study=shared)
    with pytest.raises(StudyError, match=r"trust 'consortium'|no \[privacy\] with 'q-fedavg'"):
        made(study=shared, **changes)


def test_hold_frames_is_refused_where_no_frames_are_redrawn(made: Callable[..., Strategy]) -> None:
    with pytest.raises(StudyError, match="no strategy.hold_frames for strategy 'ffa-lora'"):
        made(name="ffa-lora", hold_frames=3)
    made(name="ffa-fresh", hold_frames=3)
