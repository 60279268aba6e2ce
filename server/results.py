"""The numbers of a finished run, as the rows and the sentences in which people read them.

Read from ``summary.json``, which whoever ran the study wrote; the report and the terminal show the same rows.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

from pydantic import BaseModel, ConfigDict, ValidationError

from medfed.errors import CheckpointError

Column = Literal["zero_shot", "local_only", "federated", "pooled"]
COLUMNS: tuple[Column, ...] = get_args(Column)
TRAINED: tuple[Column, ...] = ("local_only", "federated", "pooled")

DECIMALS = 3
"""Of every score that is shown; also the resolution at which two scores count as equal."""

_METRIC_NAMES = {"dice": "Dice", "balanced-accuracy": "balanced accuracy"}


class SitePrivacy(BaseModel):
    """What one site spent on its training patients in the federated arm, and how.

    Attributes:
        epsilon: of all its rounds composed, at ``delta``; from the site's own ledger.
        delta: probability outside the guarantee.
        noise_multiplier: standard deviation of the noise over the clip norm.
        clip_norm: L2 bound of what one unit contributes to a step.
        sampling_rate: probability with which a unit takes part in a step.
        steps: noised steps.
        rounds: rounds that were charged.
        declared_units: public number of units, by which updates are divided.
        clip_fraction: of the units drawn, how many were scaled down; None if none was drawn. Not private.
        signal_to_noise: norm of the clipped sum over the expected norm of the noise, mean over steps. Not
            private.
        noise_to_signal_expected: the same the other way round, at its best, from public numbers alone.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    epsilon: float
    delta: float
    noise_multiplier: float
    clip_norm: float
    sampling_rate: float
    steps: int
    rounds: int
    declared_units: int
    clip_fraction: float | None
    signal_to_noise: float | None
    noise_to_signal_expected: float

    @property
    def epsilon_shown(self) -> str:
        """Epsilon with two decimals, rounded up: what is shown is never below what was spent."""
        return f"{math.ceil(round(self.epsilon * 100, 9)) / 100:.2f}"


class PrivacyStatement(BaseModel):
    """What is promised to patients, and what is not.

    Attributes:
        promise: unit, adjacency and where the noise is added, in plain words; empty if nothing is private.
        confidentiality: who sees what of an update, in plain words; empty if the server sees each as it is.
        warnings: what is not private, each a sentence, shown in red.
        sites: site -> what it spent; empty if nothing is private.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    promise: str
    confidentiality: str = ""
    warnings: tuple[str, ...]
    sites: dict[str, SitePrivacy] = {}


class Results(BaseModel):
    """What ``summary.json`` holds, the report shows and ``medfed simulate --json`` prints.

    Attributes:
        run_dir: folder of the run.
        study: name of the study.
        rounds: rounds completed.
        wall_s: seconds that the process ran.
        primary: the metric to compare by; larger is better.
        sites: site -> metric -> column -> value; what was not run or not computable is absent.
        mean: column -> mean of the primary metric over sites.
        worst_site: column -> primary metric of the site where it is lowest.
        privacy: what is promised and what is not.
        cohort: where the images come from, in plain words.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    run_dir: str
    study: str
    rounds: int
    wall_s: float
    primary: str
    sites: dict[str, dict[str, dict[Column, float]]]
    mean: dict[Column, float]
    worst_site: dict[Column, float]
    privacy: PrivacyStatement
    cohort: str

    @property
    def columns(self) -> tuple[Column, ...]:
        """The columns that were run."""
        return tuple(column for column in COLUMNS if column in self.mean)

    @property
    def metric_name(self) -> str:
        """The primary metric in words."""
        return _METRIC_NAMES.get(self.primary, self.primary)

    def score(self, site: str, column: Column) -> float | None:
        """The primary metric of a site, or None if there is none."""
        return self.sites[site].get(self.primary, {}).get(column)


@dataclass(frozen=True)
class ResultRow:
    """One row of the results table.

    Attributes:
        site: name of the site, or what the row sums up.
        part: structure or target; empty for rows over sites.
        kind: ``part`` of a site, the whole ``site``, the ``mean`` over sites or the ``worst`` of them.
        values: column -> value.
        best: the highest of the trained columns at the shown resolution; empty if fewer than two were run.
        where: column -> the site that a ``worst`` value belongs to.
    """

    site: str
    part: str
    kind: Literal["part", "site", "mean", "worst"]
    values: Mapping[Column, float]
    best: frozenset[Column]
    where: Mapping[Column, str]


def read_results(folder: Path) -> Results:
    """The results of a finished run.

    Raises:
        CheckpointError: if the folder holds none, or something else under their name.
    """
    path = folder / "summary.json"
    try:
        return Results.model_validate_json(path.read_bytes())
    except OSError:
        raise CheckpointError(
            f"Expected a finished run with summary.json, got {folder}; "
            f"finish it with: medfed simulate --resume {folder}"
        ) from None
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        where = ".".join(str(part) for part in first["loc"])
        raise CheckpointError(
            f"Expected the summary of a run at {path}, got: {where} {first['msg']}; run the study again."
        ) from None


