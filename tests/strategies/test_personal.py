"""What a site keeps for itself: it is in no upload, it is what gets evaluated, and it survives from round to round.

Legend: P adapter parameters, Z coordinates of what trains.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import client.plain_round
from client import serve
from client.round_start import evaluated_state
from client.site import site_of_partition
from client.trainer import TrainResult, evaluate_locally, train_locally
from medfed.adapter_manifest import AdapterManifest
from medfed.errors import SiteError
from medfed.messages import Fields, RoundInstruction, RoundReply
from medfed.models.adapted import adapted_model, resolve
from medfed.models.folding import ModelState
from medfed.payload import decode_adapter, encode_adapter
from medfed.study import StudyConfig
from server.checkpoint import read_checkpoint
from simulation.harness import simulate
from simulation.run_folder import stored_study
from strategies.own_models import Ditto, SiteAdapter
from strategies.registry import strategy_of
from strategies.staying_tensors import heads_of, norms_of
from strategies.subspace import Subspace

CPU = torch.device("cpu")


@dataclass(frozen=True)
class Asked:
    """A site called north, as the server asks it, and what it keeps."""

    study: StudyConfig
    folder: Path

    @property
    def manifest(self) -> AdapterManifest:
        return self.study.resolved_manifest

    @property
    def start(self) -> Tensor:
        """The adapter before any training, (P,)."""
        return adapted_model(self.study, CPU).initial_P

    def train(self, round: int = 1, adapter_P: Tensor | None = None) -> dict[str, Tensor]:
        """The statistics of an update, by name."""
        payload = self.payload(round, adapter_P)
        manifest = strategy_of(self.study).plan(round).upload_manifest
        return {name: tensor.clone() for name, tensor in manifest.unflatten(decode_adapter(payload, manifest)).items()}

    def payload(self, round: int = 1, adapter_P: Tensor | None = None) -> bytes:
        instruction, fields = self.asked(round, adapter_P)
        payload = serve.train(instruction, fields, site_of_partition(0))["adapter"]
        assert isinstance(payload, bytes)
        return payload

    def evaluated(self, round: int, adapter_P: Tensor | None = None) -> Tensor:
        """The adapter that the site evaluates."""
        instruction, fields = self.asked(round, adapter_P)
        return evaluated_state(instruction, fields, self.study, site_of_partition(0)).adapter_P

    def metrics(self, round: int) -> dict[str, float]:
        instruction, fields = self.asked(round, None)
        reply = serve.evaluate(instruction, fields, site_of_partition(0))
        return RoundReply.parse({"header": str(reply["header"])}).metrics

    def asked(self, round: int, adapter_P: Tensor | None) -> tuple[RoundInstruction, Fields]:
        instruction = RoundInstruction(study_digest=self.study.digest, round=round)
        adapter = encode_adapter(self.start if adapter_P is None else adapter_P, self.manifest)
        return instruction, instruction.to_fields(study=self.study.canonical, adapter=adapter)

    def memory(self, round: int) -> dict[str, Tensor]:
        return site_of_partition(0).memory(self.study, "federated").after(round)

    @property
    def memory_file(self) -> Path:
        (path,) = (self.folder / "memories").rglob("*.memory")
        return path


@pytest.fixture
def asked(
    make_study: Callable[..., StudyConfig], open_sites: Callable[..., Path], tmp_path: Path
) -> Callable[..., Asked]:
    """A site of a classifier's study with these keys of [strategy.personal]."""
    plain = make_study(("north",))

    def make(rule: str = "fedit", optimizer: str = "sgd", rate: float = 0.05, **personal: Any) -> Asked:
        study = plain.replace(
            backbone={"name": "stand-in-classifier", "sha256": "0" * 64},
            adapter={"rank": 2, "alpha": 4.0, "targets": "last-block", "train_norms": True},
            task={"kind": "classification", "targets": {"side": ["left", "right"]}},
            training={"local_epochs": 2, "batch_size": 1, "learning_rate": rate, "optimizer": optimizer},
            rounds={"num_rounds": 9},
            strategy={"name": rule, "personal": personal or None},
        )
        resolved = resolve(study, CPU)
        open_sites(resolved)
        return Asked(resolved, tmp_path)

    return make


