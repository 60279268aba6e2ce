"""The list of a site's images: a CSV manifest or a MONAI datalist JSON, read row by row under one set of rules.

=================  ============================================================================
column or key      meaning
=================  ============================================================================
``image``          NIfTI, PNG, JPEG, TIFF, BMP, DICOM (one 2-D image) or ``.npy``, relative to the manifest
``patient_id``     whose image it is: the unit of privacy and of splitting
``split``          CSV only: ``train`` or ``test``; in JSON the list an entry stands in says it
``label``          segmentation: label map of the image's size, 0 = background, i + 1 = class i
one per target     classification: class index
``lesion_mask``    classification, optional: file of an expert's outline, above 0 inside; saliency is held to it
``attribute_...``  optional: the group that the patient belongs to, such as ``attribute_sex``; may be empty
=================  ============================================================================

The JSON form is MONAI's ("Decathlon") datalist: ``training`` is the split ``train``; ``validation``, ``test`` and
``testing`` are the split ``test``. Other columns and keys are ignored. Nothing here opens an image.

Source: ``monai.data.load_decathlon_datalist``; it is not called, since it accepts entries without a patient and
keeps the last of two lists of one name.
"""

from __future__ import annotations

import csv
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from medfed.errors import DataError
from medfed.study_sections import ClassificationConfig, SegmentationConfig

Split = Literal["train", "test"]
Labelling = SegmentationConfig | ClassificationConfig

ATTRIBUTE_PREFIX = "attribute_"
"""Of the columns that say which group a patient belongs to."""

EXPERT_MASK = "lesion_mask"
"""The column with an expert's outline of what a classifier should look at."""

LISTS: Mapping[str, Split] = {"training": "train", "validation": "test", "test": "test", "testing": "test"}
"""Lists of a datalist JSON, in the order in which they are read, and the split that each stands for."""

_MAX_DIGITS = 9
"""Of a class index; longer numbers are no class of any study, and Python refuses to read the longest."""


@dataclass(frozen=True)
class Row:
    """One image of a manifest, whose files exist.

    Attributes:
        manifest: where it is listed.
        place: in the manifest: ``row 3`` of a CSV file (the heading is row 1), ``training[0]`` of a datalist.
        image: its file.
        patient_id: never leaves the site, never logged.
        split: what it is for.
        label: segmentation: file of the label map; None without a task.
        targets: classification: target -> class index; empty without a task.
        expert_mask: classification: file of an expert's outline; None where there is none.
        attributes: attribute -> group of the patient; a group that is not known is not there.
    """

    manifest: Path
    place: str
    image: Path
    patient_id: str
    split: Split
    label: Path | None
    targets: Mapping[str, int]
    expert_mask: Path | None = None
    attributes: Mapping[str, str] = field(default_factory=dict)

    @property
    def where(self) -> str:
        """How messages name it."""
        return f"{printable(self.manifest)}, {self.place}"


def read_manifest(manifest: Path, task: Labelling) -> list[Row]:
    """All rows of a manifest, in its order.

    Raises:
        DataError: one line with the manifest, the first row that breaks a rule and what to change.
    """
    rows, problems = inspect_manifest(manifest, task)
    if problems:
        raise problems[0]
    return rows


def inspect_manifest(manifest: Path, task: Labelling | None) -> tuple[list[Row], list[DataError]]:
    """The rows that keep the rules, and one error for each that does not: for people who mend a whole manifest.

    Args:
        manifest: a file whose name ends in ``.json`` is a datalist, any other is CSV.
        task: what rows must be labelled with; None asks for no label.
    """
    rows: list[Row] = []
    problems: list[DataError] = []
    try:
        for place, cells in _datalist(manifest) if manifest.suffix.lower() == ".json" else _table(manifest, task):
            try:
                rows.append(_row(cells, manifest, place, task))
            except DataError as error:
                problems.append(error)
    except DataError as error:
        problems.append(error)
    if not rows and not problems:
        problems.append(
            DataError(
                f"{printable(manifest)}: expected at least one image, got an empty manifest; add rows or drop the site."
            )
        )
    return rows, problems


def refuse_patients_in_two_splits(rows: Sequence[Row]) -> None:
    """Refuse a patient who is both trained on and tested on.

    Raises:
        DataError: names the row and the patient.
    """
    for row in patients_in_two_splits(rows):
        raise DataError(
            f"{row.where}: expected all images of a patient in one split, got patient {row.patient_id!r} "
            "in train and test; move the patient to one of them."
        )


def patients_in_two_splits(rows: Sequence[Row]) -> list[Row]:
    """The rows whose patient stands in the other split further up."""
    seen: dict[str, Split] = {}
    return [row for row in rows if seen.setdefault(row.patient_id, row.split) != row.split]


def printable(path: Path) -> str:
    """The path on one line of text that any terminal can show."""
    text = str(path)
    return text if text.isprintable() else ascii(text)


