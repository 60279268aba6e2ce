"""The semi-real brain cohort: patients of several sites, written as the folders that real sites would hold.

A recipe says everything; the same recipe gives the same bytes. Each patient draws from a generator of its own,
derived from the recipe's seed, the site's name and the patient's number, so that adding a site or a patient
leaves all others as they are.

Layout of a cohort::

    cohort.json               recipe, its digest, licences, what is real and what is not
    <site>/manifest.csv       one row per image; paths are relative to it
    <site>/images/*.nii.gz    2-D slice, uint8 that the header scales to [0, 1]
    <site>/labels/*.nii.gz    structures: class index, 0 = background; lesions: mask of the lesion
    <site>/replaced/...       the same once more, as the site's next scanner sees its patients; only with drift

A file holds rows by columns as they are shown; its affine says where they lie in the patient.
"""

from __future__ import annotations

import csv
import json
import os
import re
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import nibabel
import numpy as np
import numpy.typing as npt
import torch
from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator
from scipy import ndimage
from torch import Tensor

from medfed.canonical import canonical_bytes, derive_seed, sha256_hex
from medfed.errors import DataError
from medfed.shift_profile import ShiftProfile
from simulation.anatomy import Anatomy, best_slice, load_anatomy, structure_labels
from simulation.lesions import insert_lesion, sample_lesion
from simulation.scanner import SCANNERS
from simulation.shift.draws import Drawn
from simulation.shift.labels import LESION_CLASSES, lesion_proportions
from simulation.shift.patient import ShiftedPatient
from simulation.warp import SlicePlane, WarpedSlice, align_slice, sample_patient_warp, warp_slice

GENERATOR_VERSION = 2  # raise it when the same recipe would give other bytes: old cohorts are then rebuilt
STATEMENT = "Anatomy from 1 real brain (MNI152 average), patients are synthetic warps."

# Slices of a patient are this far apart; each is moved by up to a third of it, as no two placements agree.
_SLICE_SPACING_MM = 3.0
# Centrum semiovale and corona radiata: the axial level with most white matter.
_LESION_SLICE_Z_MM = 26.0
_SITE_NAME = re.compile(r"[a-z0-9]+(-[a-z0-9]+)*")


