"""Local methods in real rounds: what sites send, what they remember, and that sums under masks are enough for them.

Legend: Z coordinates of what trains.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from client import serve
from client.features import FeatureCache
from client.site import site_of_partition
from client.trainer import loss_of
from medfed.errors import MessageError
from medfed.messages import RoundInstruction
from medfed.models.adapted import adapted_model, resolve
from medfed.payload import decode_adapter, encode_adapter
from medfed.study import StudyConfig
from medfed.tasks import task_of
from server.checkpoint import Checkpoint, read_checkpoint
from simulation.harness import simulate
from simulation.run_folder import stored_study
from strategies.federation import Strategy
from strategies.registry import strategy_of
from strategies.strategy import State

CPU = torch.device("cpu")
RATE = 0.05

MakeStudy = Callable[..., StudyConfig]
StudyFile = Callable[[StudyConfig], Path]

METHODS: dict[str, dict[str, Any]] = {
    "fedprox": {"mu": 1.0},
    "scaffold": {},
    "fednova": {},
    "feddyn": {"alpha": 1.0},
    "q-fedavg": {"q": 2.0},
}


@dataclass(frozen=True)
class Asked:
    """A site called north as a server of one site asks it: plain messages, the strategy's own state."""

    study: StudyConfig

    @property
    def strategy(self) -> Strategy:
        return strategy_of(self.study)

    def start(self) -> State:
        manifest = self.study.resolved_manifest
        return self.strategy.start(manifest.unflatten(adapted_model(self.study, CPU).initial_P))

    def payload(self, number: int, state: State, broadcast: bytes | None = None) -> bytes:
        told = self.strategy.plan(number).broadcast
        if broadcast is None:
            broadcast = b"" if told is None else encode_adapter(told.flatten(state.broadcast), told)
        instruction = RoundInstruction(study_digest=self.study.digest, round=number)
        adapter = encode_adapter(self.study.resolved_manifest.flatten(state.adapter), self.study.resolved_manifest)
        fields = instruction.to_fields(study=self.study.canonical, adapter=adapter, broadcast=broadcast)
        payload = serve.train(instruction, fields, site_of_partition(0))["adapter"]
        assert isinstance(payload, bytes)
        return payload

    def statistics(self, number: int, state: State) -> dict[str, Tensor]:
        phase = self.strategy.plan(number)
        return phase.statistics(decode_adapter(self.payload(number, state), phase.upload_manifest).double(), 1.0)

    def memory(self, number: int) -> dict[str, Tensor]:
        return site_of_partition(0).memory(self.study, "federated").after(number)


@pytest.fixture
def asked(
    make_study: MakeStudy, make_private_study: MakeStudy, open_sites: Callable[..., Path]
) -> Callable[..., Asked]:
    """A site of a study with this local method, which it leaves to the caller to make private."""

    def make(method: str | None, *, private: bool = False) -> Asked:
        plain = make_private_study(("north",)) if private else make_study(("north",))
        study = plain.replace(
            training=plain.training.model_copy(update={"optimizer": "sgd", "learning_rate": RATE}),
            strategy={"local": None if method is None else {"method": method, **METHODS[method]}},
            rounds={"num_rounds": 9},
        )
        resolved = resolve(study, CPU)
        open_sites(resolved, noise_seed=1)
        return Asked(resolved)

    return make


def flat(tensors: Mapping[str, Tensor], names: Mapping[str, Any]) -> Tensor:
    return torch.cat([tensors[name].reshape(-1) for name in names])


@pytest.mark.parametrize("private", [False, True], ids=["plain", "private"])
@pytest.mark.parametrize("method", METHODS)
def test_round_that_is_asked_again_gives_the_same_bytes(
    asked: Callable[..., Asked], method: str, private: bool
) -> None:
    if private and method == "q-fedavg":
        return  # refused
    site = asked(method, private=private)
    state = site.start()
    for number in (1, 2):
        payload, kept = site.payload(number, state), site.memory(number)
        assert site.payload(number, state) == payload
        again = site.memory(number)
        assert again.keys() == kept.keys()
        assert all(torch.equal(again[name], kept[name]) for name in kept)
        assert bool(kept) == (method in ("scaffold", "feddyn"))
        state = site.strategy.post(number, state, site.statistics(number, state), 1.0)


@pytest.mark.parametrize("private", [False, True], ids=["plain", "private"])
def test_control_variate_is_the_mean_step_of_what_was_sent(asked: Callable[..., Asked], private: bool) -> None:
    """It follows from the update alone: what is private in one is in the other."""
    site = asked("scaffold", private=private)
    state, num_steps = site.start(), 2  # steps_per_round, or three images in batches of two
    sent = site.statistics(1, state)
    change_Z = flat(sent, state.adapter)
    torch.testing.assert_close(site.memory(1)["scaffold:control"], -change_Z / num_steps)
    torch.testing.assert_close(sent["scaffold:control"], -change_Z / num_steps)
    state = site.strategy.post(1, state, sent, 1.0)
    torch.testing.assert_close(state.broadcast["scaffold:control"], -change_Z / num_steps)