def _table(manifest: Path, task: Labelling | None) -> Iterator[tuple[str, Mapping[str, Any]]]:
    wanted = ["image", "patient_id", "split", *_label_keys(task)]
    try:
        with manifest.open(newline="", encoding="utf-8-sig") as file:
            reader = csv.DictReader(file)
            columns = list(reader.fieldnames or [])
            for column in wanted:
                if columns.count(column) != 1:
                    got, do = ("none", "add it") if column not in columns else ("several", "keep one")
                    raise DataError(f"{printable(manifest)}: expected a column {column!r}, got {got}; {do}.")
            for number, cells in enumerate(reader, start=2):
                yield f"row {number}", cells
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise DataError(f"Expected a readable CSV manifest at {printable(manifest)}, got: {error}.") from None


def _datalist(manifest: Path) -> Iterator[tuple[str, Mapping[str, Any]]]:
    try:
        content = json.loads(manifest.read_text(encoding="utf-8-sig"), object_pairs_hook=_object)
    except (OSError, ValueError, RecursionError) as error:
        raise DataError(f"Expected a readable datalist JSON at {printable(manifest)}, got: {error}.") from None
    if not isinstance(content, dict) or not LISTS.keys() & content.keys():
        raise DataError(
            f"{printable(manifest)}: expected an object with a list 'training', got none; "
            f"a datalist has the lists {', '.join(map(repr, LISTS))}."
        )
    for name, split in LISTS.items():
        entries = content.get(name, [])
        if not isinstance(entries, list):
            raise DataError(f"{printable(manifest)}: expected {name!r} to be a list, got {_kind(entries)}.")
        for number, entry in enumerate(entries):
            place = f"{name}[{number}]"
            if not isinstance(entry, dict):
                raise DataError(
                    f"{printable(manifest)}, {place}: expected an object with 'image' and 'patient_id', got "
                    f"{_kind(entry)}; an image without a patient or a label is of no use here."
                )
            yield place, {**entry, "split": split}


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    content = dict(pairs)
    if len(content) != len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"the key {twice!r} twice in one object")
    return content


def _row(cells: Mapping[str, Any], manifest: Path, place: str, task: Labelling | None) -> Row:
    where = f"{printable(manifest)}, {place}"

    def cell(key: str) -> str:
        value = cells.get(key)
        if isinstance(value, bool) or not isinstance(value, (str, int, type(None))):
            raise DataError(f"{where}: expected one value in {key!r}, got {_kind(value)}; every image needs one.")
        try:
            text = "" if value is None else str(value).strip()
            text.encode("utf-8")
        except ValueError as error:  # half a surrogate pair, or a number of thousands of digits
            raise DataError(f"{where}: expected text in {key!r}, got {error}.") from None
        if not text:
            raise DataError(f"{where}: expected a value in {key!r}, got nothing; every image needs one.")
        return text

    def file(key: str) -> Path:
        path = manifest.parent / cell(key)
        try:
            there = path.is_file()
        except OSError:  # a name that is too long, or a folder that may not be entered
            there = False
        if not there:
            raise DataError(
                f"{where}: expected a file at {printable(path)} ({key}), got nothing that can be read; "
                "correct the path."
            )
        return path

    split = cell("split")
    if split not in ("train", "test"):
        raise DataError(f"{where}: expected split 'train' or 'test', got {split!r}.")
    targets = {}
    if isinstance(task, ClassificationConfig):
        targets = {name: _class_index(cell(name), name, len(classes), where) for name, classes in task.targets.items()}
    return Row(
        manifest=manifest,
        place=place,
        image=file("image"),
        patient_id=cell("patient_id"),
        split="train" if split == "train" else "test",
        label=file("label") if isinstance(task, SegmentationConfig) else None,
        targets=targets,
        expert_mask=file(EXPERT_MASK) if isinstance(task, ClassificationConfig) and cells.get(EXPERT_MASK) else None,
        attributes={
            key.removeprefix(ATTRIBUTE_PREFIX): cell(key)
            for key, value in cells.items()
            if key and key.startswith(ATTRIBUTE_PREFIX) and value not in (None, "") and str(value).strip()
        },
    )


def _class_index(value: str, target: str, num_classes: int, where: str) -> int:
    if not value.isdecimal() or len(value) > _MAX_DIGITS or int(value) >= num_classes:
        raise DataError(
            f"{where}: expected {target!r} in 0..{num_classes - 1}, got {value!r}; correct the class index."
        )
    return int(value)


def _label_keys(task: Labelling | None) -> list[str]:
    if task is None:
        return []
    return ["label"] if isinstance(task, SegmentationConfig) else list(task.targets)


def _kind(value: object) -> str:
    """A JSON value's kind, in words."""
    named = {dict: "an object", list: "a list", str: "a string", bool: "true or false", type(None): "null"}
    return named.get(type(value), "a number")