def raw(tensor: Tensor) -> bytes:
    return tensor.contiguous().numpy().tobytes()


HEADS = ("head",)
STAYING = {"fedbn": norms_of, "fedrep": lambda manifest: heads_of(manifest, HEADS)}


@pytest.mark.parametrize("method", STAYING)
def test_what_stays_is_in_no_upload(asked: Callable[..., Asked], method: str) -> None:
    site = asked(method=method)
    own = STAYING[method](site.manifest)
    assert own
    payload, changes = site.payload(), site.train()
    assert changes.keys() == {spec.name for spec in site.manifest.tensors} - own
    before = site.manifest.unflatten(site.start)
    after = {name.removeprefix("own:"): tensor for name, tensor in site.memory(1).items()}
    assert after.keys() == own
    for name in own:
        change = after[name] - before[name]
        assert change.abs().max() > 0
        assert raw(after[name]) not in payload
        assert raw(change) not in payload
    assert all(raw(change) in payload for change in changes.values())


@pytest.mark.parametrize("method", STAYING)
def test_own_tensors_are_evaluated_and_go_on_from_round_to_round(asked: Callable[..., Asked], method: str) -> None:
    site = asked(method=method)
    own = STAYING[method](site.manifest)
    assert torch.equal(site.evaluated(0), site.start)
    site.train(1)
    first = site.manifest.unflatten(site.evaluated(1, site.start + 1))
    for name, tensor in site.manifest.unflatten(site.start + 1).items():
        assert torch.equal(first[name], tensor) == (name not in own)
    site.train(2)
    second = site.manifest.unflatten(site.evaluated(2))
    assert all(not torch.equal(first[name], second[name]) for name in own)
    kept = {name: site.memory(2)[f"own:{name}"] for name in own}
    assert all(torch.equal(second[name], kept[name]) for name in own)


def test_metrics_are_those_of_the_own_model(asked: Callable[..., Asked], monkeypatch: pytest.MonkeyPatch) -> None:
    scored: list[Tensor] = []

    def noting(*arguments: Any, state: ModelState, **options: Any) -> dict[str, float]:
        scored.append(state.adapter_P)
        return evaluate_locally(*arguments, state=state, **options)

    monkeypatch.setattr(serve, "evaluate_locally", noting)
    site = asked(method="ditto", proximal=0.0)
    site.metrics(0)
    site.train(1)
    assert site.metrics(1)
    assert torch.equal(scored[0], site.start)
    assert torch.equal(scored[1], site.memory(1)["ditto:model"])
    assert not torch.equal(scored[1], site.start)