def column_labels(task_kind: str) -> dict[Column, str]:
    """Headings of the columns. A classifier's head is fresh, so before training it is not a zero-shot model."""
    return {
        "zero_shot": "before training" if task_kind == "classification" else "zero-shot",
        "local_only": "local-only",
        "federated": "federated",
        "pooled": "pooled",
    }


def rows_of(results: Results) -> list[ResultRow]:
    """The results table: the parts and the whole of each site, then mean and worst site.

    A site with one part has one row; one site alone has no rows over sites.
    """
    rows: list[ResultRow] = []
    for site, metrics in results.sites.items():
        parts = {
            name.removeprefix(f"{results.primary}/"): values
            for name, values in metrics.items()
            if name.startswith(f"{results.primary}/")
        }
        if len(parts) > 1:
            rows += [_row(site, part, "part", values) for part, values in parts.items()]
        whole = next(iter(parts)) if len(parts) == 1 else "mean"
        rows.append(_row(site, whole, "site", metrics.get(results.primary, {})))
    if len(results.sites) > 1:
        rows.append(_row("mean of sites", "", "mean", results.mean))
        where = {column: _site_with(results, column, value) for column, value in results.worst_site.items()}
        rows.append(_row("worst site", "", "worst", results.worst_site, where))
    return rows


def result_sentence(results: Results, labels: Mapping[Column, str]) -> str:
    """The result in one sentence, whichever way it went."""
    where = f"over {len(results.sites)} sites" if len(results.sites) > 1 else f"at {next(iter(results.sites))}"
    kind = "Mean " if len(results.sites) > 1 else ""
    name = results.metric_name if kind else results.metric_name[:1].upper() + results.metric_name[1:]
    before, after = results.mean.get("zero_shot"), results.mean.get("federated")
    if before is None or after is None:
        return f"The federated arm of this run was not evaluated, so there is no {results.metric_name} to report."
    rounds = f"{results.rounds} federated round{'s' if results.rounds != 1 else ''}"
    clauses = [
        f"{kind}{name} on held-out patients {where} {_verb(before, after)} from {_shown(before)} "
        f"({labels['zero_shot']}) to {_shown(after)} after {rounds}"
    ]
    alone, together = results.worst_site.get("local_only"), results.worst_site.get("federated")
    if alone is not None and together is not None:
        clauses.append(f"the worst site reaches {_shown(alone)} training alone and {_shown(together)} federated")
    if (pooled := results.mean.get("pooled")) is not None:
        clauses.append(f"pooling all images, the upper bound nobody may build, gives {_shown(pooled)}")
        clauses[-1] += f", {_gap(pooled, after)}"
    return "; ".join(clauses) + "."


def caveats(results: Results, labels: Mapping[Column, str]) -> list[str]:
    """Where federation loses, site by site and in the mean: one sentence for each kind of loss."""
    found = []
    kinds: dict[Column, str] = {
        "zero_shot": f"Federated is below {labels['zero_shot']}",
        "local_only": "Training alone beats federated",
    }
    for column, what in kinds.items():
        scores = {site: (results.score(site, column), results.score(site, "federated")) for site in results.sites}
        if len(scores) > 1:
            scores["mean of sites"] = (results.mean.get(column), results.mean.get("federated"))
        losers = [
            f"{where} ({_shown(other)} against {_shown(federated)})"
            for where, (other, federated) in scores.items()
            if other is not None and federated is not None and _shown(other) > _shown(federated)
        ]
        if losers:
            found.append(f"{what}: {', '.join(losers)}.")
    return found


def _row(
    site: str,
    part: str,
    kind: Literal["part", "site", "mean", "worst"],
    values: Mapping[Column, float],
    where: Mapping[Column, str] | None = None,
) -> ResultRow:
    trained = {column: round(values[column], DECIMALS) for column in TRAINED if column in values}
    highest = max(trained.values(), default=0.0)
    best = frozenset(column for column, value in trained.items() if value == highest)
    return ResultRow(site, part, kind, values, best if len(trained) > 1 else frozenset(), where or {})


def _site_with(results: Results, column: Column, value: float) -> str:
    return next((site for site in results.sites if results.score(site, column) == value), "")


def _shown(value: float) -> str:
    return f"{value:.{DECIMALS}f}"


def _verb(before: float, after: float) -> str:
    difference = float(_shown(after)) - float(_shown(before))
    return "rises" if difference > 0 else "falls" if difference < 0 else "stays, to three decimals,"


def _gap(pooled: float, federated: float) -> str:
    """How far federated is from pooled; the difference of the numbers as they are shown."""
    gap = float(_shown(pooled)) - float(_shown(federated))
    return f"{_shown(abs(gap))} {'above' if gap > 0 else 'below'} federated" if gap else "the same as federated"