class SiteRecipe(BaseModel):
    """One hospital of a cohort.

    Attributes:
        name: lower-case letters, digits and hyphens; prefix of its patient ids.
        scanner: key of ``SCANNERS``.
        train_patients: patients in the train split.
        test_patients: patients in the test split.
        lesion_prevalence: fraction of patients with a lesion, kept within one patient in each split; for
            lesion cohorts only. With a Dirichlet label shift or missing classes it is each patient's probability.
        shift: how the site differs from others, its presets written out.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str
    scanner: str
    train_patients: int = Field(ge=1, le=9999)
    test_patients: int = Field(ge=0, le=9999)
    lesion_prevalence: float | None = Field(default=None, ge=0.0, le=1.0)
    # Left out of the recipe's form where there is none, so that cohorts from before shifts keep their digests.
    shift: ShiftProfile | None = Field(default=None, exclude_if=lambda shift: shift is None)

    @field_validator("name")
    @classmethod
    def _is_a_folder_name(cls, name: str) -> str:
        if not _SITE_NAME.fullmatch(name):
            raise ValueError(f"Expected a site name of lower-case letters, digits and hyphens, got {name!r}.")
        return name

    @field_validator("scanner")
    @classmethod
    def _is_known(cls, scanner: str) -> str:
        if scanner not in SCANNERS:
            raise ValueError(f"Expected a scanner of {', '.join(SCANNERS)}, got {scanner!r}.")
        return scanner

    @model_validator(mode="after")
    def _shift_fits_brains(self) -> SiteRecipe:
        shift = self.shift
        if shift is None:
            return self
        if shift.presets:
            raise ValueError(f"Expected a profile with its presets written out, got {', '.join(shift.presets)}.")
        if shift.stain is not None:
            raise ValueError(f"Expected no stain at site {self.name!r}: brains are grey; remove it from the shift.")
        if shift.drift is not None:
            self._is_known(shift.drift.scanner)
        return self

    @property
    def after_drift(self) -> SiteRecipe | None:
        """The site with its next scanner, if it gets one."""
        if self.shift is None or self.shift.drift is None:
            return None
        return self.model_copy(update={"scanner": self.shift.drift.scanner})


class CohortRecipe(BaseModel):
    """Everything that decides the bytes of a cohort.

    Attributes:
        kind: segmentation of structures, or classification of lesions.
        seed: root of all randomness.
        structures: classes 1..C in this order, both sides (``"thalamus"``) or one (``"thalamus-left"``); for
            structure cohorts only.
        image_size: pixels along each edge.
        images_per_patient: slices of each patient, 3 mm apart.
        sites: the hospitals.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    kind: Literal["brain-structures", "brain-lesions"]
    seed: int = Field(ge=0)
    structures: tuple[str, ...] = ()
    image_size: int = Field(default=256, ge=32, le=1024)
    images_per_patient: int = Field(default=1, ge=1, le=9)
    sites: tuple[SiteRecipe, ...] = Field(min_length=1)

    @model_validator(mode="after")
    def _is_consistent(self) -> CohortRecipe:
        names = [site.name for site in self.sites]
        if len(set(names)) != len(names):
            raise ValueError(f"Expected distinct site names, got {', '.join(names)}.")
        with_lesions = self.kind == "brain-lesions"
        if with_lesions == bool(self.structures):
            raise ValueError(
                f"Expected structures for brain-structures and none for brain-lesions, got {len(self.structures)} "
                f"for {self.kind}."
            )
        for site in self.sites:
            if with_lesions != (site.lesion_prevalence is not None):
                raise ValueError(
                    f"Expected lesion_prevalence for brain-lesions only, got {site.lesion_prevalence} at site "
                    f"{site.name!r} of a {self.kind} cohort."
                )
            self._check_shift(site)
        self._refuse_shared_structures()
        return self

    def _check_shift(self, site: SiteRecipe) -> None:
        if site.shift is None:
            return
        with_lesions = self.kind == "brain-lesions"
        if site.shift.labels is not None and not with_lesions:
            raise ValueError(
                f"Expected no label shift at site {site.name!r}: every brain has every structure; remove it."
            )
        absent = site.shift.missing.classes if site.shift.missing else ()
        known = LESION_CLASSES if with_lesions else self.structures
        if strange := [name for name in absent if name not in known]:
            raise ValueError(
                f"Expected missing classes of {', '.join(known)} at site {site.name!r}, got {strange[0]!r}."
            )
        if site.lesion_prevalence is not None:
            lesion_proportions(site.lesion_prevalence, None, absent, Drawn(0, ()))

    @property
    def num_patients(self) -> int:
        """Patients to be made, counted again for every scanner that sees them."""
        return sum((site.train_patients + site.test_patients) * (2 if site.after_drift else 1) for site in self.sites)

    def _refuse_shared_structures(self) -> None:
        taken: set[int] = set()
        for structure in self.structures:
            try:
                labels = structure_labels(structure)
            except DataError as error:
                raise ValueError(str(error)) from None
            if labels & taken:
                raise ValueError(f"Expected disjoint structures, got {structure!r} twice or as a whole and a side.")
            taken |= labels

    @property
    def digest(self) -> str:
        """SHA-256 of the recipe and of the generator's version, in hexadecimal."""
        return sha256_hex(canonical_bytes({"recipe": self.model_dump(mode="json"), "generator": GENERATOR_VERSION}))


@dataclass(frozen=True)
class Example:
    """One image of a patient, before it is written.

    Attributes:
        image_HW: float32 in [0, 1].
        label_HW: class indices, or the mask of a lesion.
        bare: the slice before any lesion, annotator or scanner.
        columns: what the manifest says of it besides.
    """

    image_HW: Tensor
    label_HW: npt.NDArray[np.uint8]
    bare: WarpedSlice
    columns: dict[str, str | int]


