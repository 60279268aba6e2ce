"""How far the outline of a predicted mask lies from the reference: MONAI's surface distances, with empty masks said.

Legend: N pairs of masks, H height, W width.
"""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

Spacing = tuple[float, float]
"""Height and width of a pixel: of its rows and columns."""


def surface_distances(
    predicted_NHW: Tensor, mask_NHW: Tensor, *, spacing: Spacing
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """95th percentile Hausdorff distance and average symmetric surface distance of each pair, float64 [N] each.

    Both in the unit of ``spacing`` (1, 1 for pixels). Symmetric: HD95 is the larger of the two directed 95th
    percentiles, the average is over the pixels of both outlines.

    ====================== =========================================================
    empty prediction       NaN: a structure that was missed has no outline; count it
    empty reference        NaN
    both empty             NaN
    equal masks            0
    ====================== =========================================================
    """
    from monai.metrics import get_mask_edges, get_surface_distance

    hd95_N, average_N = np.full(len(mask_NHW), np.nan), np.full(len(mask_NHW), np.nan)
    predicted_NHW, mask_NHW = predicted_NHW.bool().cpu(), mask_NHW.bool().cpu()
    drawn = [n for n in range(len(mask_NHW)) if bool(predicted_NHW[n].any()) and bool(mask_NHW[n].any())]
    for n in drawn:
        rows, columns = _around(predicted_NHW[n] | mask_NHW[n])
        edges = get_mask_edges(predicted_NHW[n, rows, columns], mask_NHW[n, rows, columns], crop=False)
        # What MONAI's two metrics do with the distances; each of them would look for the same edges again.
        directed = [get_surface_distance(*pair, spacing=list(spacing)) for pair in (edges, edges[::-1])]
        hd95_N[n] = max(float(torch.quantile(distances, 0.95)) for distances in directed)
        average_N[n] = float(torch.cat(directed).mean())
    return hd95_N, average_N


def _around(mask_HW: Tensor) -> tuple[slice, slice]:
    """The part of the image with everything in it and a pixel of border: distances are the same, and found sooner."""
    rows, columns = (torch.nonzero(mask_HW.any(dim=axis)).flatten() for axis in (1, 0))
    return (
        slice(max(0, int(rows[0]) - 1), int(rows[-1]) + 2),
        slice(max(0, int(columns[0]) - 1), int(columns[-1]) + 2),
    )
