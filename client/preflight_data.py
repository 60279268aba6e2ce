"""Preflight of a site's data: what would stop a study, or mislead it."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Sequence

import numpy as np

from client.data import channels_first
from client.images import is_dicom
from client.manifest import Labelling, Row, patients_in_two_splits
from client.policy import SitePolicy
from client.preflight_check import Check, Outcome, Part, PreflightInputs, count, distribution, guarded, some
from client.survey import Findings, Opened
from medfed.errors import DataError
from medfed.study_sections import ClassificationConfig
from medfed.tasks.segmentation import MIN_STRUCTURE_AREA_PX

_DATA: Part = "data"

MAX_SPACING_RATIO = 2.0
"""Between an image's pixel spacing and the cohort's median, beyond which it is pointed out."""

MAX_SIDE_RATIO = 1.5
"""Of an image's longer to its shorter side, beyond which making it square is pointed out."""


def data_checks(findings: Findings, inputs: PreflightInputs, policy: SitePolicy | None) -> list[Check]:
    """Everything there is to say about the data."""
    task = inputs.study.task if inputs.study else None
    looks: tuple[tuple[str, Callable[[], Check | Iterator[Check]]], ...] = (
        ("manifest", lambda: _manifest(findings, inputs)),
        ("files", lambda: _files(findings)),
        ("patients", lambda: _patients(findings.rows)),
        ("cohort size", lambda: _cohort_size(findings.rows, inputs, policy)),
        ("classes", lambda: _classes(findings, task)),
        ("duplicates", lambda: _duplicates(findings.images)),
        ("constant images", lambda: _constant(findings.images)),
        ("image sizes", lambda: _sizes(findings.images)),
        ("pixel spacing", lambda: _spacing(findings.images)),
        ("orientation", lambda: _orientation(findings.images)),
    )
    return [found for name, look in looks for found in guarded(_DATA, name, look)]


def _manifest(findings: Findings, inputs: PreflightInputs) -> Iterator[Check]:
    problems = findings.broken_rows
    if not inputs.manifests:
        yield Check(_DATA, "manifest", "fail", "no manifest is named.", "name the site's manifest in its settings.")
    elif problems:
        yield from _told("manifest", problems, f"{count(len(problems), 'row')} cannot be used")
    else:
        yield Check(_DATA, "manifest", "ok", f"{count(len(findings.rows), 'row')}, all files are there")


def _files(findings: Findings) -> Iterator[Check]:
    problems = findings.broken_images
    if problems:
        yield from _told("files", problems, f"{count(len(problems), 'image')} cannot be used")
    elif findings.images:
        kinds = distribution(_kind(one.row) for one in findings.images)
        yield Check(_DATA, "files", "ok", f"all opened and finite: {kinds}")


def _told(name: str, problems: Sequence[DataError], summary: str) -> Iterator[Check]:
    """The first problems one by one, then how many there are."""
    shown = 3
    for problem in problems[:shown]:
        found, _, what_to_do = str(problem).rpartition("; ")
        yield Check(_DATA, name, "fail", found or str(problem), what_to_do if found else "correct the entry.")
    if len(problems) > shown:
        yield Check(
            _DATA, name, "fail", f"{summary}; the first {shown} are above.", "mend these, then look for the rest."
        )


def _patients(rows: Sequence[Row]) -> Iterator[Check]:
    told = []
    for split in ("train", "test"):
        of_split = [row for row in rows if row.split == split]
        num_patients = len({row.patient_id for row in of_split})
        told.append(f"{split}: {count(num_patients, 'patient')}, {count(len(of_split), 'image')}")
        if not of_split:
            yield Check(
                _DATA,
                "splits",
                "fail",
                f"no image is listed for split {split!r}.",
                "mark some patients as train and others as test; without either there is no study.",
            )
    yield Check(_DATA, "patients", "ok" if rows else "fail", "; ".join(told), "" if rows else "list images.")
    twice = patients_in_two_splits(rows)
    if twice:
        yield Check(
            _DATA,
            "patients in two splits",
            "fail",
            f"{count(len({row.patient_id for row in twice}), 'patient')} in train and test: "
            f"{some([row.place for row in twice])}.",
            "move all images of a patient to one split; results would flatter the study.",
        )