def write_cohort(
    recipe: CohortRecipe, directory: Path, *, progress: Callable[[int], None] | None = None
) -> dict[str, Path]:
    """The manifests of a cohort, written if they are not there yet.

    A cohort appears whole or not at all: it is built next to ``directory`` and moved there at the end. One that
    was made from the same recipe by the same generator is used as it is; another one is replaced.

    Args:
        recipe: what to write.
        directory: folder of the cohort; its parents are made.
        progress: called with the number of patients finished so far, over all sites.

    Returns:
        Manifest of each site, in the order of the recipe.

    Raises:
        DataError: the directory holds something that is not a cohort.
        MissingExtraError: the packages with the anatomy are not installed.
    """
    manifests = {site.name: directory / site.name / "manifest.csv" for site in recipe.sites}
    if _holds(directory, recipe):
        return manifests
    if directory.exists() and any(directory.iterdir()) and not (directory / "cohort.json").is_file():
        raise DataError(f"Expected a cohort or nothing at {directory}, got other files; choose another folder.")
    directory.parent.mkdir(parents=True, exist_ok=True)
    building = directory.with_name(f".{directory.name}-{os.getpid()}-building")
    shutil.rmtree(building, ignore_errors=True)  # left by a killed process that had the same number
    building.mkdir()
    try:
        _build(recipe, building, progress)
        # A second process may have finished the same cohort meanwhile, and be reading it; the bytes are the same.
        if not _holds(directory, recipe):
            if directory.exists():
                shutil.rmtree(directory)
            building.replace(directory)
    finally:
        shutil.rmtree(building, ignore_errors=True)
    return manifests


def drifted(place: Path) -> Path:
    """Where the images of a site's next scanner are, beside its folder's or its manifest's own."""
    return place / "replaced" if place.suffix != ".csv" else place.parent / "replaced" / place.name


def _holds(directory: Path, recipe: CohortRecipe) -> bool:
    card = directory / "cohort.json"
    if not card.is_file():
        return False
    try:
        found = json.loads(card.read_text(encoding="utf-8"))
    except json.JSONDecodeError:
        return False
    return isinstance(found, dict) and found.get("recipe_digest") == recipe.digest


def _build(recipe: CohortRecipe, directory: Path, progress: Callable[[int], None] | None) -> None:
    anatomy = load_anatomy()
    atlas_planes = atlas_planes_of(recipe, anatomy)
    folders = [(directory / site.name, site) for site in recipe.sites]
    folders += [(drifted(directory / site.name), site.after_drift) for site in recipe.sites if site.after_drift]
    finished = 0
    for folder, site in folders:
        (folder / "images").mkdir(parents=True)
        (folder / "labels").mkdir()
        rows: list[dict[str, str | int]] = []
        for number in range(site.train_patients + site.test_patients):
            split = "train" if number < site.train_patients else "test"
            examples = examples_of(recipe, site, number, anatomy, atlas_planes)
            rows += [
                _write_example(folder, f"{site.name}-{number:04d}", index, split, example, recipe.kind)
                for index, example in enumerate(examples)
            ]
            finished += 1
            if progress is not None:
                progress(finished)
        with (folder / "manifest.csv").open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, fieldnames=list(rows[0]), lineterminator="\n")
            writer.writeheader()
            writer.writerows(rows)
    card = {
        "statement": STATEMENT,
        "licences": anatomy.licences,
        "recipe": recipe.model_dump(mode="json"),
        "recipe_digest": recipe.digest,
        "generator_version": GENERATOR_VERSION,
        "structures": {str(index): name for index, name in enumerate(recipe.structures, start=1)},
        "plane": atlas_planes[0].plane,
        "atlas_positions_mm": [plane.position_mm for plane in atlas_planes],
        "pixel_mm": atlas_planes[0].pixel_mm,
        "scanners": {site.scanner: SCANNERS[site.scanner].description for site in recipe.sites},
    }
    (directory / "cohort.json").write_text(json.dumps(card, indent=2) + "\n", encoding="utf-8")


def atlas_planes_of(recipe: CohortRecipe, anatomy: Anatomy) -> list[SlicePlane]:
    """The slices that every patient of a cohort is cut along, in the atlas."""
    plane, centre_mm = best_slice(anatomy, recipe.structures) if recipe.structures else ("axial", _LESION_SLICE_Z_MM)
    middle = (recipe.images_per_patient - 1) / 2
    return [
        SlicePlane(plane, centre_mm + (index - middle) * _SLICE_SPACING_MM, recipe.image_size)
        for index in range(recipe.images_per_patient)
    ]


