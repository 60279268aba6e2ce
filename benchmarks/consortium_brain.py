"""What sharing the noise is worth in Dice: the consortium demo beside pooled, `site` and local-only training.

    python benchmarks/consortium_brain.py FOLDER [--epsilon 2] [--seed 2026] ...

For each epsilon and seed two simulations of ``examples/brain-structures-consortium.toml`` by the real apps: with trust
``consortium`` and its baselines (pooled and each hospital alone, with all noise of the same multiplier), and with trust
``site`` in rounds of four steps, as the private demo has it. Runs go to FOLDER; finished ones are not run again,
stopped ones go on. Then all pairs of finished runs in FOLDER are written to ``docs/results/consortium-brain.json``.
One pair takes about a quarter of an hour on one core. Without options: epsilon 8, 2 and 1, seeds 2026 to 2028.
"""

from __future__ import annotations

import argparse
import json
import tomllib
from collections.abc import Iterator
from itertools import product
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from private_utility import toml_of
from rich.console import Console
from rich.table import Table

from medfed.study import StudyConfig
from server.results import Results, read_results
from simulation.bench.rows import printed, this_machine
from simulation.harness import simulate

ROOT = Path(__file__).parents[1]
STUDY = ROOT / "examples" / "brain-structures-consortium.toml"
RESULT = ROOT / "docs" / "results" / "consortium-brain.json"
EPSILONS = (8.0, 2.0, 1.0)
SEEDS = (2026, 2027, 2028)
TRUSTS = ("consortium", "site")
SITE_STEPS = 4
"""Noised steps of a site in a round of ``site``; both trusts take the same number of steps in all."""


def variant(trust: str, epsilon: float, seed: int) -> StudyConfig:
    """The example at another epsilon and seed; with trust ``site`` in fewer rounds of more steps."""
    study: dict[str, Any] = tomllib.loads(STUDY.read_text())
    study["seed"] = seed
    study["privacy"] |= {"trust": trust, "epsilon": epsilon}
    if trust == "site":
        del study["secure_aggregation"]
        study["privacy"]["steps_per_round"] = SITE_STEPS
        study["rounds"]["num_rounds"] //= SITE_STEPS
    return StudyConfig.model_validate(study)


def folder_of(folder: Path, trust: str, epsilon: float, seed: int) -> Path:
    """Where the run of a variant is, in a folder of its own."""
    return folder / f"{trust}-{epsilon:g}-{seed}"


def finished(folder: Path) -> Results | None:
    """The result of the run in a variant's folder, if it came to its end."""
    return next((read_results(path.parent) for path in folder.glob("*/summary.json")), None)


def run(folder: Path, trust: str, epsilon: float, seed: int) -> None:
    """Run a variant to its end, from where it stopped if it did."""
    place = folder_of(folder, trust, epsilon, seed)
    if finished(place) is not None:
        return
    started = [path.parent for path in place.glob("*/options.json")]
    if started:
        simulate(resume=started[0])
        return
    place.mkdir(parents=True, exist_ok=True)
    path = place / "study.toml"
    path.write_text(toml_of(variant(trust, epsilon, seed)))
    simulate(path, out=place, workers=0, baselines=trust == "consortium")


def rows_of(folder: Path) -> Iterator[dict[str, object]]:
    """Means over the seeds of which both runs are finished, by epsilon and arm, with the values of each seed."""
    for epsilon in EPSILONS:
        values: dict[str, list[tuple[float, float]]] = {}
        used = []
        for seed in SEEDS:
            shared, site = (finished(folder_of(folder, trust, epsilon, seed)) for trust in TRUSTS)
            if shared is None or site is None:
                continue
            used.append(seed)
            for name, results, column in (
                ("zero-shot", shared, "zero_shot"),
                ("pooled", shared, "pooled"),
                ("consortium", shared, "federated"),
                ("site", site, "federated"),
                ("alone", shared, "local_only"),
            ):
                values.setdefault(name, []).append((results.mean[column], results.worst_site[column]))
        for name, pairs in values.items():
            differences = [mine - pooled for (mine, _), (pooled, _) in zip(pairs, values["pooled"], strict=True)]
            yield {
                "name": name,
                "epsilon": epsilon,
                "mean_of_sites": fmean(mean for mean, _ in pairs),
                "worst_site": fmean(worst for _, worst in pairs),
                "difference": fmean(differences),
                "seeds": used,
                "values": [mean for mean, _ in pairs],
            }


def main() -> None:
    """Run what is missing, write the result and show it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--epsilon", type=float, action="append", choices=EPSILONS)
    parser.add_argument("--seed", type=int, action="append", choices=SEEDS)
    asked = parser.parse_args()
    torch.set_num_threads(1)
    machine = this_machine()
    for epsilon, seed, trust in product(asked.epsilon or EPSILONS, asked.seed or SEEDS, TRUSTS):
        run(asked.folder, trust, epsilon, seed)
    rows = list(rows_of(asked.folder))
    result = {"command": "python benchmarks/consortium_brain.py FOLDER", **printed([], machine), "rows": rows}
    RESULT.write_text(json.dumps(result, indent=1) + "\n")
    table = Table("epsilon", "", "mean of sites", "minus pooled", "worst site", "seeds")
    for row in rows:
        numbers = [f"{row[key]:.3f}" for key in ("mean_of_sites", "difference", "worst_site")]
        table.add_row(f"{row['epsilon']:g}", str(row["name"]), *numbers, str(len(row["values"])))
    Console().print(table)


if __name__ == "__main__":
    main()
