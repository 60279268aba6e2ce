"""Manifests: CSV and MONAI datalist JSON under one set of rules, whatever their bytes."""

import csv
import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from client.data import load_cohort
from client.manifest import LISTS, Row, inspect_manifest, read_manifest
from medfed.errors import DataError
from medfed.models.pixels import PixelSpec
from medfed.study_sections import ClassificationConfig, SegmentationConfig

TASK = SegmentationConfig(kind="segmentation", classes=("near", "far"))
SIDES = ClassificationConfig(kind="classification", targets={"side": ("left", "right")})
MakeCohort = Callable[..., Path]


def as_datalist(manifest: Path, *, held_out: str = "test", **more: Any) -> Path:
    """The rows of a CSV manifest as MONAI would write them, in a file beside it."""
    with manifest.open() as file:
        rows = list(csv.DictReader(file))
    lists: dict[str, list[dict[str, Any]]] = {"training": [], held_out: []}
    for row in rows:
        entry = {key: row[key] for key in ("image", "label", "patient_id")} | {"side": int(row["side"])}
        lists["training" if row["split"] == "train" else held_out].append(entry)
    path = manifest.with_suffix(".json")
    path.write_text(json.dumps({"name": "brains", "numTraining": 3, **lists, **more}))
    return path


@pytest.mark.parametrize("held_out", ["test", "testing", "validation"])
@pytest.mark.parametrize("task", [TASK, SIDES], ids=["segmentation", "classification"])
def test_csv_and_datalist_of_the_same_files_are_the_same_cohort(
    make_cohort: MakeCohort, task: SegmentationConfig | ClassificationConfig, held_out: str
) -> None:
    manifest = make_cohort()
    from_csv = load_cohort("north", [manifest], task, PixelSpec(image_size=64))
    from_json = load_cohort("north", [as_datalist(manifest, held_out=held_out)], task, PixelSpec(image_size=64))
    assert from_json.digest == from_csv.digest
    assert (len(from_json.train), len(from_json.test)) == (3, 2)


def test_monai_reads_the_same_files_from_the_datalist(make_cohort: MakeCohort) -> None:
    from monai.data import load_decathlon_datalist

    path = as_datalist(make_cohort())
    theirs = load_decathlon_datalist(str(path), is_segmentation=True, data_list_key="training")
    ours = [row for row in read_manifest(path, TASK) if row.split == "train"]
    assert [(entry["image"], entry["label"]) for entry in theirs] == [(str(row.image), str(row.label)) for row in ours]


def change(path: Path, edit: Callable[[dict[str, Any]], object]) -> Path:
    content = json.loads(path.read_text())
    edit(content)
    path.write_text(json.dumps(content))
    return path


@pytest.mark.parametrize(
    ("edit", "expected"),
    [
        (lambda c: c["training"][1].pop("patient_id"), r"training\[1\]: expected a value in 'patient_id', got nothing"),
        (lambda c: c["test"][1].update(patient_id="north-0"), "patient 'north-0' in train and test"),
        (lambda c: c["training"][2].update(image="image9.nii.gz"), r"training\[2\]: expected a file at .*image9"),
        (lambda c: c["training"][0].update(image=["t1.nii", "t2.nii"]), "one value in 'image', got a list"),
        (lambda c: c["training"][0].update(side=2), "'side' in 0..1, got '2'"),
        (lambda c: c["training"][0].update(side=True), "one value in 'side', got true or false"),
        (lambda c: c["training"][0].update(side=0.0), "one value in 'side', got a number"),
        (lambda c: c.update(test=["image3.nii.gz"]), r"test\[0\]: expected an object .* got a string"),
        (lambda c: c.update(training={}), "'training' to be a list, got an object"),
        (lambda c: [c.pop("training"), c.pop("test")], "expected an object with a list 'training'"),
    ],
)
def test_broken_entry_of_a_datalist_is_refused_with_its_place(
    make_cohort: MakeCohort, edit: Callable[[dict[str, Any]], object], expected: str
) -> None:
    path = change(as_datalist(make_cohort()), edit)
    with pytest.raises(DataError, match=expected) as caught:
        load_cohort("north", [path], SIDES, PixelSpec(image_size=64))
    assert "\n" not in str(caught.value)


def test_datalist_with_two_lists_of_one_name_is_refused(tmp_path: Path) -> None:
    (tmp_path / "m.json").write_text('{"training": [{"image": "a"}], "training": []}')
    with pytest.raises(DataError, match="the key 'training' twice"):
        read_manifest(tmp_path / "m.json", TASK)


