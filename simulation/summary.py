"""From the metrics of the arms to the numbers that are compared: site, metric, column."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from medfed.study import StudyConfig
from server.results import COLUMNS, Column

Metrics = Sequence[Mapping[str, Any]]
"""Lines of a ``metrics.jsonl``."""


def compare(
    study: StudyConfig, metrics_of_arm: Mapping[str, Metrics], primary: str
) -> tuple[
    dict[str, dict[str, dict[Column, float]]],
    dict[Column, float],
    dict[Column, float],
]:
    """Sites, mean and worst site of :class:`server.results.Results`, from the metrics of each arm by scope.

    Mean and worst site are over the sites that have every column, so that columns can be compared.
    """
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
            name: {column: values[name] for column, values in found.items() if name in values} for name in names
        }
    run = [column for column in COLUMNS if any(column in metrics.get(primary, {}) for metrics in table.values())]
    complete = [metrics[primary] for metrics in table.values() if run and set(run) <= set(metrics.get(primary, {}))]
    if not complete:
        return table, {}, {}
    mean: dict[Column, float] = {column: sum(m[column] for m in complete) / len(complete) for column in run}
    return table, mean, {column: min(m[column] for m in complete) for column in run}


def _evaluation(metrics: Metrics, site: str, round_number: int) -> dict[str, float]:
    """The metrics of one evaluation; empty if there was none."""
    facts = ("event", "scope", "round", "site", "num_examples")
    for line in metrics:
        if (line["event"], line["round"], line["site"]) == ("evaluate", round_number, site):
            return {name: value for name, value in line.items() if name not in facts}
    return {}
