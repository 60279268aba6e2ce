"""How the figures of shifts are drawn: for paper, in one type size, as SVG and PNG of the same drawing."""

from __future__ import annotations

import io
from collections.abc import Mapping
from typing import Any

from simulation.overlays import packed_png

WIDTH_IN = 10.0
DPI = 160
INK, FAINT = "#222222", "#777777"
BAR, PEOPLE = "#2a7fc4", "#8a8a8a"
TEXT_PT, SMALL_PT = 9.0, 7.5

# One hash salt and no date, so that the same figure is the same file.
_STYLE: dict[str, Any] = {
    "font.size": TEXT_PT,
    "svg.hashsalt": "medfed",
    "svg.fonttype": "none",
    "text.color": INK,
    "axes.labelcolor": INK,
    "xtick.color": INK,
    "ytick.color": INK,
    "axes.edgecolor": FAINT,
    "axes.linewidth": 0.6,
}


def styled() -> Any:
    """A context in which a figure is to be made and saved."""
    import matplotlib as mpl

    style: Any = _STYLE
    return mpl.rc_context(style)


def figure(height_in: float, width_in: float = WIDTH_IN) -> Any:
    """A white page."""
    from matplotlib.figure import Figure

    return Figure(figsize=(width_in, height_in), dpi=DPI, facecolor="white")


def saved(drawing: Any) -> Mapping[str, bytes]:
    """The figure as ``svg`` and ``png``."""
    svg = io.BytesIO()
    drawing.savefig(svg, format="svg", metadata={"Date": None})
    return {"svg": svg.getvalue(), "png": packed_png(drawing)}
