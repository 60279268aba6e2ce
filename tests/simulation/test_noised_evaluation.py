"""A whole study whose held-out counts are noised: what leaves, what is shown, and what the ledgers say it cost."""

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from client.site import site_of_partition
from medfed.metrics.mergeable import CountLayout
from medfed.study import StudyConfig
from privacy.accounting import epsilon_spent
from privacy.plan import PrivacyPlan
from server.evaluation import EVALUATION
from simulation.harness import simulate
from simulation.run_folder import metrics_of, stored_study

MakeStudy = Callable[..., StudyConfig]
StudyFile = Callable[[StudyConfig], Path]

NOISED = {"noise_multiplier": 5.0}


def test_epsilon_shown_is_that_of_training_and_evaluations_together(
    make_private_study: MakeStudy, study_file: StudyFile, tmp_path: Path
) -> None:
    run = simulate(study_file(make_private_study(evaluation=NOISED)), out=tmp_path / "runs", workers=0)
    plan = PrivacyPlan.of_study(stored_study(run.folder))
    for site, spent in run.summary.privacy.sites.items():
        assert spent.epsilon == pytest.approx(plan.epsilon.value), site
        assert (spent.rounds, spent.steps) == (2, plan.total_steps)  # of training; evaluations are in epsilon alone
    assert "each patient, training or held-out" in run.summary.privacy.promise
    assert not any("without noise" in warning for warning in run.summary.privacy.warnings)


def test_nothing_exact_of_held_out_patients_is_written(
    make_private_study: MakeStudy, study_file: StudyFile, tmp_path: Path
) -> None:
    study = make_private_study(evaluation=NOISED)
    run = simulate(study_file(study), out=tmp_path / "noised", workers=0, baselines=False)
    assert not (run.folder / EVALUATION).exists()
    assert not (run.folder / "figures").exists()
    assert study.privacy is not None
    exact = study.replace(privacy={**study.privacy.model_dump(), "evaluation": "exact"})
    beside = simulate(study_file(exact), out=tmp_path / "exact", workers=0, baselines=False)
    evaluated = [line for line in metrics_of(beside.folder) if line["event"] == "evaluate" and line["round"] == 0]
    exact_values = {value for line in evaluated for value in line.values() if isinstance(value, float) and value > 0}
    assert exact_values
    lines = [line for line in metrics_of(run.folder) if line["event"] == "evaluate"]
    assert {(line["site"], line["round"]) for line in lines} == {(s, r) for s in ("north", "south") for r in (0, 2)}
    assert not exact_values & {value for line in lines for value in line.values() if isinstance(value, float)}
    assert all(line["num_examples"] == 0 for line in lines)


@pytest.mark.usefixtures("without_pictures")
@pytest.mark.parametrize("trust", ["site", "consortium"])
def test_noised_counts_add_up_under_masks(
    make_secure_study: MakeStudy, study_file: StudyFile, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, trust: str
) -> None:
    import client.released_counts as released_counts

    plain = make_secure_study()
    secure = {"enabled": True, "max_colluding": 1}
    study = plain.replace(
        secure_aggregation=secure if trust == "consortium" else {**secure, "update_clip_norm": 8.0},
        training={"batch_size": 2, "learning_rate": 0.01, "optimizer": "sgd"},
        privacy={
            "trust": trust,
            "unit": "patient",
            "noise_multiplier": 1.0,
            "delta": 0.01,
            "clip_norm": 1.0,
            "sampling_rate": 0.5,
            "steps_per_round": 1,
            "images_per_patient": 2,
            "evaluation": NOISED,
        },
    )
    layout, sent = CountLayout(study.task), []
    noise = released_counts.noised_counts

    def noting(*arguments: object, **options: object) -> np.ndarray:
        sent.append(noise(*arguments, **options))
        return sent[-1]

    monkeypatch.setattr(released_counts, "noised_counts", noting)
    run = simulate(study_file(study), out=tmp_path / "runs", workers=0, baselines=False)
    lines = [line for line in metrics_of(run.folder) if line["event"] == "evaluate"]
    assert [line["site"] for line in lines] == ["all-sites", "all-sites"]
    assert len(sent) == 10
    for line, of_round in zip(lines, (sent[:5], sent[5:]), strict=True):
        expected = layout.metrics(np.sum(of_round, axis=0))
        found = {name.removeprefix("all-patients/"): v for name, v in line.items() if name.startswith("all-patients/")}
        assert found == pytest.approx(expected, abs=0.01)
    mechanisms = [spending.charge.mechanism for spending in site_of_partition(0).ledger.charges("federated")]
    assert sum(mechanism.steps for mechanism in mechanisms) == 2 + 2
    plan = PrivacyPlan.of_study(stored_study(run.folder))
    assert sorted(mechanism.noise for mechanism in mechanisms) == ["gaussian"] * 2 + [plan.mechanism(1).noise] * 2
    assert epsilon_spent(mechanisms, plan.delta).value == pytest.approx(plan.epsilon.value)
    assert {site: spent.epsilon for site, spent in run.summary.privacy.sites.items()} == pytest.approx(
        dict.fromkeys(run.summary.privacy.sites, plan.epsilon.value)
    )
    assert not (run.folder / "inspection.jsonl").exists()
    assert json.loads((run.folder / "summary.json").read_text())["privacy"]["sites"]


@pytest.mark.usefixtures("without_pictures")
def test_exact_counts_add_up_under_masks_to_the_metrics_of_all_patients(
    make_secure_study: MakeStudy, study_file: StudyFile, tmp_path: Path
) -> None:
    study = make_secure_study()
    run = simulate(study_file(study), out=tmp_path / "runs", workers=0, baselines=False)
    (last,) = [line for line in metrics_of(run.folder) if line["event"] == "evaluate" and line["round"] == 2]
    # Sites hold equally many patients with one image each, so the mean of the sites is that of their patients.
    assert last["all-patients/dice"] == pytest.approx(run.summary.mean["federated"], abs=2e-3)
    assert last["all-patients/dice"] == pytest.approx(last["dice"], abs=2e-3)
