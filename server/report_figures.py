"""The drawings of a report, as SVG that is part of the page: it takes the page's colours, light or dark."""

from __future__ import annotations

import io
import re
from collections.abc import Iterable, Mapping
from contextlib import AbstractContextManager
from html import escape
from typing import Any

from server.evaluation import Evaluation, Measured
from server.few_shot import FewShot
from server.results import COLUMNS, Column, Results

# Any colour that no mark uses: replaced by the page's text colour after drawing.
_INK = "#010203"
_WIDTH_IN = 7.4

# Colour and shape both tell the arms apart; the colours (after Okabe and Ito 2008) keep 3:1 on white and black.
_MARKS: Mapping[Column, tuple[str, str]] = {
    "zero_shot": ("#808080", "o"),
    "local_only": ("#c77700", "s"),
    "federated": ("#2a7fc4", "D"),
    "pooled": ("#0f9470", "^"),
}
_SITE_COLOURS = ("#7a6fd0", "#c2569b", "#9a8500", "#3a9db5", "#c24a3a", "#5f8f3a", "#8a6a4f", "#6f7f94")


def draw_scores(results: Results, labels: Mapping[Column, str]) -> str:
    """A dot plot: one line for each site, one mark for each arm, the primary metric along x."""
    from matplotlib.figure import Figure

    sites, columns = list(results.sites), results.columns
    with _style("scores"):
        figure = Figure(figsize=(_WIDTH_IN, 1.2 + 0.65 * len(sites)), layout="constrained")
        axes = figure.add_subplot()
        for column in columns:
            colour, shape = _MARKS[column]
            # Arms lie a little apart, so that equal scores do not hide each other.
            shift = (COLUMNS.index(column) - (len(COLUMNS) - 1) / 2) * 0.18
            points = [(results.score(site, column), row + shift) for row, site in enumerate(sites)]
            shown = [(value, row) for value, row in points if value is not None]
            fill = "none" if column == "zero_shot" else colour
            axes.plot(
                [value for value, _ in shown],
                [row for _, row in shown],
                shape,
                color=colour,
                markerfacecolor=fill,
                markersize=7,
                label=labels[column],
                linestyle="none",
            )
        for boundary in range(1, len(sites)):
            axes.axhline(boundary - 0.5, color=_INK, alpha=0.15, linewidth=0.8)
        axes.set_yticks(range(len(sites)), sites, parse_math=False)
        axes.set_ylim(len(sites) - 0.5, -0.5)
        axes.tick_params(axis="y", length=0)
        axes.grid(axis="x", color=_INK, alpha=0.15, linewidth=0.8)
        axes.set_axisbelow(True)
        axes.set_xlabel(f"{results.metric_name} on held-out patients, 1 is perfect", parse_math=False)
        figure.legend(loc="outside upper center", ncols=len(columns), frameon=False)
        return _svg(figure, "scores", f"{results.metric_name} of each site and arm")


def draw_losses(metrics: Iterable[Mapping[str, Any]], sites: Iterable[str], pooled_site: str) -> str | None:
    """Training loss of each round: the sites of the federated arm, and the pooled arm dashed.

    Args:
        metrics: lines of the ``metrics.jsonl`` of the arms to draw.
        sites: sites of the federated arm, in order.
        pooled_site: site of the pooled arm.

    Returns:
        The drawing, or None if no loss was recorded.
    """
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    curves: dict[tuple[str, str], list[tuple[int, float]]] = {}
    for line in metrics:
        if line["event"] == "train" and "loss" in line:
            curves.setdefault((line["scope"], line["site"]), []).append((line["round"], line["loss"]))
    if not curves:
        return None
    with _style("losses"):
        figure = Figure(figsize=(_WIDTH_IN, 3.2), layout="constrained")
        axes = figure.add_subplot()
        for index, site in enumerate(sites):
            if points := curves.get(("federated", site)):
                colour = _SITE_COLOURS[index % len(_SITE_COLOURS)]
                axes.plot(*zip(*points, strict=True), "o-", color=colour, markersize=4, label=site)
        if points := curves.get(("pooled", pooled_site)):
            axes.plot(*zip(*points, strict=True), "s--", color=_INK, markersize=4, label="pooled")
        axes.set_xlabel("round")
        axes.set_ylabel("training loss, last local epoch")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.grid(color=_INK, alpha=0.15, linewidth=0.8)
        legend = figure.legend(loc="outside right upper", frameon=False)
        for text in legend.get_texts():
            text.set_parse_math(False)
        return _svg(figure, "losses", "training loss of each round and site")