def test_fedrep_trains_heads_on_the_body_as_it_came_and_then_the_body(
    asked: Callable[..., Asked], monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[tuple[set[str], Tensor, Tensor]] = []

    def noting(*arguments: Any, trainable: Subspace, start_P: Tensor, **options: Any) -> TrainResult:
        result = train_locally(*arguments, trainable=trainable, start_P=start_P, **options)
        calls.append((set(trainable.parts), start_P, result.adapter_P))
        return result

    monkeypatch.setattr(client.plain_round, "train_locally", noting)
    site = asked(method="fedrep")
    site.train()
    heads = heads_of(site.manifest, HEADS)
    (first, begin_P, heads_P), (second, middle_P, end_P) = calls
    assert first == heads
    assert second == {spec.name for spec in site.manifest.tensors} - heads
    assert torch.equal(begin_P, site.start)
    assert torch.equal(middle_P, heads_P)
    after_heads, end = site.manifest.unflatten(heads_P), site.manifest.unflatten(end_P)
    before = site.manifest.unflatten(site.start)
    for name in end:
        assert torch.equal(after_heads[name], end[name]) == (name in heads)
        assert torch.equal(after_heads[name], before[name]) == (name not in heads)


OWN_MODELS: list[dict[str, Any]] = [{"method": "ditto", "proximal": 0.3}, {"method": "site-adapter"}]


@pytest.mark.parametrize("personal", OWN_MODELS, ids=lambda personal: personal["method"])
def test_own_model_changes_nothing_of_what_the_site_sends(
    asked: Callable[..., Asked], personal: dict[str, Any]
) -> None:
    alone = [asked().payload(number) for number in (1, 2)]
    site = asked(**personal)
    payloads = [site.payload(number) for number in (1, 2)]
    assert payloads == alone
    for number, payload in enumerate(payloads, start=1):
        for tensor in site.manifest.unflatten(site.evaluated(number)).values():
            assert raw(tensor) not in payload


def test_ditto_agrees_with_its_algorithm(asked: Callable[..., Asked], monkeypatch: pytest.MonkeyPatch) -> None:
    """Algorithm 1 on made-up gradients: v - eta (g(v) + lambda (v - w)), from v on, w as it came each round."""
    pull = 0.3
    site = asked(method="ditto", proximal=pull, rate=0.1)
    gradients = follow_gradients(monkeypatch)
    shared = [site.start, site.start + 0.5, site.start - 0.25]
    v = site.start
    for number, w in enumerate(shared, start=1):
        site.train(number, w)
        for _ in range(gradients.steps_per_pass):
            v = v - 0.1 * (gradients.at(v) + pull * (v - w))
        torch.testing.assert_close(site.evaluated(number, w), v, rtol=1e-4, atol=1e-5)


def test_site_adapter_is_an_offset_on_the_shared_adapter(
    asked: Callable[..., Asked], monkeypatch: pytest.MonkeyPatch
) -> None:
    site = asked(method="site-adapter", rate=0.1)
    gradients = follow_gradients(monkeypatch)
    shared = [site.start, site.start + 0.5, site.start - 0.25]
    offset = torch.zeros_like(site.start)
    for number, w in enumerate(shared, start=1):
        site.train(number, w)
        for _ in range(gradients.steps_per_pass):
            offset = offset - 0.1 * gradients.at(w + offset)
        torch.testing.assert_close(site.memory(number)["site-adapter:offset"], offset, rtol=1e-4, atol=1e-5)
        following = w + 0.125  # what the server makes of the round
        torch.testing.assert_close(site.evaluated(number, following), following + offset, rtol=1e-4, atol=1e-5)


@dataclass(frozen=True)
class Gradients:
    """Of a quadratic loss, in place of the model's: training passes take a number of plain steps along them."""

    steps_per_pass: int = 3

    def at(self, x_P: Tensor) -> Tensor:
        return 0.7 * (x_P - 0.2)


def follow_gradients(monkeypatch: pytest.MonkeyPatch) -> Gradients:
    gradients = Gradients()

    def train(*arguments: Any, start_P: Tensor, trainable: Subspace, pull: Any, **_: Any) -> TrainResult:
        rate = arguments[3].learning_rate
        z, start_Z = trainable.coordinates(start_P).clone(), trainable.coordinates(start_P)
        for _step in range(gradients.steps_per_pass):
            pulled = None if pull is None else pull(z - start_Z)
            z = z - rate * (gradients.at(z) + (0 if pulled is None else pulled))
        return TrainResult(trainable.place(start_P, z), 0.0, gradients.steps_per_pass)

    monkeypatch.setattr(client.plain_round, "train_locally", train)
    return gradients


ALL: list[dict[str, Any]] = [*OWN_MODELS, {"method": "fedbn"}, {"method": "fedrep"}]


@pytest.mark.parametrize("personal", ALL, ids=lambda personal: personal["method"])
def test_round_that_is_asked_again_begins_with_the_memory_from_before_it(
    asked: Callable[..., Asked], personal: dict[str, Any]
) -> None:
    site = asked(**personal)
    payloads = [site.payload(number) for number in (1, 2, 3)]
    kept = site.memory(3)
    assert site.payload(3) == payloads[2]  # a resumed run: not from where round 3 ended
    again = site.memory(3)
    assert kept.keys() == again.keys()
    assert all(torch.equal(kept[name], again[name]) for name in kept)


@pytest.mark.parametrize("personal", ALL, ids=lambda personal: personal["method"])
def test_damaged_memory_is_refused(asked: Callable[..., Asked], personal: dict[str, Any]) -> None:
    site = asked(**personal)
    site.payload(1)
    site.memory_file.write_bytes(site.memory_file.read_bytes()[:-5])
    for ask in (lambda: site.payload(2), lambda: site.evaluated(1)):
        with pytest.raises(SiteError, match="Expected what the site remembers"):
            ask()


@pytest.mark.parametrize("personal", ALL, ids=lambda personal: personal["method"])
def test_site_that_trains_for_all_keeps_nothing(asked: Callable[..., Asked], personal: dict[str, Any]) -> None:
    alone = strategy_of(asked(**personal).study, "pooled")
    assert alone.plan(1).stays == frozenset()
    assert not alone.remembers_at_sites


def test_pull_of_ditto_vanishes_at_the_shared_model() -> None:
    z_Z = torch.arange(4.0)
    assert torch.equal(Ditto(2.0).own_pull(z_Z, z_Z), torch.zeros(4))
    assert torch.equal(Ditto(2.0).own_pull(z_Z + 1, z_Z), torch.full((4,), 2.0))
    assert SiteAdapter().own_pull(z_Z, z_Z) is None


@pytest.mark.parametrize(
    ("name", "is_norm"),
    [
        ("block.norm1", True),
        ("a.layernorm", True),
        ("a.layer_norm", True),
        ("norm_final_attn", True),
        ("b.ln_1", True),
        ("b.bn", True),
        ("b.normaliser", False),
        ("head.linear.abnormal", False),
    ],
)
def test_norms_are_found_by_name(name: str, is_norm: bool) -> None:
    tensors = {f"{name}.bias": torch.zeros(3), f"{name}.weight": torch.zeros(3), "z.lora_A.weight": torch.zeros(1, 2)}
    manifest = AdapterManifest.of(tensors, method="lora", rank=1)
    assert norms_of(manifest) == (frozenset(tensors) - {"z.lora_A.weight"} if is_norm else frozenset())


def test_heads_are_the_backbones_and_nothing_that_is_called_alike() -> None:
    heads = {"base_model.model.head.linear.norm.bias", "base_model.model.head.linear.norm.weight"}
    others = {
        "base_model.model.encoder.head.weight",
        "base_model.model.header.weight",
        "base_model.model.q_proj.weight",
    }
    tensors = {name: torch.zeros(2) if name.endswith("bias") else torch.zeros(2, 3) for name in heads | others}
    manifest = AdapterManifest.of(tensors, method="full", rank=None)
    assert heads_of(manifest, HEADS) == heads
    assert heads_of(manifest, ()) == frozenset()
    assert norms_of(manifest) == frozenset()  # a head for a target called norm is none


@pytest.mark.usefixtures("without_pictures")
@pytest.mark.slow
@pytest.mark.parametrize(
    "parts",
    [
        {
            "local": {"method": "scaffold"},
            "personal": {"method": "fedbn"},
            "server": {"optimizer": "fedadam", "learning_rate": 0.01},
        },
        {"local": {"method": "q-fedavg", "q": 1.0}, "personal": {"method": "fedrep"}},
        {"local": {"method": "feddyn", "alpha": 0.1}, "personal": {"method": "ditto", "proximal": 0.1}},
    ],
    ids=lambda parts: parts["personal"]["method"],
)
def test_whole_study_runs_with_its_baselines_and_every_part(
    make_study: Callable[..., StudyConfig],
    study_file: Callable[[StudyConfig], Path],
    tmp_path: Path,
    parts: dict[str, Any],
) -> None:
    study = make_study().replace(
        backbone={"name": "stand-in-classifier", "sha256": "0" * 64},
        adapter={"rank": 2, "alpha": 4.0, "targets": "last-block", "train_norms": True},
        task={"kind": "classification", "targets": {"side": ["left", "right"]}},
        training={"local_epochs": 1, "batch_size": 2, "learning_rate": 0.01, "optimizer": "sgd"},
        strategy=parts,
    )
    result = simulate(study_file(study), out=tmp_path / "out", workers=0)
    resolved = stored_study(result.folder)
    state = read_checkpoint(result.folder, resolved.resolved_manifest, study_digest=resolved.digest, scope="federated")
    assert state is not None
    assert state.round == 2
    start = resolved.resolved_manifest.unflatten(adapted_model(resolved, CPU).initial_P)
    after = resolved.resolved_manifest.unflatten(state.adapter_P)
    stays = strategy_of(resolved).plan(1).stays
    for name in after:
        if name in stays:
            assert torch.equal(start[name], after[name])
        elif "lora_A" not in name:  # whose gradient is nearly zero while B is
            assert not torch.equal(start[name], after[name])