def test_column_that_stands_twice_is_refused(tmp_path: Path) -> None:
    (tmp_path / "m.csv").write_text("image,patient_id,split,label,label\n")
    with pytest.raises(DataError, match="a column 'label', got several"):
        read_manifest(tmp_path / "m.csv", TASK)


def test_every_broken_row_is_told_apart_from_the_good_ones(make_cohort: MakeCohort) -> None:
    manifest = make_cohort()
    lines = manifest.read_text().splitlines()
    lines[2], lines[4] = lines[2].replace("image1", "image8"), lines[4].replace("north-3", " ")
    manifest.write_text("\n".join(lines))
    rows, problems = inspect_manifest(manifest, TASK)
    assert [row.place for row in rows] == ["row 2", "row 4", "row 6"]
    assert [str(problem).split(": ")[0].rsplit(", ")[-1] for problem in problems] == ["row 3", "row 5"]


def test_manifest_is_read_without_labels_where_no_task_asks_for_them(make_cohort: MakeCohort) -> None:
    rows, problems = inspect_manifest(make_cohort(), None)
    assert not problems
    assert {(row.label, len(row.targets)) for row in rows} == {(None, 0)}


CELLS = st.one_of(
    st.text(max_size=8), st.sampled_from(["a.png", "train", "test", "0", "1", "9" * 5000, "\x00", "x" * 300])
)
VALUES = st.recursive(
    st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), CELLS, st.just("\ud800")),
    lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(CELLS, inner, max_size=3)),
    max_leaves=8,
)
ENTRIES = st.one_of(VALUES, st.fixed_dictionaries({"image": VALUES, "patient_id": VALUES, "side": VALUES}))


def only_rows_or_data_errors(path: Path) -> list[Row]:
    rows, problems = inspect_manifest(path, SIDES)
    assert rows or problems
    for row in rows:
        assert row.image.is_file()
        assert row.patient_id.strip()
        assert row.split in ("train", "test")
        assert row.targets["side"] in (0, 1)
    for problem in problems:
        assert type(problem) is DataError
        assert str(problem).isprintable()
    return rows


SHARED_FOLDER = settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=150)


@SHARED_FOLDER
@given(st.lists(st.lists(CELLS, max_size=5), max_size=4))
@example([["a.png", "p", "train", "0"]])
@example([["a.png", "p", "train", "9" * 5000]])
def test_any_cells_in_a_csv_give_rows_or_data_errors(tmp_path: Path, table: list[list[str]]) -> None:
    (tmp_path / "a.png").touch()
    text = io.StringIO()
    csv.writer(text).writerows([["image", "patient_id", "split", "side"], *table])
    (tmp_path / "m.csv").write_text(text.getvalue(), encoding="utf-8", newline="")
    only_rows_or_data_errors(tmp_path / "m.csv")


@SHARED_FOLDER
@given(st.dictionaries(st.sampled_from(list(LISTS)), st.one_of(VALUES, st.lists(ENTRIES, max_size=3)), max_size=3))
@example({"training": [{"image": "a.png", "patient_id": 17, "side": 1}]})
@example({"training": [{"image": "a.png", "patient_id": "\ud800", "side": 1}]})
@example({"training": [{"image": "a.png", "patient_id": 10**4400, "side": 1}]})
def test_any_values_in_a_datalist_give_rows_or_data_errors(tmp_path: Path, content: dict[str, Any]) -> None:
    (tmp_path / "a.png").touch()
    try:
        (tmp_path / "m.json").write_text(json.dumps(content))
    except ValueError:  # Python itself does not write such numbers; a file may hold them all the same
        (tmp_path / "m.json").write_text('{"training": [{"image": "a.png", "patient_id": 1%s}]}' % ("0" * 4400))
    only_rows_or_data_errors(tmp_path / "m.json")


@SHARED_FOLDER
@given(st.binary(max_size=60), st.sampled_from(["csv", "json"]))
@example(b"[" * 100_000, "json")
@example(b'image,patient_id,split,side\n"' + b"x" * 200_000, "csv")
def test_any_bytes_give_rows_or_data_errors(tmp_path: Path, content: bytes, suffix: str) -> None:
    (tmp_path / f"m.{suffix}").write_bytes(content)
    assert only_rows_or_data_errors(tmp_path / f"m.{suffix}") == []
