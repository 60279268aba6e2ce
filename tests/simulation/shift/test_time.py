"""Shifts over rounds: a scanner is replaced, sites miss rounds; the result depends on neither workers nor luck."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from client.site import LaterData, VirtualSite, site_of_partition
from medfed.errors import StudyError
from medfed.study import StudyConfig
from server.checkpoint import read_checkpoint
from simulation import harness
from simulation.cohort import drifted
from simulation.harness import Run, simulate
from simulation.run_folder import metrics_of, stored_study
from simulation.shift.availability import attendance
from simulation.shift.study_shift import shifts_of

MakeStudy = Callable[..., StudyConfig]
StudyFile = Callable[[StudyConfig], Path]

SITES = ("north", "south", "west")


def with_shifts(study: StudyConfig, shifts: dict[str, Any], **changes: Any) -> StudyConfig:
    sites = [{**site.model_dump(), "shift": shifts.get(site.name)} for site in study.sites]
    return study.replace(sites=sites, **changes)


def adapter_of(run: Run) -> torch.Tensor:
    study = stored_study(run.folder)
    state = read_checkpoint(run.folder, study.resolved_manifest, study_digest=study.digest, scope="federated")
    assert state is not None
    return state.adapter_P


def trained_in(run: Run, round_number: int) -> list[str]:
    return [
        line["site"] for line in metrics_of(run.folder) if line["event"] == "train" and line["round"] == round_number
    ]


@pytest.mark.usefixtures("without_pictures")
@pytest.mark.process
def test_training_goes_on_without_sites_that_are_away_or_late_and_the_same_for_any_number_of_workers(
    make_study: MakeStudy, study_file: StudyFile, tmp_path: Path
) -> None:
    shifts = {"south": {"availability": {"absent_rounds": [1]}}, "west": {"availability": {"late": 0.6}}}
    study = with_shifts(make_study(SITES), shifts, rounds={"num_rounds": 4, "quorum": 1})
    missing = attendance(study, shifts_of(study))
    assert missing[1, "south"] == "away"
    assert "late" in missing.values()
    runs = [
        simulate(study_file(study), out=tmp_path / f"runs{n}", workers=n, baselines=n == 0) for n in (0, 2)
    ]  # fmt: skip
    for number in range(1, 5):
        assert trained_in(runs[0], number) == [site for site in SITES if (number, site) not in missing]
    assert torch.equal(adapter_of(runs[0]), adapter_of(runs[1]))
    assert (runs[0].folder / "metrics.jsonl").read_bytes() == (runs[1].folder / "metrics.jsonl").read_bytes()
    local = metrics_of(runs[0].folder / "arms" / "local-south")
    assert {line["round"] for line in local if line["event"] == "train"} == {1, 2, 3, 4}


def test_round_that_cannot_reach_its_quorum_is_refused_before_the_run(make_study: MakeStudy) -> None:
    study = with_shifts(make_study(SITES), {"south": {"availability": {"absent_rounds": [2]}}})
    with pytest.raises(StudyError, match=r"3 sites in round 2, but shift.availability leaves 2 \(north, west\)"):
        shifts_of(study)


def test_sites_miss_rounds_at_the_rate_that_is_asked_for(make_study: MakeStudy) -> None:
    study = with_shifts(
        make_study(SITES),
        {"west": {"availability": {"dropout": 0.3, "late": 0.2}}},
        rounds={"num_rounds": 1000, "quorum": 1},
    )
    kinds = list(attendance(study, shifts_of(study)).values())
    assert abs(kinds.count("away") - 300) < 4 * (1000 * 0.3 * 0.7) ** 0.5
    assert abs(kinds.count("late") - 140) < 4 * (1000 * 0.14 * 0.86) ** 0.5


def test_absence_of_one_site_does_not_depend_on_the_other_sites(make_study: MakeStudy) -> None:
    some = {"west": {"availability": {"dropout": 0.4}}}
    more = {**some, "north": {"availability": {"dropout": 0.4}}}
    rounds = {"num_rounds": 40, "quorum": 1}
    study = make_study(SITES)
    one, both = (
        attendance(s, shifts_of(s)) for s in (with_shifts(study, shifts, rounds=rounds) for shifts in (some, more))
    )
    assert {key for key in both if key[1] == "west"} == set(one)


def test_availability_on_ray_is_refused(make_study: MakeStudy, study_file: StudyFile, tmp_path: Path) -> None:
    study = with_shifts(
        make_study(), {"south": {"availability": {"absent_rounds": [1]}}}, rounds={"num_rounds": 2, "quorum": 1}
    )
    with pytest.raises(StudyError, match="engine in-process"):
        simulate(study_file(study), out=tmp_path, engine="ray")


def test_shift_of_images_is_refused_for_a_site_with_its_own(make_study: MakeStudy) -> None:
    study = with_shifts(make_study(), {"south": {"noise": {"sd": [0.1, 0.1]}}})
    with pytest.raises(StudyError, match="medfed cohort shift"):
        shifts_of(study)


def test_site_holds_the_data_of_the_round_it_is_turned_to() -> None:
    old, new, newer = (Path(name) for name in ("old.csv", "new.csv", "newer.csv"))
    later = (LaterData(from_round=2, manifests=(new,)), LaterData(from_round=4, manifests=(newer,)))
    site = VirtualSite(name="pooled", manifests=(old,), later=later)
    assert [site.manifests_in(number) for number in range(6)] == [(old,)] * 2 + [(new,)] * 2 + [(newer,)] * 2


def test_pooled_data_follows_every_scanner_that_is_replaced(make_study: MakeStudy) -> None:
    study = make_study(SITES)
    manifests = {site.name: site.data for site in study.sites if site.data}
    made = with_shifts(
        study,
        {name: {"drift": {"from_round": number, "scanner": "bias-3t"}} for name, number in (("north", 3), ("west", 2))},
    )
    shifts = {site.name: site.shift for site in made.sites if site.shift}
    *_, pooled = harness._virtual(study, manifests, shifts)
    north, south, west = (manifests[name] for name in SITES)
    assert pooled.manifests_in(1) == (north, south, west)
    assert pooled.manifests_in(2) == (north, south, drifted(west))
    assert pooled.manifests_in(3) == (drifted(north), south, drifted(west))


@pytest.mark.usefixtures("without_pictures")
@pytest.mark.process
def test_replaced_scanner_changes_training_from_its_round_on_and_not_before(
    make_study: MakeStudy, study_file: StudyFile, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The stand-in cohort gets brighter copies as its "next scanner"; rounds before it train as if there were none."""
    study = make_study(("north", "south"), rounds={"num_rounds": 3, "evaluate_every": 1})
    manifest = study.sites[0].data
    assert manifest is not None
    shutil.copytree(manifest.parent, drifted(manifest).parent)
    _paint_over(drifted(manifest).parent)
    undisturbed = simulate(study_file(study), out=tmp_path / "undisturbed", workers=0, baselines=False)
    drifting = with_shifts(study, {"north": {"drift": {"from_round": 2, "scanner": "bias-3t"}}})
    shifts = {site.name: site.shift for site in drifting.sites if site.shift}
    monkeypatch.setattr(harness, "shifts_of", lambda _: shifts)
    runs = [
        simulate(study_file(drifting), out=tmp_path / f"drifting{n}", workers=n, baselines=False) for n in (0, 2)
    ]  # fmt: skip
    lines = [[line for line in metrics_of(run.folder) if line["site"] == "north"] for run in (undisturbed, runs[0])]
    for before, after in zip(*lines, strict=True):
        assert (before == after) == (before["round"] < 2), (before, after)
    assert torch.equal(adapter_of(runs[0]), adapter_of(runs[1]))
    assert runs[0].summary.sites == runs[1].summary.sites


