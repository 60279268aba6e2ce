"""The result of a simulation: one number per site, metric and arm, as an object that serialises to JSON."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal, get_args

from pydantic import BaseModel, ConfigDict

from medfed.study import StudyConfig

Column = Literal["zero_shot", "local_only", "federated", "pooled"]
COLUMNS: tuple[Column, ...] = get_args(Column)

Metrics = Sequence[Mapping[str, Any]]
"""Lines of a ``metrics.jsonl``."""


class Summary(BaseModel):
    """What ``summary.json`` holds and ``medfed simulate --json`` prints.

    Attributes:
        run_dir: folder of the run.
        study: its name.
        rounds: rounds completed.
        wall_s: seconds from start to report, this process.
        primary: the metric to compare by; larger is better.
        sites: site -> metric -> column -> value; a column that was not run, or a metric that could not be
            computed, is left out.
        mean: column -> mean of the primary metric over sites.
        worst_site: column -> primary metric of the site where it is lowest.
        privacy: in plain words.
        cohort: where the images come from, in plain words.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    run_dir: str
    study: str
    rounds: int
    wall_s: float
    primary: str
    sites: dict[str, dict[str, dict[Column, float]]]
    mean: dict[Column, float]
    worst_site: dict[Column, float]
    privacy: str
    cohort: str


NO_PRIVACY = (
    "Nothing here is private: updates are neither clipped, noised nor masked. "
    "Right for a simulation, never for patients."
)


def compare(
    study: StudyConfig, metrics_of_arm: Mapping[str, Metrics], primary: str
) -> tuple[
    dict[str, dict[str, dict[Column, float]]],
    dict[Column, float],
    dict[Column, float],
]:
    """Sites, mean and worst site of a :class:`Summary`, from the metrics of each arm by scope."""
    last = study.rounds.num_rounds
    table: dict[str, dict[str, dict[Column, float]]] = {}
    for site in study.site_names:
        found: dict[Column, Mapping[str, float]] = {
            "zero_shot": _evaluation(metrics_of_arm.get("federated", ()), site, 0),
            "local_only": _evaluation(metrics_of_arm.get(f"local-{site}", ()), site, last),
            "federated": _evaluation(metrics_of_arm.get("federated", ()), site, last),
            "pooled": _evaluation(metrics_of_arm.get("pooled", ()), site, last),
        }
        names = dict.fromkeys(name for values in found.values() for name in values)
        table[site] = {
            name: {column: values[name] for column, values in found.items() if name in values}
            for name in names
        }
    by_column: dict[Column, list[float]] = {
        column: [table[site][primary][column] for site in table if column in table[site].get(primary, {})]
        for column in COLUMNS
    }
    mean = {column: sum(values) / len(values) for column, values in by_column.items() if values}
    return table, mean, {column: min(values) for column, values in by_column.items() if values}


def _evaluation(metrics: Metrics, site: str, round_number: int) -> dict[str, float]:
    """The metrics of one evaluation; empty if there was none."""
    facts = ("event", "scope", "round", "site", "num_examples")
    for line in metrics:
        if (line["event"], line["round"], line["site"]) == ("evaluate", round_number, site):
            return {name: value for name, value in line.items() if name not in facts}
    return {}