def _cohort_size(rows: Sequence[Row], inputs: PreflightInputs, policy: SitePolicy | None) -> Iterator[Check]:
    train = [row for row in rows if row.split == "train"]
    num_patients = len({row.patient_id for row in train})
    wants = []
    if policy is not None:
        wants.append(f"the policy asks for {policy.minimum_patients}")
        if num_patients < policy.minimum_patients:
            yield Check(
                _DATA,
                "cohort size",
                "fail",
                f"{count(num_patients, 'training patient')}, {wants[-1]}.",
                "add patients, or lower minimum_patients after asking the data-protection officer.",
            )
            return
    study = inputs.study
    declared = study.declared_units(inputs.site_name) if study and inputs.site_name in study.site_names else None
    if study is not None and declared is not None:
        by_record = study.privacy is not None and study.privacy.unit == "record"
        num_units, unit = (len(train), "image") if by_record else (num_patients, "patient")
        wants.append(f"the study declares {count(declared, unit)}")
        if declared > num_units:
            yield Check(
                _DATA,
                "cohort size",
                "fail",
                f"{count(num_units, f'training {unit}')}, {wants[-1]}.",
                f"ask the coordinator for declared_patients of at most {num_units} for this site.",
            )
            return
    if wants:
        yield Check(_DATA, "cohort size", "ok", f"{count(num_patients, 'training patient')}; {', '.join(wants)}")


def _classes(findings: Findings, task: Labelling | None) -> Iterator[Check]:
    if task is None:
        yield Check(
            _DATA,
            "classes",
            "warn",
            "labels were not looked at.",
            "name the study to check labels against its classes.",
        )
    elif isinstance(task, ClassificationConfig):
        for target, classes in task.targets.items():
            for split in ("train", "test"):
                counted = Counter(row.targets[target] for row in findings.rows if row.split == split)
                yield _counted_classes(
                    f"classes of {target}, {split}", {name: counted[index] for index, name in enumerate(classes)}
                )
    else:
        for split in ("train", "test"):
            images = [one for one in findings.images if one.row.split == split]
            counted = Counter(index for one in images for index, pixels in enumerate(one.class_pixels) if pixels)
            yield _counted_classes(
                f"structures, {split}", {name: counted[index] for index, name in enumerate(task.classes)}
            )
        yield from _masks(findings.images)


def _counted_classes(name: str, images: dict[str, int]) -> Check:
    told = ", ".join(f"{label} {number}" for label, number in images.items())
    missing = [label for label, number in images.items() if not number]
    if not missing:
        return Check(_DATA, name, "ok", f"images with each: {told}")
    return Check(
        _DATA,
        name,
        "warn",
        f"images with each: {told}.",
        f"no image with {', '.join(missing)}: correct the labels, or know that this site cannot teach or test it.",
    )


def _masks(images: Sequence[Opened]) -> Iterator[Check]:
    empty = [one.row.place for one in images if not any(one.class_pixels)]
    specks = [one.row.place for one in images if any(0 < pixels < MIN_STRUCTURE_AREA_PX for pixels in one.class_pixels)]
    if empty:
        yield Check(
            _DATA,
            "empty label maps",
            "warn",
            f"{count(len(empty), 'image')} without any structure: {some(empty)}.",
            "check that the labels were drawn; such images teach nothing.",
        )
    if specks:
        yield Check(
            _DATA,
            "specks in label maps",
            "warn",
            f"{count(len(specks), 'image')} with a structure of fewer than {MIN_STRUCTURE_AREA_PX} pixels: "
            f"{some(specks)}.",
            "such structures are left out; remove stray pixels, or check the drawing.",
        )


