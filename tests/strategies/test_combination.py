"""Which parts of a strategy go together: what is refused is refused at both ends, before anything trains."""

from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch

from medfed.adapter_manifest import AdapterManifest
from medfed.errors import StudyError
from medfed.study import StudyConfig
from strategies.combination import _check_passes, combined
from strategies.federation import Strategy
from strategies.registry import RULES, strategy_of
from strategies.strategy import IndividualRule, Setting, State, Tree
from strategies.subspace import Subspace

MANIFEST = AdapterManifest.of(
    {
        "block.norm1.bias": torch.zeros(4),
        "block.norm1.weight": torch.zeros(4),
        "block.q_proj.lora_A.weight": torch.zeros(2, 4),
        "block.q_proj.lora_B.weight": torch.zeros(4, 2),
        "head.linear.side.bias": torch.zeros(3),
        "head.linear.side.weight": torch.zeros(3, 4),
    },
    method="lora",
    rank=2,
)


class Individually(IndividualRule):
    name = "individually"
    exact = True

    def trainable(self, round_number: int) -> Subspace:
        return Subspace.everything(self.manifest)

    def merge(self, round_number: int, state: State, deltas: Mapping[str, Tree], weights: Mapping[str, float]) -> State:
        return state


Make = Callable[..., Strategy]


def in_classes(study: StudyConfig) -> StudyConfig:
    """The study with a backbone that has heads."""
    return study.replace(
        backbone={"name": "stand-in-classifier", "sha256": "0" * 64},
        task={"kind": "classification", "targets": {"side": ["left", "middle", "right"]}},
    )


@pytest.fixture
def make(make_study: Callable[..., StudyConfig]) -> Make:
    plain = in_classes(make_study(("here",)))

    def made(
        rule: str = "fedit",
        *,
        optimizer: str = "sgd",
        study: StudyConfig | None = None,
        manifest: AdapterManifest = MANIFEST,
        **parts: Any,
    ) -> Strategy:
        study = plain if study is None else in_classes(study)
        training = study.training.model_copy(update={"optimizer": optimizer})
        name = "fedit" if rule == Individually.name else rule
        study = study.replace(training=training, strategy={"name": name, **parts}).with_manifest(manifest)
        if rule != Individually.name:
            return strategy_of(study)
        setting = Setting(config=study.strategy, manifest=manifest, seed=0, num_sites=1)
        return combined(study, Individually(setting), sites_differ=True)

    return made


LOCAL = {"fedprox": {"mu": 0.1}, "scaffold": {}, "fednova": {}, "feddyn": {"alpha": 0.1}, "q-fedavg": {"q": 1.0}}
PERSONAL = {"fedbn": {}, "fedrep": {}, "ditto": {"proximal": 0.1}, "site-adapter": {}}
SERVER = {
    "fedavgm": {"momentum": 0.5},
    "fedadagrad": {"learning_rate": 0.1},
    "fedyogi": {"learning_rate": 0.1},
    "fedadam": {"learning_rate": 0.1},
}


def part(method: str) -> dict[str, dict[str, Any]]:
    if method in SERVER:
        return {"server": {"optimizer": method, **SERVER[method]}}
    if method in LOCAL:
        return {"local": {"method": method, **LOCAL[method]}}
    return {"personal": {"method": method, **PERSONAL[method]}}


@pytest.mark.parametrize("method", [*LOCAL, *PERSONAL, *SERVER])
def test_study_names_each_part(make: Make, method: str) -> None:
    strategy = make(**part(method))
    assert method in {strategy.local.name, strategy.personal.name, strategy.server.name}
    assert {strategy.local.name, strategy.personal.name, strategy.server.name} & {"plain", "none"}


@pytest.mark.parametrize("method", [*PERSONAL, *LOCAL])
def test_only_pulls_go_with_a_rule_that_takes_single_sites(make: Make, method: str) -> None:
    if method == "fedprox" or method in PERSONAL:
        make(Individually.name, **part(method))
        return
    with pytest.raises(StudyError, match=f"sends statistics with 'individually'.*got '{method}'"):
        make(Individually.name, **part(method))


