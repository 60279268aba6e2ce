"""One patient of a hospital with a shift: where the families meet the making of a cohort.

Every method gives back what it was given if the profile has no family for it.

Dimension key: H = rows, W = columns of a slice.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from medfed.shift_profile import AnnotatorShift, ShiftProfile
from simulation.anatomy import Anatomy
from simulation.lesions import Lesion, lesion_targets
from simulation.scanner import ScannerProfile
from simulation.shift.annotator import annotate, reader_margin_px
from simulation.shift.demographics import Person, draw_person, embody
from simulation.shift.draws import Drawn
from simulation.shift.labels import draw_lesion, lesion_proportions
from simulation.shift.physics import degrade, window
from simulation.warp import PatientWarp, WarpedSlice, warp_slice

# A slab is averaged over planes this far apart: finer than the template's voxels would tell nothing more.
_PLANE_SPACING_MM = 1.0
_Labels = npt.NDArray[np.uint8]


@dataclass(frozen=True)
class ShiftedPatient:
    """A patient, and the shift of the hospital that they are at.

    Attributes:
        profile: resolved.
        site: generators of the site.
        patient: generators of this patient.
        is_held_out: whether the patient is in the test split.
    """

    profile: ShiftProfile
    site: Drawn
    patient: Drawn
    is_held_out: bool

    @classmethod
    def of(
        cls, profile: ShiftProfile | None, *, seed: int, site: str, number: int, is_held_out: bool
    ) -> ShiftedPatient:
        """The patient with this number at a site; None stands for a hospital without a shift."""
        drawn = Drawn(seed, (site,))
        return cls(profile or ShiftProfile(), drawn, drawn.of(number), is_held_out)

    @property
    def person(self) -> Person | None:
        """Who it is, if the hospital has a demographic mix."""
        mix = self.profile.demographics
        return None if mix is None else draw_person(mix, self.patient("demographics"))

    def body(self, warp: PatientWarp) -> PatientWarp:
        """The anatomy of this person."""
        person = self.person
        return warp if person is None else embody(warp, person)

    def lesion(self, usual: Lesion | None, prevalence: float | None) -> Lesion | None:
        """The lesion that this patient comes with: the usual one, unless the hospital sees other patients."""
        labels, absent = self.profile.labels, self.profile.missing.classes if self.profile.missing else ()
        is_drawn = bool(absent) or (labels is not None and labels.concentration is not None)
        if prevalence is None or not is_drawn:
            return usual
        proportions = lesion_proportions(prevalence, labels, absent, self.site)
        return draw_lesion(proportions, self.patient("labels"))

    def slab(self, anatomy: Anatomy, warp: PatientWarp, warped: WarpedSlice) -> WarpedSlice:
        """The slice as thick as the hospital's protocol has it; labels are those of its middle."""
        if self.profile.slice_thickness is None or self.profile.slice_thickness.thickness_mm == 0.0:
            return warped
        thickness_mm = self.profile.slice_thickness.thickness_mm
        num_planes = 2 * int(np.ceil(thickness_mm / (2 * _PLANE_SPACING_MM))) + 1
        middle = warped.plane
        positions_mm = middle.position_mm + np.linspace(-thickness_mm / 2, thickness_mm / 2, num_planes)
        planes = [
            warp_slice(anatomy, warp, replace(middle, position_mm=float(position))).image_HW
            for position in positions_mm
        ]
        return replace(warped, image_HW=torch.stack(planes).mean(dim=0))

    def acquire(
        self, scanner: ScannerProfile, image_HW: Tensor, generator: np.random.Generator, *, index: int
    ) -> Tensor:
        """The slice as the hospital stores it: its scanner, then the profile's families, then the window.

        Args:
            scanner: the hospital's.
            image_HW: float32, at least 0.
            generator: of the scanner.
            index: number of the image among the patient's.
        """
        draws = self.patient.of(index)

        def families(image_1HW: Tensor, _: np.random.Generator) -> Tensor:
            return degrade(image_1HW, self.profile, draws)

        acquired_HW = replace(scanner, steps=(*scanner.steps, families)).acquire(image_HW, generator)
        if self.profile.window is None:
            return acquired_HW
        return window(acquired_HW, self.profile.window, draws("window"))

    def structures(self, label_HW: _Labels, names: tuple[str, ...], *, index: int) -> _Labels:
        """Class indices as the hospital's annotators leave them.

        Args:
            label_HW: the truth.
            names: structure of class 1, 2, ...
            index: number of the image among the patient's.
        """
        missing = self.profile.missing
        if missing is not None and self._has(missing.splits):
            if self._is_unlabelled():
                return np.zeros_like(label_HW)
            never = [number for number, name in enumerate(names, start=1) if name in missing.classes]
            label_HW = np.where(np.isin(label_HW, never), np.uint8(0), label_HW)
        return self._outlined(label_HW, self.profile.annotator, index)

    def finding(self, lesion: Lesion | None, mask_HW: _Labels, *, index: int) -> tuple[dict[str, int], _Labels]:
        """Class indices and the outline of a lesion as the hospital has them on record.

        Args:
            lesion: the truth.
            mask_HW: and where it is.
            index: number of the image among the patient's.
        """
        missing, annotator = self.profile.missing, self.profile.annotator
        overlooked = missing is not None and self._has(missing.splits) and self._is_unlabelled()
        if annotator is not None and self._has(annotator.splits):
            overlooked |= bool(self.patient("annotator-misses").random() < annotator.misses)
        if lesion is None or overlooked:
            return lesion_targets(None), np.zeros_like(mask_HW)
        # Overlooked or not is of the patient, and was decided above.
        attentive = None if annotator is None else annotator.model_copy(update={"misses": 0.0})
        return lesion_targets(lesion), self._outlined(mask_HW, attentive, index)

    def _outlined(self, label_HW: _Labels, shift: AnnotatorShift | None, index: int) -> _Labels:
        if shift is None or not self._has(shift.splits):
            return label_HW
        reader_px = reader_margin_px(shift, site=self.site, patient=self.patient)
        return annotate(label_HW, shift, reader_margin_px=reader_px, draws=self.patient.of(index))

    def _is_unlabelled(self) -> bool:
        assert self.profile.missing is not None
        return bool(self.patient("missing").random() < self.profile.missing.labels)

    def _has(self, splits: str) -> bool:
        return splits == "all" or not self.is_held_out
