"""Whether a saliency map points at what an expert outlined.

Legend: H height, W width.
"""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray


def pointing_hit(saliency_HW: NDArray[np.float64], mask_HW: NDArray[np.bool_]) -> float:
    """1.0 if the most salient pixel lies in the mask, else 0.0: one round of the pointing game.

    Zhang et al. 2016 (https://arxiv.org/abs/1608.00507), without its tolerance of 15 pixels. Equal
    maxima count by the share of them that lies in the mask, so that a flat map scores as a random point does.

    ===================== ====
    empty mask            NaN
    NaN in the map        NaN
    ===================== ====
    """
    if not mask_HW.any() or np.isnan(saliency_HW).any():
        return math.nan
    is_highest_HW = saliency_HW == saliency_HW.max()
    return float(mask_HW[is_highest_HW].mean())


def mass_in_mask(saliency_HW: NDArray[np.float64], mask_HW: NDArray[np.bool_]) -> float:
    """Share of the positive saliency that lies in the mask; in [0, 1]. Chance is the mask's share of the image.

    ===================== ====
    empty mask            NaN
    nothing positive      NaN
    NaN in the map        NaN
    ===================== ====
    """
    if not mask_HW.any() or np.isnan(saliency_HW).any():
        return math.nan
    positive_HW = np.maximum(saliency_HW, 0.0)
    total = float(positive_HW.sum())
    return float(positive_HW[mask_HW].sum()) / total if total > 0 else math.nan
