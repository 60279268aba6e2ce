"""``medfed site preflight``: a table to act on, an object for scripts, an exit code for both."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from rich.console import Console

from client.preflight_check import Check
from client.preflight_command import show
from medfed.cli import main
from medfed.study import StudyConfig

Run = Callable[..., str]


@pytest.fixture
def run(capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Run:
    """Runs the command; returns standard output if it ends with the exit code that is expected."""
    monkeypatch.setenv("COLUMNS", "80")

    def call(*arguments: object, code: int = 0) -> str:
        try:
            main(["site", "preflight", *map(str, arguments)])
            ended = 0
        except SystemExit as exit_:
            ended = int(exit_.code or 0)
        out, err = capfd.readouterr()
        assert ended == code, (out, err)
        assert "Traceback" not in out + err
        return out

    return call


@pytest.fixture
def given(
    make_study: Callable[..., StudyConfig], study_file: Callable[[StudyConfig], Path]
) -> tuple[Path, tuple[object, ...]]:
    """A sound manifest, and the arguments that look at it for a study."""
    study = make_study(("north",))
    manifest = study.sites[0].data
    assert manifest is not None
    return manifest, (manifest, "--study", study_file(study), "--name", "north")


def test_table_of_a_sound_site_says_ready(given: tuple[Path, tuple[object, ...]], run: Run) -> None:
    out = run(*given[1])
    assert "Preflight of north" in out
    assert "train: 3 patients, 3 images; test: 2 patients, 2 images" in " ".join(out.split())
    assert out.rstrip().splitlines()[-1].startswith("ready: ")
    assert "FAIL" not in out
    assert max(map(len, out.splitlines())) <= 80


def test_table_of_a_faulty_site_says_what_to_do_and_fails(given: tuple[Path, tuple[object, ...]], run: Run) -> None:
    manifest, arguments = given
    (manifest.parent / "image4.nii.gz").write_bytes((manifest.parent / "image0.nii.gz").read_bytes())
    out = run(*arguments, code=11)
    assert "FAIL  duplicates across" in out
    assert "do: remove them from one split" in " ".join(out.split())
    assert "not ready: " in out


def test_json_is_one_object_with_every_check(given: tuple[Path, tuple[object, ...]], run: Run) -> None:
    manifest, arguments = given
    passed = json.loads(run(*arguments, "--json"))
    assert (passed["site"], passed["passed"], passed["counts"]["fail"]) == ("north", True, 0)
    assert sum(passed["counts"].values()) == len(passed["checks"])
    (manifest.parent / "image4.nii.gz").write_bytes(b"")
    failed = json.loads(run(*arguments, "--json", code=11))
    assert (failed["passed"], failed["counts"]["fail"]) == (False, 1)
    (fault,) = [check for check in failed["checks"] if check["outcome"] == "fail"]
    assert set(fault) == {"part", "name", "outcome", "found", "what_to_do"}
    assert "image4.nii.gz" in fault["found"]


def test_study_is_looked_for_only_if_it_is_named(given: tuple[Path, tuple[object, ...]], run: Run) -> None:
    out = " ".join(run(given[0]).split())
    assert "name the study to check labels against its classes" in out


def test_missing_manifest_is_a_fault_and_not_a_crash(tmp_path: Path, run: Run) -> None:
    assert "FAIL  manifest" in run(tmp_path / "none.csv", code=11)


@pytest.mark.parametrize("columns", [60, 80, 120])
def test_table_keeps_to_the_width_and_shows_markup_as_it_is(columns: int, capsys: pytest.CaptureFixture[str]) -> None:
    check = Check("data", "manifest", "fail", "m.csv, training[0]: [red]" + "long " * 40 + "x" * 200, "mend [/] it.")
    show("north", [check], Console(width=columns))
    out = capsys.readouterr().out
    assert max(map(len, out.splitlines())) <= columns
    assert "training[0]: [red]" in " ".join(out.split())
    assert "mend [/] it." in " ".join(out.split())


def test_advice_that_several_lines_share_is_given_once(capsys: pytest.CaptureFixture[str]) -> None:
    checks = [Check("identity", f"tags {n}", "warn", "found.", "clean them.") for n in range(3)]
    show("north", [*checks, Check("identity", "other", "fail", "found.", "mend it.")], Console(width=80))
    out = capsys.readouterr().out
    assert (out.count("clean them."), out.count("mend it.")) == (1, 1)
    assert out.index("tags 2") < out.index("clean them.") < out.index("other")
