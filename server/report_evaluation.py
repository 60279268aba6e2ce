"""The evaluation of a run as a report shows it: sentences, tables and drawings of ``evaluation.json``."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from server.evaluation import COMPARISONS, Comparison, EvaluatedColumn, Evaluation, Measured, NotMeasured
from server.listed import listed
from server.report_figures import draw_differences, draw_reliability
from server.report_forgetting import ForgettingView, forgetting_view
from server.results import DECIMALS, Column

OTHERS_ONLY = "others only"
"""Label of the federation without the site, which the results table does not have."""

_FEW_PATIENTS = 10
"""Below it an interval from resampling says little; the report says so."""


@dataclass(frozen=True)
class ShownMetric:
    """A metric as a table shows it.

    Attributes:
        name: key in the evaluation.
        label: heading.
        decimals: shown ones.
        lower_is_better: which way is better.
    """

    name: str
    label: str
    decimals: int
    lower_is_better: bool = False


@dataclass(frozen=True)
class ShownComparison:
    """One comparison of arms.

    Attributes:
        heading: the question.
        sentence: the answer in words.
        svg: differences at each site with intervals.
    """

    heading: str
    sentence: str
    svg: str


@dataclass(frozen=True)
class EvaluationView:
    """What the template shows.

    Attributes:
        evaluation: the numbers.
        metrics: columns of the table of sites.
        columns: arms with labels, columns of the table over sites.
        comparisons: questions that two arms answer.
        calibration_svg: reliability diagrams; empty for segmentation.
        forgetting: structures that the study does not train; None where they were not tried.
        sentences: single findings, each a heading and a sentence.
        few_patients: sites with too few held-out patients for their interval to say much.
    """

    evaluation: Evaluation
    metrics: tuple[ShownMetric, ...]
    columns: tuple[tuple[EvaluatedColumn, str], ...]
    comparisons: tuple[ShownComparison, ...]
    calibration_svg: str
    forgetting: ForgettingView | None
    sentences: tuple[tuple[str, str], ...]
    few_patients: tuple[str, ...]


def view_of(evaluation: Evaluation, labels: Mapping[Column, str], metric_name: str) -> EvaluationView:
    """Everything that the report shows of an evaluation.

    Args:
        evaluation: of the run.
        labels: of the results table's columns.
        metric_name: the primary metric in words.
    """
    every = {column: OTHERS_ONLY if column == "left_out" else labels[column] for column in evaluation.columns}
    return EvaluationView(
        evaluation=evaluation,
        metrics=_metrics(evaluation),
        columns=tuple((column, every[column]) for column in evaluation.columns),
        comparisons=_comparisons(evaluation, every, metric_name),
        calibration_svg=draw_reliability(evaluation) if any(s.calibration for s in evaluation.sites.values()) else "",
        forgetting=None if isinstance(evaluation.forgetting, NotMeasured) else forgetting_view(evaluation.forgetting),
        sentences=_sentences(evaluation, every),
        few_patients=tuple(name for name, site in evaluation.sites.items() if site.patients < _FEW_PATIENTS),
    )


def _metrics(evaluation: Evaluation) -> tuple[ShownMetric, ...]:
    unit = next(iter(evaluation.sites.values())).distance_unit or ""
    every = (
        ShownMetric("dice", "Dice", DECIMALS),
        ShownMetric("hd95", f"HD95 ({unit})", 2, lower_is_better=True),
        ShownMetric("surface-distance", f"surface distance ({unit})", 2, lower_is_better=True),
        ShownMetric("missed", "missed", 2, lower_is_better=True),
        ShownMetric("balanced-accuracy", "balanced accuracy", DECIMALS),
        ShownMetric("auroc", "AUROC", DECIMALS),
        ShownMetric("auprc", "AUPRC", DECIMALS),
        ShownMetric("sensitivity-at-specificity-0.9", "sensitivity at specificity 0.9", DECIMALS),
        ShownMetric("ece", "calibration error", DECIMALS, lower_is_better=True),
        ShownMetric("ece-scaled", "after scaling", DECIMALS, lower_is_better=True),
    )
    return tuple(metric for metric in every if "federated" in evaluation.over_sites.get(metric.name, {}))


_QUESTIONS: dict[Comparison, tuple[str, str, str]] = {
    "joining": ("Was joining worth it?", "Federated beats training alone", "falls behind training alone"),
    "being_in": (
        "Does it help a hospital that was not there?",
        "Being in the federation beats being served by the others",
        "falls behind the federation without the site",
    ),
    "pooling": ("What would pooling all images add?", "Pooling beats federated", "falls behind federated"),
}


def _comparisons(
    evaluation: Evaluation, labels: Mapping[EvaluatedColumn, str], metric_name: str
) -> tuple[ShownComparison, ...]:
    shown = []
    for comparison, (heading, wins, loses) in _QUESTIONS.items():
        differences = evaluation.difference(comparison)
        if not differences:
            continue
        after, before = (labels[column] for column in COMPARISONS[comparison])
        shown.append(
            ShownComparison(
                heading=heading,
                sentence=_verdict(differences, wins, loses),
                svg=draw_differences(differences, comparison, f"{metric_name}: {after} less {before}"),
            )
        )
    return tuple(shown)


def _verdict(differences: Mapping[str, Measured], wins: str, loses: str) -> str:
    """Counts only what its interval tells from zero."""
    better = [site for site, d in differences.items() if d.is_told_from_zero and d.value > 0]
    worse = [site for site, d in differences.items() if d.is_told_from_zero and d.value < 0]
    rest = len(differences) - len(better) - len(worse)
    parts = []
    if better:
        parts.append(f"{wins} at {listed(better)}, by more than resampling the patients explains")
    if worse:
        parts.append(f"it {loses} at {listed(worse)}" if parts else f"It {loses} at {listed(worse)}")
    if rest:
        where = "At the other sites" if parts else "At no site is the difference told from chance"
        if parts:
            parts.append(f"{where.lower()} the difference is not told from chance ({rest} of {len(differences)})")
        else:
            parts.append(where)
    return "; ".join(parts) + "."


def _sentences(evaluation: Evaluation, labels: Mapping[EvaluatedColumn, str]) -> tuple[tuple[str, str], ...]:
    found = []
    flips = [site.flips for site in evaluation.sites.values() if site.flips is not None]
    if flips:
        cases, lost, gained = (sum(getattr(f, name) for f in flips) for name in ("cases", "lost", "gained"))
        found.append(
            (
                "Changed cases",
                f"Of {cases} held-out structures that the study trains, {lost} are outlined clearly worse (Dice lower "
                f"by over 0.05) than by the backbone as it was published, and {gained} clearly better.",
            )
        )
    if evaluation.saliency is not None:
        s = evaluation.saliency
        by_arm = listed(
            [
                f"{labels[column]} {s.pointing[column]:.2f} and {s.mass[column]:.2f}"
                for column in evaluation.columns
                if column in s.pointing
            ]
        )
        found.append(
            (
                "Where the model looks",
                f"For {s.images} held-out images with an outlined lesion, the most salient point lies in the lesion, "
                f"and saliency falls into it, this often (of 1): {by_arm}; chance is {s.mask_share:.2f} for both. "
                f"Gradient times token, for the true class of {s.target}.",
            )
        )
    if evaluation.embedding is not None:
        e = evaluation.embedding
        by_arm = listed(
            [
                f"{e.effective_rank[column]:.1f} ({labels[column]})"
                for column in evaluation.columns
                if column in e.effective_rank
            ]
        )
        found.append(
            (
                "Embedding",
                f"The {e.features} features of {e.images} held-out images span an effective rank of {by_arm}; at most "
                f"{min(e.images - 1, e.features)} is possible. Much less after training would mean a collapse.",
            )
        )
    for group in evaluation.groups:
        scores = listed([f"{name} {score:.3f} ({group.cases[name]})" for name, score in group.scores.items()])
        gaps = [
            f"largest {what} difference {max(values.values()):.2f}"
            for what, values in (("demographic parity", group.parity), ("equalised odds", group.odds))
            if values
        ]
        text = f"Score by group, with cases: {scores}" if scores else "No group is large enough to compare"
        found.append((f"Groups by {group.attribute}", "; ".join([text, *gaps]) + "."))
    return tuple(found)
