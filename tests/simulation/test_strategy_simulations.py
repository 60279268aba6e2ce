"""Every rule through the real apps: killed and resumed, under masks, with privacy, and exported for PEFT."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

import medfed
import server.rounds
from medfed.errors import RoundError, StudyError
from medfed.models.adapted import AdaptedModel
from medfed.study import StudyConfig
from server.checkpoint import Checkpoint, read_checkpoint
from simulation.harness import Run, simulate
from simulation.run_folder import metrics_of, stored_study
from strategies.registry import RULES, strategy_of
from strategies.rules.robust import RobustRule
from strategies.secure_channel import SecureChannel
from strategies.shared_model import shared_state
from strategies.strategy import IndividualRule

MakeStudy = Callable[..., StudyConfig]
StudyFile = Callable[[StudyConfig], Path]

NO_HEADS = "head-only"
ONE_ROBUST_RULE = "median"  # the others are the same code with another function, and want more sites
NAMES = sorted(
    rule.name
    for rule in set(RULES.values())
    if rule.name != NO_HEADS and (not issubclass(rule, RobustRule) or rule.name == ONE_ROBUST_RULE)
)  # the stand-in segmenter has no heads
SUM_ONLY = [name for name in NAMES if not issubclass(RULES[name], IndividualRule)]


class PowerCutError(Exception):
    """Stands for one."""


def checkpoint_of(run: Run) -> Checkpoint:
    study = stored_study(run.folder)
    state = read_checkpoint(run.folder, study.resolved_manifest, study_digest=study.digest, scope="federated")
    assert state is not None
    return state


def test_rule_that_trains_heads_alone_is_refused_where_there_are_none(
    make_study: MakeStudy, study_file: StudyFile, tmp_path: Path
) -> None:
    with pytest.raises(StudyError, match="LoRA pairs alone"):
        simulate(study_file(make_study(strategy={"name": NO_HEADS})), out=tmp_path, workers=0)


@pytest.mark.usefixtures("without_pictures")
@pytest.mark.parametrize("name", NAMES)
def test_run_that_was_stopped_goes_on_to_the_same_state_bit_for_bit(
    make_study: MakeStudy, study_file: StudyFile, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    study = make_study(("north", "south", "west"), strategy={"name": name}, rounds={"num_rounds": 4})
    path = study_file(study)
    whole = simulate(path, out=tmp_path / "whole", workers=0, baselines=False)

    def stopping(folder: Path, checkpoint: Checkpoint) -> None:
        if checkpoint.round == 3:  # sites have trained for it, and remember; the server does not
            raise PowerCutError
        written(folder, checkpoint)

    written = server.rounds.write_checkpoint
    with monkeypatch.context() as patched:
        patched.setattr("server.rounds.write_checkpoint", stopping)
        with pytest.raises(PowerCutError):
            simulate(path, out=tmp_path / "stopped", workers=0, baselines=False)
    (folder,) = (tmp_path / "stopped").iterdir()
    resumed = simulate(resume=folder, workers=0)

    one, two = checkpoint_of(whole), checkpoint_of(resumed)
    assert torch.equal(one.adapter_P, two.adapter_P)
    for mine, other in ((one.broadcast, two.broadcast), (one.memory, two.memory)):
        assert mine.keys() == other.keys()
        assert all(torch.equal(mine[key], other[key]) for key in mine)
    assert (whole.folder / "metrics.jsonl").read_bytes() == (resumed.folder / "metrics.jsonl").read_bytes()
    assert not torch.equal(one.adapter_P, AdaptedModel(stored_study(whole.folder), torch.device("cpu")).initial_P)


@pytest.mark.process
@pytest.mark.parametrize("name", ["twin-fresh", "fedsa"])
def test_folds_and_memories_are_the_same_for_any_number_of_workers(
    make_study: MakeStudy, study_file: StudyFile, tmp_path: Path, name: str
) -> None:
    path = study_file(make_study(("north", "south", "west"), strategy={"name": name}, rounds={"num_rounds": 3}))
    here, forked = (simulate(path, out=tmp_path / str(n), workers=n) for n in (0, 2))
    assert torch.equal(checkpoint_of(here).adapter_P, checkpoint_of(forked).adapter_P)
    assert here.summary.sites == forked.summary.sites


@pytest.mark.usefixtures("without_pictures")
@pytest.mark.parametrize("name", [name for name in NAMES if name != "fedsa"])
def test_exported_adapter_on_the_plain_backbone_computes_what_the_sites_evaluated(
    make_study: MakeStudy, study_file: StudyFile, tmp_path: Path, name: str
) -> None:
    study = make_study(
        ("north", "south", "west"),
        strategy={"name": name},
        rounds={"num_rounds": 4},
        training={"local_epochs": 2, "batch_size": 2, "learning_rate": 0.05},
    )
    run = simulate(study_file(study), out=tmp_path, workers=0, baselines=False)
    resolved, final = stored_study(run.folder), checkpoint_of(run)
    model = AdaptedModel(resolved, torch.device("cpu"))
    bare = AdaptedModel(resolved, torch.device("cpu"))._peft.unload()
    loaded = medfed.load_adapter(run.folder / "adapter", bare).get_base_model()
    image, box = torch.rand(1, 3, 64, 64), torch.tensor([[4.0, 4.0, 40.0, 40.0]])
    owner = torch.zeros(1, dtype=torch.int64)
    model.train(False)
    with torch.no_grad():
        before = model.backbone(image, box, owner)
        model.put(shared_state(strategy_of(resolved), final.adapter_P, final.broadcast))
        after = model.backbone(image, box, owner)
        torch.testing.assert_close(loaded(image, box, owner), after, rtol=1e-4, atol=1e-4)
    assert float((after - before).abs().max()) > 1e-3


@pytest.mark.usefixtures("without_pictures")
@pytest.mark.parametrize("name", ["fedit", "fedsa", "twin-fresh", "fed-sb"])
def test_masks_change_nothing_but_the_rounding(
    make_secure_study: MakeStudy, study_file: StudyFile, tmp_path: Path, name: str
) -> None:
    """One round: in later ones sites train from adapters that differ in their last bits."""
    study = make_secure_study().replace(strategy={"name": name}, rounds={"num_rounds": 1})
    plain = study.replace(
        secure_aggregation=None,
        strategy={"name": name, "weighting": "uniform"},
        sites=[site.model_copy(update={"declared_patients": None}) for site in study.sites],
    )
    masked = study.replace(strategy={"name": name, "weighting": "uniform"})
    one, two = (simulate(study_file(s), out=tmp_path / s.digest, workers=0, baselines=False) for s in (masked, plain))
    resolved = stored_study(one.folder)
    bound = SecureChannel.training(resolved, 1, strategy_of(resolved).plan(1)).quantisation_bound(5)
    difference_P = checkpoint_of(one).adapter_P - checkpoint_of(two).adapter_P
    assert float(difference_P.abs().max()) <= 1.5 * bound + 1e-6  # a core's frame mixes the errors of a column
    assert float(difference_P.abs().max()) > 0


@pytest.mark.usefixtures("without_pictures")
@pytest.mark.parametrize("name", SUM_ONLY)
def test_privacy_at_each_site_composes_with_every_rule(
    make_private_study: MakeStudy, study_file: StudyFile, tmp_path: Path, name: str
) -> None:
    study = make_private_study().replace(strategy={"name": name}, rounds={"num_rounds": 3})
    run = simulate(study_file(study), out=tmp_path, workers=0, baselines=False)
    assert set(run.summary.privacy.sites) == {"north", "south"}
    assert all(site.steps == 3 * 2 for site in run.summary.privacy.sites.values())
    assert np.isfinite(run.summary.mean["federated"])
    initial_P = AdaptedModel(stored_study(run.folder), torch.device("cpu")).initial_P
    assert not torch.equal(checkpoint_of(run).adapter_P, initial_P)


@pytest.mark.usefixtures("without_pictures")
@pytest.mark.parametrize("name", ["fedit", "ffa-lora", "alt-gauge", "twin-fresh", "fed-sb"])
def test_shared_noise_composes_with_rules_whose_mean_change_is_all_that_travels(
    make_secure_study: MakeStudy, study_file: StudyFile, tmp_path: Path, name: str
) -> None:
    strategy = {"name": name, **({"hold_frames": 2} if name == "twin-fresh" else {})}
    shared = make_secure_study().replace(
        secure_aggregation={"enabled": True, "max_colluding": 1},
        strategy=strategy,
        rounds={"num_rounds": 4},
        training={"batch_size": 2, "learning_rate": 0.1, "optimizer": "sgd"},
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
    run = simulate(study_file(shared), out=tmp_path, workers=0, baselines=False)
    assert [line["round"] for line in metrics_of(run.folder) if line["event"] == "train"] == [1, 2, 3, 4]
    folds = {name.split(":")[0] for name in checkpoint_of(run).broadcast}
    assert folds == ({"fold-00001"} if name == "twin-fresh" else set())


@pytest.mark.usefixtures("without_pictures")
def test_update_that_is_too_long_is_refused_where_other_statistics_travel_with_it(
    make_secure_study: MakeStudy, study_file: StudyFile, tmp_path: Path
) -> None:
    """Scaled down together, FedNova's step and its length would shrink the sum twice."""
    study = make_secure_study(update_clip_norm=1e-6).replace(
        training={"local_epochs": 1, "batch_size": 2, "learning_rate": 0.1, "optimizer": "sgd"},
        strategy={"name": "fedit", "local": {"method": "fednova"}},
    )
    with pytest.raises(RoundError, match="SecureAggregationError"):
        simulate(study_file(study), out=tmp_path / "fednova", workers=0, baselines=False)
    plain = study.replace(strategy={"name": "fedit"})
    simulate(study_file(plain), out=tmp_path / "fedit", workers=0, baselines=False)


@pytest.mark.usefixtures("without_pictures")
def test_sites_that_differ_leave_their_own_adapters(
    make_study: MakeStudy, study_file: StudyFile, tmp_path: Path
) -> None:
    run = simulate(study_file(make_study(strategy={"name": "fedsa"})), out=tmp_path, workers=0, baselines=False)
    weights = [
        load_file(run.folder / folder / "adapter_model.safetensors")
        for folder in ("adapter", "adapters/north", "adapters/south")
    ]
    shared, north, south = ({name: t for name, t in one.items() if "lora_B" in name} for one in weights)
    assert all(not bool(tensor.any()) for tensor in shared.values())
    assert all(bool(tensor.any()) for tensor in north.values())
    assert all(not torch.equal(north[name], south[name]) for name in north)


def test_parts_that_do_not_go_together_are_refused_before_anything_is_made(
    make_study: MakeStudy, study_file: StudyFile, tmp_path: Path
) -> None:
    study = make_study(strategy={"name": "rolora", "server": {"optimizer": "fedavgm"}})
    with pytest.raises(StudyError, match="same coordinates"):
        simulate(study_file(study), out=tmp_path / "runs", workers=0)
    assert not (tmp_path / "runs").exists()
