"""The comparison of arms: the right number in the right place, and nothing where nothing was measured."""

import pytest

from medfed.study import StudyConfig
from server.results import COLUMNS, PrivacyStatement, Results
from simulation.summary import compare


def make_study(*sites: str, num_rounds: int = 2) -> StudyConfig:
    return StudyConfig.model_validate(
        {
            "name": "s",
            "seed": 1,
            "backbone": {"name": "lite-medsam", "sha256": "0" * 64},
            "adapter": {"rank": 1, "alpha": 1, "targets": "decoder-qv"},
            "task": {"kind": "segmentation", "classes": ["putamen"]},
            "training": {"local_epochs": 1, "batch_size": 1, "learning_rate": 0.1},
            "rounds": {"num_rounds": num_rounds},
            "sites": [{"name": name} for name in sites],
        }
    )


def evaluation(scope: str, round_number: int, site: str, dice: float, **parts: float) -> dict[str, object]:
    line = {"event": "evaluate", "scope": scope, "round": round_number, "site": site, "num_examples": 4}
    return {**line, "dice": dice, **{f"dice/{name}": value for name, value in parts.items()}}


FEDERATED = [
    evaluation("federated", 0, "a", 0.5, putamen=0.51),
    evaluation("federated", 0, "b", 0.4),
    {"event": "train", "scope": "federated", "round": 2, "site": "a", "loss": 9.0},
    evaluation("federated", 1, "a", 0.99),
    evaluation("federated", 2, "a", 0.8, putamen=0.81),
    evaluation("federated", 2, "b", 0.6),
]
ARMS = {
    "federated": FEDERATED,
    "local-a": [evaluation("local-a", 2, "a", 0.7)],
    "local-b": [evaluation("local-b", 2, "b", 0.65)],
    "pooled": [evaluation("pooled", 2, "a", 0.9), evaluation("pooled", 2, "b", 0.5)],
}


def test_each_column_takes_the_evaluation_it_is_named_after() -> None:
    sites, mean, worst = compare(make_study("a", "b"), ARMS, "dice")
    assert sites["a"]["dice"] == {"zero_shot": 0.5, "local_only": 0.7, "federated": 0.8, "pooled": 0.9}
    assert sites["b"]["dice"] == {"zero_shot": 0.4, "local_only": 0.65, "federated": 0.6, "pooled": 0.5}
    assert mean == pytest.approx({"zero_shot": 0.45, "local_only": 0.675, "federated": 0.7, "pooled": 0.7})
    assert worst == {"zero_shot": 0.4, "local_only": 0.65, "federated": 0.6, "pooled": 0.5}


def test_numbers_that_are_no_metrics_stay_out_of_the_table() -> None:
    sites, _, _ = compare(make_study("a", "b"), ARMS, "dice")
    assert set(sites["a"]) == {"dice", "dice/putamen"}
    assert set(sites["b"]) == {"dice"}


def test_metric_that_one_arm_lacks_keeps_the_other_arms() -> None:
    sites, _, _ = compare(make_study("a", "b"), ARMS, "dice")
    assert sites["a"]["dice/putamen"] == {"zero_shot": 0.51, "federated": 0.81}


def test_without_baselines_only_two_columns_are_left() -> None:
    sites, mean, worst = compare(make_study("a", "b"), {"federated": FEDERATED}, "dice")
    assert set(sites["a"]["dice"]) == set(mean) == set(worst) == {"zero_shot", "federated"}


def test_site_that_was_never_evaluated_is_there_and_empty() -> None:
    sites, mean, _ = compare(make_study("a", "b", "c"), {"federated": FEDERATED}, "dice")
    assert sites["c"] == {}
    assert mean["federated"] == pytest.approx(0.7)


def test_no_evaluation_at_all_gives_no_mean_rather_than_nan() -> None:
    assert compare(make_study("a"), {}, "dice") == ({"a": {}}, {}, {})


def test_unfinished_run_has_no_last_round() -> None:
    sites, mean, _ = compare(make_study("a", "b", num_rounds=3), {"federated": FEDERATED}, "dice")
    assert set(sites["a"]["dice"]) == set(mean) == {"zero_shot"}


def test_summary_survives_its_json_with_the_documented_keys() -> None:
    sites, mean, worst = compare(make_study("a", "b"), ARMS, "dice")
    summary = Results(
        run_dir="r", study="s", rounds=2, wall_s=1.5, primary="dice", sites=sites, mean=mean,
        worst_site=worst, privacy=PrivacyStatement(promise="", warnings=("none",)), cohort="synthetic",
    )  # fmt: skip
    assert Results.model_validate_json(summary.model_dump_json()) == summary
    assert {"run_dir", "rounds", "wall_s", "sites", "mean", "worst_site", "privacy"} <= set(summary.model_dump())
    assert tuple(summary.model_dump()["mean"]) == COLUMNS
