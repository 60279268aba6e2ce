"""--show-cohort, the contact sheet and shifted copies: written where they say, of what is there, and nothing trains."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
import pytest
import torch
from PIL import Image
from typer.testing import CliRunner

from medfed.errors import DataError
from medfed.shift_profile import ShiftProfile
from medfed.study import StudyConfig
from simulation import command
from simulation.cohort_command import app
from simulation.shift import contact_sheet
from simulation.shift.cohort_view import pooled, show_cohort
from simulation.shift.contact_sheet import PANELS, stain_phantom
from simulation.shift.discrepancy import Discrepancy
from simulation.shift.discrepancy_figure import draw_discrepancies
from simulation.shift.real_images import shift_images

MakeStudy = Callable[..., StudyConfig]
StudyFile = Callable[[StudyConfig], Path]


def size_of(png: Path) -> tuple[int, int]:
    with Image.open(png) as image:
        return image.size


def test_show_cohort_draws_and_measures_every_pair_of_sites_and_trains_nothing(
    make_study: MakeStudy, study_file: StudyFile, tmp_path: Path
) -> None:
    path = study_file(make_study(("north", "south", "west")))
    view = show_cohort(path, out=tmp_path / "out")
    names = {file.name for file in view.folder.iterdir()}
    assert names == {"cohort.png", "cohort.svg", "shift.png", "shift.svg", "shift.json"}
    assert view.matrix is not None
    for figure in (view.figure, view.matrix):
        assert min(size_of(figure)) > 300
        assert figure.with_suffix(".svg").read_text().startswith("<?xml")
    for word in ("north", "south", "west", "near", "far", "3 + 2 patients"):
        assert word in view.figure.with_suffix(".svg").read_text()
    measured = json.loads(view.measured.read_text())
    assert [pair["sites"] for pair in measured["pairs"]] == [["north", "south"], ["north", "west"], ["south", "west"]]
    assert all(pair["patients"] == [5, 5] and 0 < pair["p_value"] <= 1 for pair in measured["pairs"])
    drawn = {file.name: file.read_bytes() for file in view.folder.iterdir()}
    again = show_cohort(path, out=tmp_path / "again")
    assert {file.name: file.read_bytes() for file in again.folder.iterdir()} == drawn


def test_show_cohort_is_an_option_of_simulate_and_ends_without_a_run(
    make_study: MakeStudy, study_file: StudyFile, tmp_path: Path
) -> None:
    path = study_file(make_study())
    shown = CliRunner().invoke(command.app, [str(path), "--show-cohort", "--out", str(tmp_path / "out")])
    assert shown.exit_code == 0, shown.output
    assert "north and south: MMD²" in shown.output
    assert "cohort.png" in shown.output.replace("\n", "")
    assert not list((tmp_path / "out").rglob("metrics.jsonl"))
    nothing = CliRunner().invoke(command.app, ["--show-cohort", "--out", str(tmp_path)])
    assert "needs a study file" in nothing.output


def test_embedding_of_any_shape_becomes_one_vector() -> None:
    maps, tokens, vector = (torch.rand(*shape).double() for shape in ((4, 6, 5), (7, 4), (9,)))
    assert torch.allclose(pooled(maps), torch.cat([maps.mean((1, 2)), maps.std((1, 2), correction=0)]))
    assert torch.allclose(pooled(tokens), torch.cat([tokens.mean(0), tokens.std(0, correction=0)]))
    assert torch.equal(pooled(vector), vector)
    assert torch.equal(pooled(maps.permute(2, 0, 1).contiguous().permute(1, 2, 0)), pooled(maps))


def test_matrix_writes_every_number_it_is_given() -> None:
    sites = ["north", "south", "east"]
    pairs = {
        ("north", "south"): Discrepancy(0.123, 0.004, 5, 5),
        ("south", "east"): Discrepancy(-0.011, 0.7, 5, 5),
    }
    svg = draw_discrepancies(sites, pairs)["svg"].decode()
    for text in ("0.123", "p 0.004", "p 0.700", "north", "east"):
        assert text in svg


def test_contact_sheet_shows_every_family_that_changes_pictures() -> None:
    shown = {family for panel in PANELS for family in panel.families} | {"stain"}
    of_people_and_time = {"labels", "drift", "availability"}
    assert shown | of_people_and_time == set(ShiftProfile.model_fields) - {"presets"}


@pytest.mark.weights
def test_presets_command_draws_the_contact_sheet(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(contact_sheet, "PANELS", PANELS[:2])
    shown = CliRunner().invoke(app, ["presets", "--sheet", str(tmp_path / "sheet")])
    assert shown.exit_code == 0, shown.output
    assert "low-field" in shown.output
    assert min(size_of(tmp_path / "sheet.png")) > 300


def rows_of(manifest: Path) -> list[dict[str, str]]:
    with manifest.open(newline="") as file:
        return list(csv.DictReader(file))


def shifted(manifest: Path, out: Path, **families: Any) -> Path:
    return shift_images(manifest, ShiftProfile.model_validate(families), out, structures=("near", "far"), seed=1)


def test_copies_of_real_images_are_shifted_and_their_label_maps_follow_the_annotator(
    make_cohort: Callable[..., Path], tmp_path: Path
) -> None:
    manifest = make_cohort("north")
    noisy = shifted(manifest, tmp_path / "noisy", noise={"sd": [0.1, 0.1]})
    careless = shifted(manifest, tmp_path / "careless", missing={"classes": ["far"]})
    plain = shifted(manifest, tmp_path / "plain")
    for before, *after in zip(*map(rows_of, (manifest, noisy, careless, plain)), strict=True):
        original = nibabel.load(manifest.parent / before["label"])
        images, labels = (
            [np.asarray(nibabel.load(place.parent / row[column]).dataobj)
             for place, row in zip((noisy, careless, plain), after, strict=True)]
            for column in ("image", "label")
        )  # fmt: skip
        assert np.abs(images[0].astype(float) - images[2]).mean() > 5
        assert np.array_equal(images[1], images[2])
        truth = np.asarray(original.dataobj)
        assert np.array_equal(labels[0], truth)
        in_training = before["split"] == "train"
        assert np.array_equal(labels[1], np.where(truth == 2, 0, truth) if in_training else truth)
        assert {k: after[0][k] for k in ("patient_id", "split", "side")} == {
            k: before[k] for k in ("patient_id", "split", "side")
        }
    again = shifted(manifest, tmp_path / "again", noise={"sd": [0.1, 0.1]})
    for first, second in zip(rows_of(noisy), rows_of(again), strict=True):
        assert (noisy.parent / first["image"]).read_bytes() == (again.parent / second["image"]).read_bytes()


def slides(folder: Path) -> Path:
    folder.mkdir()
    Image.fromarray(stain_phantom(64)).save(folder / "a.png")
    (folder / "manifest.csv").write_text("image,patient_id,split,grade\na.png,p1,train,2\n")
    return folder / "manifest.csv"


def test_command_restains_slides(tmp_path: Path) -> None:
    manifest = slides(tmp_path / "slides")
    arguments = ["shift", str(manifest), "--preset", "other-laboratory", "--out", str(tmp_path / "out")]
    shown = CliRunner().invoke(app, arguments)
    assert shown.exit_code == 0, shown.output
    row = rows_of(tmp_path / "out" / "manifest.csv")[0]
    assert row["grade"] == "2"
    with Image.open(tmp_path / "out" / row["image"]) as image:
        assert image.mode == "RGB"
        assert np.abs(np.asarray(image).astype(int) - stain_phantom(64).astype(int)).mean() > 1


@pytest.mark.parametrize(
    ("families", "message"),
    [
        ({"noise": {"sd": [0.1, 0.1]}}, "expected a grey image"),
        ({"demographics": {}}, "got 'demographics'"),
    ],
)
def test_family_that_means_nothing_for_slides_is_refused(
    families: dict[str, Any], message: str, tmp_path: Path
) -> None:
    with pytest.raises(DataError, match=message):
        shifted(slides(tmp_path / "slides"), tmp_path / "out", **families)


def test_stain_of_a_grey_image_is_refused(make_cohort: Callable[..., Path], tmp_path: Path) -> None:
    with pytest.raises(DataError, match="leave stain out"):
        shifted(make_cohort(), tmp_path / "out" / "here", stain={"scale": 0.2})
    assert not list((tmp_path / "out").iterdir())  # whole or not at all
