"""The few-shot curve of a run as people see it: a sentence, a drawing and a table of ``few_shot.json``."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from server.evaluation import Measured
from server.few_shot import FewShot, FewShotPoint
from server.report_figures import draw_few_shot
from server.results import DECIMALS, Column


@dataclass(frozen=True)
class FewShotRow:
    """One row of the table.

    Attributes:
        label: training patients of each site.
        cells: of every arm; None where there is no value.
        joining: federated less local-only; None without baselines, and before training.
    """

    label: str
    cells: tuple[Measured | None, ...]
    joining: Measured | None


@dataclass(frozen=True)
class FewShotView:
    """What the report shows.

    Attributes:
        sentence: the finding in words.
        svg: the drawing.
        headings: of the cells.
        has_joining: whether there are baselines to compare with.
        rows: from no patient to all.
        resamples: behind every interval.
    """

    sentence: str
    svg: str
    headings: tuple[str, ...]
    has_joining: bool
    rows: tuple[FewShotRow, ...]
    resamples: int


def few_shot_view(few_shot: FewShot, labels: Mapping[Column, str], metric_name: str) -> FewShotView:
    """Everything that the report shows of a curve.

    Args:
        few_shot: of the run.
        labels: of the results table's columns.
        metric_name: the primary metric in words.
    """
    return FewShotView(
        sentence=_sentence(few_shot, metric_name),
        svg=draw_few_shot(few_shot, labels, metric_name),
        headings=tuple(labels[column] for column in few_shot.columns),
        has_joining=few_shot.has_joining,
        rows=rows_of_curve(few_shot),
        resamples=few_shot.resamples,
    )


def rows_of_curve(few_shot: FewShot) -> tuple[FewShotRow, ...]:
    """The table: before training all arms are the same model."""

    def row(point: FewShotPoint) -> FewShotRow:
        if point.patients == 0:
            return FewShotRow("0", (few_shot.before,) * len(few_shot.columns), None)
        cells = tuple(point.mean.get(column) for column in few_shot.columns)
        return FewShotRow(few_shot.label(point), cells, point.joining)

    return tuple(row(point) for point in few_shot.points)


def _sentence(few_shot: FewShot, metric_name: str) -> str:
    """What the first and the last number of patients give, and how many a site alone needs for the same."""
    first, last = few_shot.trained[0], few_shot.trained[-1]
    together = first.mean.get("federated"), last.mean.get("federated")
    if together[0] is None or together[1] is None:
        return ""
    start = f"With {_patients(first.patients)} at each site the federation reaches {metric_name} {_shown(together[0])}"
    alone = first.mean.get("local_only"), last.mean.get("local_only")
    if alone[0] is None or alone[1] is None:
        return f"{start}; with all of them, {_shown(together[1])}."
    catching_up = _catching_up(few_shot, together[0])
    return (
        f"{start} and a site alone {_shown(alone[0])}, {_compared(first.joining)}. With all of them they reach "
        f"{_shown(together[1])} and {_shown(alone[1])}, {_compared(last.joining)}. {catching_up}"
    )


def _catching_up(few_shot: FewShot, goal: Measured) -> str:
    """How many patients of its own a site needs for what the federation has from the fewest; of means alone."""
    fewest = _patients(few_shot.trained[0].patients)
    enough = (point for point in few_shot.trained if _reaches(point.mean.get("local_only"), goal))
    point = next(enough, None)
    goal_in_words = f"what the federation reaches with {fewest} of each"
    if point is None:
        return f"In the mean of sites, training alone does not reach with all patients {goal_in_words}."
    if point == few_shot.trained[0]:
        return f"In the mean of sites, training alone is as good with {fewest}."
    own = "all patients" if few_shot.is_all(point) else _patients(point.patients)
    return f"In the mean of sites, training alone needs {own} for {goal_in_words}."


def _reaches(alone: Measured | None, goal: Measured) -> bool:
    """At the resolution that is shown."""
    return alone is not None and round(alone.value, DECIMALS) >= round(goal.value, DECIMALS)


def _compared(joining: Measured | None) -> str:
    """Federated less local-only, and whether it is told from chance."""
    if joining is None:
        return "there is no difference to take"
    interval = ""
    if joining.low is not None and joining.high is not None:
        interval = f" ({joining.low:+.{DECIMALS}f} to {joining.high:+.{DECIMALS}f})"
    doubt = "" if joining.is_told_from_zero else ", not told from chance"
    return f"a difference of {joining.value:+.{DECIMALS}f}{interval}{doubt}"


def _patients(count: int) -> str:
    return f"{count} training patient{'s' if count != 1 else ''}"


def _shown(measured: Measured) -> str:
    return f"{measured.value:.{DECIMALS}f}"