def examples_of(
    recipe: CohortRecipe, site: SiteRecipe, number: int, anatomy: Anatomy, atlas_planes: list[SlicePlane]
) -> Iterator[Example]:
    """All images of one patient."""
    generator = np.random.default_rng(np.random.SeedSequence(derive_seed(recipe.seed, site.name, number)))
    is_held_out = number >= site.train_patients
    shifted = ShiftedPatient.of(site.shift, seed=recipe.seed, site=site.name, number=number, is_held_out=is_held_out)
    warp = shifted.body(sample_patient_warp(generator))
    usual = sample_lesion(generator) if _has_lesion(recipe, site, number) else None
    lesion = shifted.lesion(usual, site.lesion_prevalence)
    attributes = shifted.person.columns if shifted.person else {}
    for index, atlas_plane in enumerate(atlas_planes):
        jitter_mm = float(generator.uniform(-1.0, 1.0)) * _SLICE_SPACING_MM / 3
        placed = SlicePlane(atlas_plane.plane, atlas_plane.position_mm + jitter_mm, atlas_plane.image_size)
        warped = shifted.slab(anatomy, warp, warp_slice(anatomy, warp, align_slice(warp, placed)))
        image_HW, label_HW = warped.image_HW, class_map(warped, recipe.structures)
        targets: dict[str, int] = {}
        if lesion is not None:
            image_HW, lesion_HW = insert_lesion(warped, lesion)
            label_HW = lesion_HW.numpy().astype(np.uint8)
        if recipe.kind == "brain-lesions":
            targets, label_HW = shifted.finding(lesion, label_HW, index=index)
        else:
            label_HW = shifted.structures(label_HW, recipe.structures, index=index)
        yield Example(
            image_HW=shifted.acquire(SCANNERS[site.scanner], image_HW, generator, index=index),
            label_HW=label_HW,
            bare=warped,
            columns={**targets, **attributes},
        )


def _has_lesion(recipe: CohortRecipe, site: SiteRecipe, number: int) -> bool:
    # Spread evenly from a random start, so that a small split cannot miss its prevalence by chance.
    prevalence = site.lesion_prevalence
    if prevalence is None:
        return False
    start = derive_seed(recipe.seed, site.name, "prevalence") / 2**63

    def lesions_before(patient: int) -> int:
        return int(np.floor(start + patient * prevalence))

    return lesions_before(number + 1) > lesions_before(number)


def class_map(warped: WarpedSlice, structures: tuple[str, ...]) -> npt.NDArray[np.uint8]:
    """Class index of each pixel; uint8 [H, W].

    Only the largest piece of each structure and side counts: crumbs that the plane merely grazes are not what
    an annotator would outline, and would stretch a box prompt over other tissue.
    """
    labels_HW = warped.labels_HW.numpy()
    classes_HW = np.zeros(labels_HW.shape, dtype=np.uint8)
    for index, structure in enumerate(structures, start=1):
        for label in structure_labels(structure):
            pieces_HW, num_pieces = ndimage.label(labels_HW == label)
            if num_pieces:
                largest = int(np.bincount(pieces_HW.ravel())[1:].argmax()) + 1
                classes_HW[pieces_HW == largest] = index
    return classes_HW


def _write_example(
    folder: Path, patient_id: str, index: int, split: str, example: Example, kind: str
) -> dict[str, str | int]:
    """The manifest row of an image, after its two files are written."""
    name = f"{patient_id}-{index}.nii.gz"
    pixels_HW = torch.round(example.image_HW * 255).to(torch.uint8).numpy()
    _write_nifti(folder / "images" / name, pixels_HW, example.bare.plane, slope=1 / 255)
    _write_nifti(folder / "labels" / name, example.label_HW, example.bare.plane, slope=1.0)
    row: dict[str, str | int] = {"image": f"images/{name}", "patient_id": patient_id, "split": split}
    mask_column = "label" if kind == "brain-structures" else "lesion_mask"
    return {**row, **example.columns, mask_column: f"labels/{name}"}


def _write_nifti(path: Path, pixels_HW: npt.NDArray[np.uint8], plane: SlicePlane, *, slope: float) -> None:
    image: Any = nibabel.Nifti1Image(pixels_HW, plane.affine())
    image.header.set_xyzt_units("mm")
    image.header.set_slope_inter(slope, 0.0)
    nibabel.save(image, path)