def test_control_variates_move_training(asked: Callable[..., Asked]) -> None:
    site = asked("scaffold")
    state = site.start()
    site.payload(1, state)
    zero = site.statistics(2, state)
    told = {"scaffold:control": torch.full_like(state.broadcast["scaffold:control"], 1e-3)}
    shifted = site.statistics(2, State(state.adapter, told))
    difference_Z = flat(shifted, state.adapter) - flat(zero, state.adapter)
    torch.testing.assert_close(difference_Z, torch.full_like(difference_Z, -2e-3), rtol=0.05, atol=2e-4)  # two steps


@pytest.mark.parametrize("method", ["fedprox", "feddyn"])
def test_pull_acts_from_the_second_step_on(asked: Callable[..., Asked], method: str) -> None:
    """Two steps, the first from where the round began: the pull moves the second by the rate times the first."""
    site = asked(method)
    start = site.start()
    pulled_Z = flat(site.statistics(1, start), start.adapter)
    site.strategy.local.pull = lambda *_: None  # type: ignore[method-assign]
    plain_Z = flat(site.statistics(1, start), start.adapter)
    first_Z = (plain_Z - pulled_Z) / RATE  # of strength 1
    assert float(first_Z.norm()) == pytest.approx(float(plain_Z.norm()) / 2, rel=0.5)
    cosine = torch.nn.functional.cosine_similarity(first_Z, plain_Z, dim=0)
    assert cosine > 0.5
    kept = site.memory(1).get("feddyn:linear", -plain_Z)
    assert torch.equal(kept, -plain_Z)


def test_start_loss_is_that_of_the_model_as_it_came(asked: Callable[..., Asked]) -> None:
    site = asked("q-fedavg")
    state, study = site.start(), site.study
    sent = site.statistics(1, state)
    model = adapted_model(study, CPU)
    loss = loss_of(
        model,
        task_of(study.task),
        site_of_partition(0).cohort(study, model.pixels).train,
        adapter_P=model.initial_P,
        features=FeatureCache(),
        batch_size=1,
    )
    lifted_Z = flat({name.removeprefix("lifted:"): tensor for name, tensor in sent.items()}, state.adapter)
    change_Z = lifted_Z / loss**2
    expected = loss**2 + 2 * loss * float(change_Z.square().sum()) / RATE
    assert float(sent["q-fedavg:sum"]) == pytest.approx(expected, rel=1e-4)


def test_fednova_of_one_site_is_its_change(asked: Callable[..., Asked]) -> None:
    site = asked("fednova")
    state = site.start()
    after = site.strategy.post(1, state, site.statistics(1, state), 1.0).adapter
    before_Z, after_Z = flat(state.adapter, state.adapter), flat(after, state.adapter)
    trained = site.statistics(1, state)
    assert float(trained["fednova:length"]) == pytest.approx(2 * RATE)
    step_Z = flat({name.removeprefix("step:"): tensor for name, tensor in trained.items()}, state.adapter)
    torch.testing.assert_close(after_Z - before_Z, 2 * step_Z)


def test_round_without_what_the_method_tells_is_refused(asked: Callable[..., Asked]) -> None:
    site = asked("scaffold")
    with pytest.raises(Exception, match="payload"):
        site.payload(1, site.start(), broadcast=b"")


def test_round_with_more_than_the_method_tells_is_refused(asked: Callable[..., Asked]) -> None:
    site = asked("fedprox")
    with pytest.raises(MessageError, match="nothing beside the adapter"):
        site.payload(1, site.start(), broadcast=b"x")


def checkpoint_of(folder: Path) -> Checkpoint:
    study = stored_study(folder)
    state = read_checkpoint(folder, study.resolved_manifest, study_digest=study.digest, scope="federated")
    assert state is not None
    return state


@pytest.mark.usefixtures("without_pictures")
@pytest.mark.slow
@pytest.mark.parametrize("method", METHODS)
def test_sums_under_masks_are_enough(
    make_secure_study: MakeStudy, study_file: StudyFile, tmp_path: Path, method: str
) -> None:
    secure = make_secure_study()
    secure = secure.replace(
        training={"local_epochs": 1, "batch_size": 2, "learning_rate": RATE, "optimizer": "sgd"},
        strategy={"weighting": "uniform", "local": {"method": method, **METHODS[method]}},
        rounds={"num_rounds": 2},
    )
    sites = [site.model_copy(update={"declared_patients": None}) for site in secure.sites]
    plain = secure.replace(secure_aggregation=None, sites=sites)
    masked = checkpoint_of(simulate(study_file(secure), out=tmp_path / "a", workers=0, baselines=False).folder)
    bare = checkpoint_of(simulate(study_file(plain), out=tmp_path / "b", workers=0, baselines=False).folder)
    torch.testing.assert_close(masked.adapter_P, bare.adapter_P, rtol=1e-4, atol=1e-5)
    assert masked.broadcast.keys() == bare.broadcast.keys()
    for name, tensor in masked.broadcast.items():
        torch.testing.assert_close(tensor, bare.broadcast[name], rtol=1e-4, atol=1e-5)