@pytest.mark.parametrize("method", SERVER)
def test_server_optimiser_is_refused_with_a_rule_that_takes_single_sites(make: Make, method: str) -> None:
    with pytest.raises(StudyError, match=f"no strategy.server with 'individually'.*'{method}'"):
        make(Individually.name, **part(method))


@pytest.mark.parametrize(
    ("rule", "method"),
    [
        (name, method)
        for name, rule in RULES.items()
        for method in ("ditto", "site-adapter", *SERVER)
        if not rule.fixed_subspace and not (method in SERVER and issubclass(rule, IndividualRule))  # refused above
    ],
)
def test_what_remembers_along_coordinates_is_refused_where_they_change(make: Make, rule: str, method: str) -> None:
    with pytest.raises(StudyError, match=f"same coordinates in every round for '{method}'"):
        make(rule, **part(method))


@pytest.mark.parametrize("method", ["fedprox", "scaffold", "feddyn"])
def test_pulls_are_refused_with_several_passes(make: Make, method: str) -> None:
    with pytest.raises(StudyError, match=f"one pass over the data for '{method}'"):
        make(**part(method), **part("fedrep"))
    make(**part("fednova"), **part("fedrep"))


@pytest.mark.parametrize("method", ["fedrep", "ditto", "site-adapter"])
def test_training_twice_is_refused_with_privacy(
    make: Make, make_private_study: Callable[..., StudyConfig], method: str
) -> None:
    private = make_private_study()
    with pytest.raises(StudyError, match=rf"no \[privacy\] with '{method}'"):
        make(study=private, **part(method))
    make(study=private, **part("fedbn"))


@pytest.mark.parametrize("method", ["ditto", "site-adapter"])
def test_second_model_is_refused_where_tensors_stay_already(make: Make, method: str) -> None:
    with pytest.raises(StudyError, match=f"all shared for '{method}', got 'fedsa'"):
        make("fedsa", **part(method))


@pytest.mark.parametrize("method", ["ditto", "site-adapter"])
def test_second_model_is_refused_where_the_base_moves_under_it(make: Make, method: str) -> None:
    class Folding(Individually):
        def folds(self, broadcast: Tree) -> list[Tree]:
            return []

    study = make(**part(method))
    rule = Folding(study.rule.setting)
    with pytest.raises(StudyError, match=f"leaves the base weights alone for '{method}'"):
        _check_passes(Strategy(rule, study.local, study.personal, study.server))


@pytest.mark.parametrize("method", ["scaffold", "fednova", "feddyn", "q-fedavg", "fedbn", "fedrep"])
def test_probe_is_refused_where_the_change_is_no_plain_mean_of_the_whole_adapter(make: Make, method: str) -> None:
    with pytest.raises(StudyError, match=f"for strategy.probe, got '{method}'"):
        make(probe=True, **part(method))
    make(probe=True, **part("fedprox"))
    make(probe=True, **part("ditto"))


def test_fedrep_needs_heads_and_something_else_that_trains(make: Make) -> None:
    without_norms = MANIFEST.subset(lambda name: "norm" not in name)
    with pytest.raises(StudyError, match="trains heads and something else"):
        make("head-only", manifest=without_norms, **part("fedrep"))
    for lacking, message in [("head", "got no heads"), ("lora", "got heads alone")]:
        with pytest.raises(StudyError, match=message):
            make(manifest=without_norms.subset(lambda name, lacking=lacking: lacking not in name), **part("fedrep"))


def test_fedbn_needs_layers_of_normalisation(make: Make) -> None:
    with pytest.raises(StudyError, match="set adapter.train_norms = true"):
        make(manifest=MANIFEST.subset(lambda name: "norm" not in name), **part("fedbn"))