def draw_differences(differences: Mapping[str, Measured], name: str, label: str) -> str:
    """Difference of two arms at each site with its interval: right of the line the first of the two is better."""
    from matplotlib.figure import Figure

    with _style(name):
        figure = Figure(figsize=(_WIDTH_IN, 0.85 + 0.36 * len(differences)), layout="constrained")
        axes = figure.add_subplot()
        axes.axvline(0.0, color=_INK, alpha=0.6, linewidth=1.0)
        for row, measured in enumerate(differences.values()):
            colour = _MARKS["federated"][0] if measured.is_told_from_zero else _MARKS["zero_shot"][0]
            if measured.low is not None and measured.high is not None:
                axes.plot([measured.low, measured.high], [row, row], "-", color=colour, linewidth=2.2)
            fill = colour if measured.is_told_from_zero else "none"
            axes.plot([measured.value], [row], "D", color=colour, markerfacecolor=fill, markersize=6.5)
        reach = 1.15 * max(
            (abs(end) for d in differences.values() for end in (d.value, d.low, d.high) if end is not None), default=0.0
        )
        axes.set_xlim(-max(reach, 0.01), max(reach, 0.01))
        axes.set_yticks(range(len(differences)), list(differences), parse_math=False)
        axes.set_ylim(len(differences) - 0.5, -0.5)
        axes.tick_params(axis="y", length=0)
        axes.grid(axis="x", color=_INK, alpha=0.15, linewidth=0.8)
        axes.set_xlabel(label, parse_math=False)
        return _svg(figure, name, label)


def draw_few_shot(few_shot: FewShot, labels: Mapping[Column, str], metric_name: str) -> str:
    """Mean score of every arm by the training patients of each site, with intervals; dashed: before training."""
    from matplotlib.figure import Figure

    points = few_shot.trained
    with _style("few-shot"):
        figure = Figure(figsize=(_WIDTH_IN, 3.4), layout="constrained")
        axes = figure.add_subplot()
        if (before := few_shot.before) is not None:
            axes.axhline(before.value, linestyle="--", color=_MARKS["zero_shot"][0], label=labels["zero_shot"])
        for column in few_shot.columns:
            colour, shape = _MARKS[column]
            # Arms lie a little apart, so that their intervals do not hide each other.
            shift = (few_shot.columns.index(column) - (len(few_shot.columns) - 1) / 2) * 0.1
            shown = [(row + shift, point.mean[column]) for row, point in enumerate(points) if column in point.mean]
            for x, measured in shown:
                if measured.low is not None and measured.high is not None:
                    axes.plot([x, x], [measured.low, measured.high], "-", color=colour, alpha=0.55, linewidth=1.6)
            axes.plot(
                [x for x, _ in shown],
                [measured.value for _, measured in shown],
                f"{shape}-",
                color=colour,
                markersize=6.5,
                linewidth=1.4,
                label=labels[column],
            )
        axes.set_xticks(range(len(points)), [few_shot.label(point) for point in points], parse_math=False)
        axes.set_xlim(-0.4, len(points) - 0.6)
        axes.grid(axis="y", color=_INK, alpha=0.15, linewidth=0.8)
        axes.set_axisbelow(True)
        axes.set_xlabel("training patients at each site", parse_math=False)
        axes.set_ylabel(metric_name, parse_math=False)
        figure.legend(loc="outside upper center", ncols=len(few_shot.columns) + 1, frameon=False)
        return _svg(figure, "few-shot", f"{metric_name} by the training patients of each site")


