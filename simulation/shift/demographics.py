"""Who a patient is, and what that does to anatomy: the attribute that fairness is measured by.

Both effects are smooth maps of the whole head that image and labels are read through, so annotations stay exact:

=========  ======================================================================  ================================
attribute  effect                                                                  source
=========  ======================================================================  ================================
sex        brain volume: men's is 11 % larger than women's, shared half and half   Ruigrok et al. 2014, Neurosci.
           around the template                                                     Biobehav. Rev. 39
age group  the brain shrinks, the middle with the ventricles widens                Scahill et al. 2003, Arch.
                                                                                   Neurol. 60 (direction and order)
=========  ======================================================================  ================================

Only size and ventricles: no cortical thinning, no white-matter lesions, no contrast. The template is an average of
young adults, so the youngest group is left as it is.

Dimension key: D = z, H = y, W = x of the warp's grid.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np
import torch

from medfed.shift_profile import DemographicShift
from simulation.warp import BRAIN_CENTRE_XYZ_MM, SMALLEST_JACOBIAN, PatientWarp, grid_points_mm

Sex = Literal["female", "male"]
AgeGroup = Literal["under-40", "40-64", "65-plus"]
AGE_GROUPS: tuple[AgeGroup, ...] = get_args(AgeGroup)

_VOLUME_RATIO = 1.11  # men's over women's
_SEX_SCALE = {"female": _VOLUME_RATIO ** (-1 / 6), "male": _VOLUME_RATIO ** (1 / 6)}  # lengths, half of it each
_AGE_SCALE = {"under-40": 1.0, "40-64": 0.992, "65-plus": 0.98}  # lengths: 2.4 and 6 % of volume
# Lengths in the middle grow by 1 / (1 - widening): the ventricles' volume by about a third, and to about double.
_AGE_WIDENING = {"under-40": 0.0, "40-64": 0.10, "65-plus": 0.22}
_VENTRICLES_XYZ_MM = (0.0, -12.0, 16.0)
_VENTRICLES_RADIUS_MM = 22.0


@dataclass(frozen=True)
class Person:
    """Attributes of one patient, as the manifest holds them.

    Attributes:
        sex: as named.
        age_group: in years.
    """

    sex: Sex
    age_group: AgeGroup

    @property
    def columns(self) -> dict[str, str]:
        """Columns of the manifest."""
        return {"attribute_sex": self.sex, "attribute_age_group": self.age_group}


def draw_person(shift: DemographicShift, generator: np.random.Generator) -> Person:
    """A patient of a site.

    Args:
        shift: the site's mix.
        generator: the only source of randomness.
    """
    is_female = bool(generator.random() < shift.female)
    shares = np.array(shift.age_groups) / sum(shift.age_groups)
    return Person("female" if is_female else "male", AGE_GROUPS[int(generator.choice(len(AGE_GROUPS), p=shares))])


def embody(warp: PatientWarp, person: Person) -> PatientWarp:
    """The patient with the body of this person.

    Args:
        warp: a patient of no particular sex and age.
        person: who it is.

    Returns:
        A warp whose Jacobian determinant is positive at every corner of its grid; should widening fold it, it is
        reduced by a fifth until it does not.
    """
    scale = _SEX_SCALE[person.sex] * _AGE_SCALE[person.age_group]
    centre = np.array(BRAIN_CENTRE_XYZ_MM)
    linear = warp.matrix_34[:, :3] / scale
    # A larger brain: what lies at a place of the patient lies nearer to the centre in the atlas.
    offset = warp.matrix_34[:, 3] + warp.matrix_34[:, :3] @ centre - linear @ centre
    matrix_34 = np.column_stack([linear, offset])
    widening = _AGE_WIDENING[person.age_group]
    while True:
        aged = PatientWarp(matrix_34, _widened(warp.displacement_3DHW, widening))
        if widening < 1e-3 or float(aged.jacobian_determinant().min()) > SMALLEST_JACOBIAN / 2:
            return aged
        widening *= 0.8


def _widened(displacement_3DHW: torch.Tensor, widening: float) -> torch.Tensor:
    """The displacement, followed by a pull of the atlas towards the ventricles: in the patient they are wider."""
    if widening == 0.0:
        return displacement_3DHW
    reached_DHW3 = grid_points_mm() + displacement_3DHW.movedim(0, -1)
    from_middle_DHW3 = reached_DHW3 - torch.tensor(_VENTRICLES_XYZ_MM)
    nearness_DHW1 = torch.exp(-from_middle_DHW3.square().sum(-1, keepdim=True) / (2 * _VENTRICLES_RADIUS_MM**2))
    return displacement_3DHW - (widening * nearness_DHW1 * from_middle_DHW3).movedim(-1, 0)
