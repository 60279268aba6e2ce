"""``medfed cohort write``: the cohort that a study simulates, as the files of its sites."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from medfed.cli import main
from medfed.study import StudyConfig


@pytest.mark.slow
@pytest.mark.weights
def test_cohort_is_written_for_each_site_and_other_files_are_left_alone(
    make_study: Callable[..., StudyConfig],
    study_file: Callable[[StudyConfig], Path],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    recipe = {"scanner": "reference-3t", "train_patients": 1, "test_patients": 1}
    study = make_study(("spare",)).replace(
        task={"kind": "segmentation", "classes": ["thalamus-left"]},
        cohort={"kind": "brain-structures"},
        sites=[{"name": "north", **recipe}],
    )
    folder = tmp_path / "data"
    main(["cohort", "write", str(study_file(study)), str(folder), "--json"])
    written = json.loads(capsys.readouterr().out)
    assert written == {"north": str(folder / "north" / "manifest.csv")}
    assert len((folder / "north" / "manifest.csv").read_text().splitlines()) == 3
    assert len(list((folder / "north" / "images").iterdir())) == 2
    with pytest.raises(SystemExit) as ended:
        main(["cohort", "write", str(study_file(study)), str(folder)])
    assert ended.value.code == 2


def test_study_without_a_cohort_has_none_to_write(
    make_study: Callable[..., StudyConfig], study_file: Callable[[StudyConfig], Path], tmp_path: Path
) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["cohort", "write", str(study_file(make_study(("north",)))), str(tmp_path / "data")])
    assert ended.value.code == 2
