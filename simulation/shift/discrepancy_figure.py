"""The measured shift of every pair of sites as a small matrix."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from simulation.shift.discrepancy import NUM_PERMUTATIONS, Discrepancy
from simulation.shift.print_style import FAINT, INK, SMALL_PT, TEXT_PT, WIDTH_IN, figure, saved, styled

_CELL_IN, _TOP_IN, _BOTTOM_IN, _LEFT_IN = 0.82, 0.42, 1.1, 1.6
_LEAST_WIDTH_IN = 4.4
_SHORT_NAME = 9  # letters that fit under a cell
_MOST_SITES_IN_FULL = 9
_CLEAR = 0.05


def draw_discrepancies(sites: Sequence[str], pairs: Mapping[tuple[str, str], Discrepancy]) -> Mapping[str, bytes]:
    """The lower triangle of all pairs: MMD^2 as colour and number, and the p-value under it.

    Args:
        sites: names in order.
        pairs: by names, in that order; pairs that could not be measured are left blank.

    Returns:
        The figure as ``svg`` and ``png``.
    """
    num_sites = len(sites)
    cell_in = _CELL_IN if num_sites <= _MOST_SITES_IN_FULL else (WIDTH_IN - _LEFT_IN) / num_sites
    side_in = cell_in * (num_sites - 1)
    width_in = max(_LEAST_WIDTH_IN, _LEFT_IN + side_in + 0.1)
    height_in = side_in + _TOP_IN + _BOTTOM_IN
    values = np.full((num_sites, num_sites), np.nan)
    for (first, second), found in pairs.items():
        values[sites.index(second), sites.index(first)] = found.mmd_squared
    # Colour runs to the largest of this study, but never so far that chance looks like a shift.
    darkest = max(0.2, float(np.nanmax(values)))
    with styled():
        page = figure(height_in, width_in)
        axes = page.add_axes(
            (_LEFT_IN / width_in, _BOTTOM_IN / height_in, side_in / width_in, side_in / height_in)
        )  # fmt: skip
        axes.imshow(values[1:, :-1], cmap="Blues", vmin=0.0, vmax=darkest)
        for (first, second), found in pairs.items():
            column, row = sites.index(first), sites.index(second) - 1
            colour = "white" if found.mmd_squared > 0.6 * darkest else INK
            weight = "bold" if found.p_value <= _CLEAR else "normal"
            axes.text(column, row - 0.14, f"{found.mmd_squared:.3f}", ha="center", va="center", color=colour,
                      weight=weight, fontsize=TEXT_PT)  # fmt: skip
            axes.text(column, row + 0.2, f"p {found.p_value:.3f}", ha="center", va="center", color=colour,
                      fontsize=SMALL_PT)  # fmt: skip
        axes.set_yticks(range(num_sites - 1), sites[1:], parse_math=False)
        turned = {"rotation": 20, "ha": "right"} if max(map(len, sites)) > _SHORT_NAME else {}
        axes.set_xticks(range(num_sites - 1), sites[:-1], parse_math=False, **turned)
        axes.tick_params(length=0)
        for spine in axes.spines.values():
            spine.set_visible(False)
        page.text(0.02, 1 - 0.22 / height_in, "MMD² of frozen features, patients of two sites", fontsize=TEXT_PT + 1)
        note = (
            f"0: no shift. p: share of {NUM_PERMUTATIONS} random exchanges of\npatients with at least this much; "
            f"bold: p ≤ {_CLEAR}, each pair alone."
        )
        page.text(0.02, 0.12 / height_in, note, fontsize=SMALL_PT, color=FAINT)
        return saved(page)