def draw_reliability(evaluation: Evaluation) -> str:
    """One reliability diagram for each target, bins of all sites added up: as predicted, and after scaling."""
    from matplotlib.figure import Figure

    targets = list(dict.fromkeys(target for site in evaluation.sites.values() for target in site.calibration))
    with _style("reliability"):
        columns = min(3, len(targets))
        rows = -(-len(targets) // columns)
        figure = Figure(figsize=(_WIDTH_IN, 0.5 + _WIDTH_IN / 3 * rows), layout="constrained")
        grid = figure.subplots(rows, columns, squeeze=False).ravel()
        for axes in grid[len(targets) :]:
            axes.set_axis_off()
        for index, (target, axes) in enumerate(zip(targets, grid, strict=False)):
            axes.plot([0, 1], [0, 1], "--", color=_INK, alpha=0.4, linewidth=1.0)
            for kind, key in (("before", "local_only"), ("after", "federated")):
                found = [
                    getattr(site.calibration[target], kind)
                    for site in evaluation.sites.values()
                    if target in site.calibration
                ]
                totals = [[sum(bins) for bins in zip(*(getattr(f, part) for f in found), strict=True)]
                          for part in ("count", "confidence", "correct")]  # fmt: skip
                points = [(conf / n, right / n, n) for n, conf, right in zip(*totals, strict=True) if n]
                colour, shape = _MARKS[key]  # type: ignore[index]
                most = max(n for *_, n in points)
                label = "as predicted" if kind == "before" else "after temperature scaling"
                xs, ys, ns = zip(*points, strict=True)
                axes.plot(xs, ys, "-", color=colour, alpha=0.5, linewidth=1.2)
                axes.scatter(xs, ys, s=[12 + 70 * n / most for n in ns], color=colour, marker=shape, linewidths=0,
                             label=label if index == 0 else None)  # fmt: skip
            axes.set_title(target, fontsize=10, parse_math=False)
            axes.set_xlim(0, 1.03)
            axes.set_ylim(-0.03, 1.03)
            axes.set_aspect("equal")
            axes.set_xlabel("confidence")
            axes.grid(color=_INK, alpha=0.15, linewidth=0.8)
        grid[0].set_ylabel("right")
        figure.legend(loc="outside upper center", ncols=2, frameon=False)
        return _svg(figure, "reliability", "reliability diagrams of the federated arm")


def _style(name: str) -> AbstractContextManager[None]:
    """Matplotlib's settings while a drawing is made."""
    from matplotlib import rc_context

    settings: Any = {
        "svg.fonttype": "none",  # text stays text: it can be searched and is set in the page's font
        "svg.hashsalt": name,  # the same ids, and so the same bytes, every time
        "font.size": 10,
        "axes.spines.top": False,
        "axes.spines.right": False,
        **dict.fromkeys(("text.color", "axes.edgecolor", "axes.labelcolor", "xtick.color", "ytick.color"), _INK),
    }
    return rc_context(settings)


def _svg(figure: Any, name: str, description: str) -> str:
    """The figure as an element of an HTML page: nothing outside of itself, ids of its own, the page's ink."""
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None})
    text = buffer.getvalue()
    text = re.sub(r"<metadata>.*?</metadata>", "", text[text.index("<svg") :], flags=re.DOTALL)
    text = re.sub(r'(\bid="|href="#|url\(#)', rf"\g<1>{name}-", text)
    text = re.sub(r"font: ([\d.]+px)[^;\"]*", r"font: \1 var(--font)", text)
    text = text.replace(_INK, "currentColor")
    return text.replace("<svg ", f'<svg role="img" aria-label="{escape(description)}" ', 1)