def _paint_over(folder: Path) -> None:
    import nibabel
    import numpy as np

    for path in sorted(folder.glob("image*.nii.gz")):
        pixels = np.asarray(nibabel.load(path).dataobj)
        blurred = pixels + np.random.default_rng(0).normal(0, 60, pixels.shape)
        nibabel.save(nibabel.Nifti1Image(blurred.astype(np.float32), np.eye(4)), path)


@pytest.mark.usefixtures("without_pictures")
@pytest.mark.slow
def test_site_that_is_away_or_late_drops_out_of_a_secure_sum_which_is_opened_without_it(
    make_secure_study: MakeStudy, study_file: StudyFile, tmp_path: Path
) -> None:
    plain = make_secure_study()
    shifts = {"south": {"availability": {"absent_rounds": [1]}}, "west": {"availability": {"late": 0.5}}}
    study = with_shifts(plain, shifts, rounds={"num_rounds": 3})
    missing = attendance(study, shifts_of(study))
    assert "late" in missing.values()
    run = simulate(study_file(study), out=tmp_path, workers=0, baselines=False)
    for number in range(1, 4):
        (line,) = [
            line for line in metrics_of(run.folder) if line["event"] == "train" and line["round"] == number
        ]  # fmt: skip
        assert line["num_sites"] == 5 - sum(key[0] == number for key in missing)


@pytest.mark.usefixtures("without_pictures")
@pytest.mark.slow
def test_late_site_pays_for_its_round_and_a_site_that_is_away_does_not(
    make_private_study: MakeStudy, study_file: StudyFile, tmp_path: Path
) -> None:
    plain = make_private_study(SITES)
    shifts = {"south": {"availability": {"absent_rounds": [1]}}, "west": {"availability": {"late": 0.6}}}
    study = with_shifts(plain, shifts, rounds={"num_rounds": 2, "quorum": 1})
    missing = attendance(study, shifts_of(study))
    assert missing == {(1, "south"): "away", (1, "west"): "late"}
    run = simulate(study_file(study), out=tmp_path, workers=0, baselines=False)
    assert trained_in(run, 1) == ["north"]
    paid = {}
    for index, name in enumerate(SITES):
        site = site_of_partition(index)
        paid[name] = len(site.ledger.charges(site.cohort_name("federated")))
    assert paid == {"north": 2, "south": 1, "west": 2}
