"""The drawings of an audit, as SVG: bounds beside claims, and the inverted image."""

from __future__ import annotations

import io
import re
from collections.abc import Sequence
from html import escape
from typing import Any

from server.audit_result import ATTACKS, AuditResult
from simulation.audit.adapter_inversion import Pictures
from simulation.audit.inversion import EXACT_DB, Image, Reconstruction

_INK = "#010203"  # of no mark; becomes the colour of the text around
_BOUND, _REFUTED, _CLAIM = "#2a7fc4", "#c8102e", "#808080"
_BLACK, _WHITE = "#000000", "#e8e8e8"
_WIDTH_IN = 7.4
_WORDS = {"off": "no protection", "clipped": "clipped", "clipped and noised": "clipped, noised", "masked": "masked"}


def draw_bounds(audit: AuditResult) -> str:
    """One line for each attack: what is claimed as a bar, the lower bound as a dot, red where it is above."""
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D
    from matplotlib.patches import Patch

    with _style("audit-bounds"):
        figure = Figure(figsize=(_WIDTH_IN, 1.1 + 0.42 * len(audit.bounds)), layout="constrained")
        axes = figure.add_subplot()
        for row, bound in enumerate(audit.bounds):
            if bound.claimed is not None:
                axes.barh(row, bound.claimed, height=0.5, color=_CLAIM, alpha=0.3)
            axes.plot(bound.epsilon, row, "o", color=_REFUTED if bound.exceeds else _BOUND, clip_on=False, zorder=3)
        axes.set_yticks(range(len(audit.bounds)), [ATTACKS[bound.attack] for bound in audit.bounds], parse_math=False)
        axes.set_ylim(len(audit.bounds) - 0.5, -0.5)
        axes.set_xlim(left=0)
        axes.tick_params(axis="y", length=0, pad=9)
        axes.grid(axis="x", color=_INK, alpha=0.15, linewidth=0.8)
        axes.set_axisbelow(True)
        axes.set_xlabel("epsilon")
        handles: list[Any] = [Line2D([], [], marker="o", color=_BOUND, linestyle="none", label="lower bound")]
        if any(bound.claimed is not None for bound in audit.bounds):
            handles.insert(0, Patch(color=_CLAIM, alpha=0.3, label="claimed"))
        figure.legend(handles=handles, loc="outside upper center", ncols=2, frameon=False)
        return _svg(figure, "audit-bounds", "lower bounds on epsilon of each attack beside what is claimed")


def draw_inversion(original_HW: Image, found: Sequence[Reconstruction]) -> str:
    """The original and each reconstruction, on black, as images are looked at."""
    from matplotlib.figure import Figure

    with _style("audit-inversion"):
        figure = Figure(figsize=(_WIDTH_IN, 1.88), facecolor=_BLACK, layout="constrained")
        panels = figure.subplots(1, 1 + len(found))
        titles = ["original", *(_title(one) for one in found)]
        for axes, title, image_HW in zip(panels, titles, [original_HW, *(one.image_HW for one in found)], strict=True):
            axes.imshow(image_HW, cmap="gray", vmin=0.0, vmax=1.0, interpolation="nearest")
            axes.set_title(title, color=_WHITE, fontsize=9)
            axes.set_axis_off()
        return _svg(figure, "audit-inversion", "an image and its reconstructions", transparent=False)


def draw_adapter_inversion(pictures: Pictures) -> str:
    """The original, the mean of the others, and where each search ended."""
    from matplotlib.figure import Figure

    shown = [
        ("original", pictures.original_HW),
        (f"mean of others\nSSIM {pictures.result.mean_ssim:.2f}", pictures.mean_HW),
        *(
            (f"{_WORDS[one.protection]}\nfrom {one.start}\nSSIM {one.ssim:.2f}", image_HW)
            for one, image_HW in zip(pictures.result.searches, pictures.found, strict=True)
        ),
    ]
    with _style("audit-adapter-inversion"):
        figure = Figure(figsize=(_WIDTH_IN, 1.62), facecolor=_BLACK, layout="constrained")
        for axes, (title, image_HW) in zip(figure.subplots(1, len(shown)), shown, strict=True):
            axes.imshow(image_HW, cmap="gray", vmin=0.0, vmax=1.0, interpolation="nearest")
            axes.set_title(title, color=_WHITE, fontsize=7.5)
            axes.set_axis_off()
        return _svg(
            figure, "audit-adapter-inversion", "an image and what searches for it ended with", transparent=False
        )


def _title(one: Reconstruction) -> str:
    likeness = "exact" if one.result.psnr_db >= EXACT_DB else f"{one.result.psnr_db:.0f} dB"
    return f"{_WORDS[one.result.protection]}\n{likeness}, SSIM {one.result.ssim:.2f}"


def _style(name: str) -> Any:
    from matplotlib import rc_context

    settings: Any = {
        "svg.fonttype": "none",
        "svg.hashsalt": name,
        "font.size": 10,
        "axes.spines.top": False,
        "axes.spines.right": False,
        **dict.fromkeys(("text.color", "axes.edgecolor", "axes.labelcolor", "xtick.color", "ytick.color"), _INK),
    }
    return rc_context(settings)


def _svg(figure: Any, name: str, description: str, *, transparent: bool = True) -> str:
    """The figure as an SVG element: ids of its own, text as text, ink in the colour of what is around it."""
    buffer = io.StringIO()
    figure.savefig(
        buffer,
        format="svg",
        transparent=transparent,
        facecolor="none" if transparent else figure.get_facecolor(),
        metadata={"Date": None},
    )
    text = buffer.getvalue()
    text = re.sub(r"<metadata>.*?</metadata>", "", text[text.index("<svg") :], flags=re.DOTALL)
    text = re.sub(r'(\bid="|href="#|url\(#)', rf"\g<1>{name}-", text)
    text = re.sub(r"font: ([\d.]+px)[^;\"]*", r"font: \1 var(--font, sans-serif)", text)
    text = text.replace(_INK, "currentColor")
    return text.replace("<svg ", f'<svg role="img" aria-label="{escape(description)}" ', 1)