def _duplicates(images: Sequence[Opened]) -> Iterator[Check]:
    same: dict[str, list[Row]] = defaultdict(list)
    for one in images:
        if not one.is_constant:  # those are told of on their own
            same[one.digest].append(one.row)
    groups = [rows for rows in same.values() if len(rows) > 1]
    kinds: tuple[tuple[str, Outcome, str, Callable[[list[Row]], bool]], ...] = (
        (
            "duplicates across splits",
            "fail",
            "remove them from one split; tested on what it was trained on, a study flatters itself.",
            lambda rows: len({row.split for row in rows}) > 1,
        ),
        (
            "duplicates across patients",
            "fail",
            "give them one patient_id, or remove the wrong ones; who counts as two is protected as two.",
            lambda rows: len({row.patient_id for row in rows}) > 1,
        ),
        (
            "duplicates of one patient",
            "warn",
            "remove the copies; they weigh double.",
            lambda rows: len({(row.patient_id, row.split) for row in rows}) == 1,
        ),
    )
    found_any = False
    for name, outcome, what_to_do, applies in kinds:
        found = [" = ".join(row.place for row in rows[:3]) for rows in groups if applies(rows)]
        if found:
            found_any = True
            yield Check(
                _DATA, name, outcome, f"equal pixels in {count(len(found), 'group')}: {some(found)}.", what_to_do
            )
    if images and not found_any:
        yield Check(_DATA, "duplicates", "ok", "no two images have equal pixels")


def _constant(images: Sequence[Opened]) -> Iterator[Check]:
    constant = [one.row.place for one in images if one.is_constant]
    if constant:
        yield Check(
            _DATA,
            "constant images",
            "warn",
            f"{count(len(constant), 'image')} with one value everywhere: {some(constant)}.",
            "export them again, or drop them.",
        )


def _sizes(images: Sequence[Opened]) -> Iterator[Check]:
    if not images:
        return
    sides = [(_sides(one), one) for one in images]
    told = distribution(f"{height} x {width}" for (height, width), _ in sides)
    long = [one.row.place for (height, width), one in sides if max(height, width) > MAX_SIDE_RATIO * min(height, width)]
    if long:
        yield Check(
            _DATA,
            "image sizes",
            "warn",
            f"{told}; {count(len(long), 'image')} far from square: {some(long)}.",
            "pad or crop them: every image is made square, and theirs would be squeezed.",
        )
    else:
        yield Check(_DATA, "image sizes", "ok", told)


def _sides(one: Opened) -> tuple[int, int]:
    _, height, width = channels_first(np.empty(one.shape, dtype=bool), where="").shape
    return height, width


def _spacing(images: Sequence[Opened]) -> Iterator[Check]:
    known = [(one, one.spacing_mm) for one in images if one.spacing_mm is not None and min(one.spacing_mm) > 0]
    if not images:
        return
    without = len(images) - len(known)
    if not known:
        yield Check(_DATA, "pixel spacing", "ok", "not stated in these files")
        return
    told = distribution(f"{a:.3g} x {b:.3g} mm" for _, (a, b) in known)
    told += f"; {count(without, 'image')} state none" if without else ""
    medians = np.median([spacing for _, spacing in known], axis=0)
    outliers = [
        one.row.place
        for one, spacing in known
        if any(
            max(value / median, median / value) > MAX_SPACING_RATIO
            for value, median in zip(spacing, medians, strict=True)
        )
    ]
    if outliers:
        yield Check(
            _DATA,
            "pixel spacing",
            "warn",
            f"{told}; {count(len(outliers), 'image')} more than {MAX_SPACING_RATIO:g}x off: {some(outliers)}.",
            "check that they show the same thing as the others; resample them if they do.",
        )
    else:
        yield Check(_DATA, "pixel spacing", "ok", told)


def _orientation(images: Sequence[Opened]) -> Iterator[Check]:
    if not images:
        return
    stated = [one.orientation or "not stated" for one in images]
    told = f"axes point to {distribution(stated)}" if any(one.orientation for one in images) else "not stated"
    if len(set(stated)) > 1:
        yield Check(
            _DATA,
            "orientation",
            "warn",
            f"{told}.",
            "turn all images the same way before they are listed; the model sees them as they are stored.",
        )
    else:
        yield Check(_DATA, "orientation", "ok", told + (" in these files" if told == "not stated" else ""))


def _kind(row: Row) -> str:
    return (
        "DICOM"
        if is_dicom(row.image)
        else "".join(
            row.image.suffixes[-2:] if row.image.name.lower().endswith(".gz") else row.image.suffixes[-1:]
        ).lower()
    )
