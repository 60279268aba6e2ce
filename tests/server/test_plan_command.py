"""``medfed study plan``: what it prints, and how it ends."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from medfed.cli import main
from medfed.study import StudyConfig
from server.study_plan import StudyPlan

MakeStudy = Callable[..., StudyConfig]
StudyFile = Callable[[StudyConfig], Path]

SHARED = {
    "trust": "consortium",
    "unit": "patient",
    "epsilon": 4.0,
    "delta": 0.01,
    "clip_norm": 1.0,
    "sampling_rate": 0.5,
    "steps_per_round": 1,
    "images_per_patient": 2,
    "evaluation": "exact",
}


def shared(study: StudyConfig, *, max_colluding: int = 1) -> StudyConfig:
    return study.replace(
        training={"batch_size": 2, "learning_rate": 0.01, "optimizer": "sgd"},
        secure_aggregation={"enabled": True, "max_colluding": max_colluding},
        privacy=SHARED,
    )


def test_table_fits_into_a_hundred_columns_and_says_what_counts(
    make_secure_study: MakeStudy,
    study_file: StudyFile,
    capfd: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("COLUMNS", "100")
    main(["study", "plan", str(study_file(shared(make_secure_study(), max_colluding=2)))])
    out = capfd.readouterr().out
    assert max(map(len, out.splitlines())) <= 100
    for text in (
        "5 sites, 2 rounds",
        "honest ones among them",
        "consortium (this study)",
        "noise / signal of a step: all 5 sites",
        "never seen",
        "keys, once for 32 sums",
        "recommended: trust = 'site'",
        "only 2 honest sites",
    ):
        assert text in out, text


@pytest.mark.parametrize("kind", ["plain", "site", "masked", "shared"])
def test_json_is_one_object_with_the_same_numbers(
    make_study: MakeStudy,
    make_private_study: MakeStudy,
    make_secure_study: MakeStudy,
    study_file: StudyFile,
    capfd: pytest.CaptureFixture[str],
    kind: str,
) -> None:
    make = {"plain": make_study, "site": make_private_study, "masked": make_secure_study}.get(kind, make_secure_study)
    study = shared(make()) if kind == "shared" else make()
    path = study_file(study)
    main(["study", "plan", str(path), "--json"])
    planned = StudyPlan.model_validate(json.loads(capfd.readouterr().out))
    assert planned.study == "small"
    assert (planned.quorum is None) == (kind in ("plain", "site"))
    assert (planned.recommended is None) == (kind in ("plain", "masked"))
    main(["study", "plan", str(path)])
    shown = capfd.readouterr().out
    assert f"{planned.traffic.round_up:,}" in shown
    assert all(f"{mode.noise_multiplier:.4f}" in shown for mode in planned.modes)
    assert ("Not differentially private" in shown) == (kind in ("plain", "masked"))


def test_rounds_that_are_possible_change_the_advice(
    make_secure_study: MakeStudy, study_file: StudyFile, capfd: pytest.CaptureFixture[str]
) -> None:
    path = study_file(shared(make_secure_study()))
    main(["study", "plan", str(path), "--rounds", "200", "--json"])
    assert json.loads(capfd.readouterr().out)["recommended"] == "consortium"


def test_mistakes_end_with_one_line_and_their_exit_codes(
    make_private_study: MakeStudy, study_file: StudyFile, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    too_much = study_file(make_private_study(delta=0.4))
    for path, exit_code, says in ((tmp_path / "none.toml", 2, "study file"), (too_much, 12, "delta below 1/3")):
        with pytest.raises(SystemExit) as ended:
            main(["study", "plan", str(path), "--json"])
        assert ended.value.code == exit_code
        captured = capfd.readouterr()
        assert says in json.loads(captured.out)["message"]
        assert len([line for line in captured.err.splitlines() if line.startswith("medfed:")]) == 1


def test_command_is_one_of_the_group_and_no_other(capfd: pytest.CaptureFixture[str]) -> None:
    main(["study", "--help"])
    assert "plan" in capfd.readouterr().out
    main(["--help"])
    assert "study.plan" not in capfd.readouterr().out
    with pytest.raises(SystemExit) as ended:
        main(["study.plan", "x.toml"])
    assert ended.value.code == 2
