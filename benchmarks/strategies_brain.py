"""The main rules on a real backbone: LiteMedSAM adapted to the brain cohort, without noise and at epsilon 8 and 2.

    python benchmarks/strategies_brain.py FOLDER tune
    python benchmarks/strategies_brain.py FOLDER [--rule NAME] [--epsilon E] [--seed S] ...

Simulations of ``examples/brain-structures-private.toml`` by the real apps, the federated arm alone: four hospitals of
24 training patients, four rounds of four noised steps, trust ``site``. Every rule trains as many numbers of a layer as
LoRA of rank 1 does (a rule that trains one side at a time: in two rounds), with the same scale alpha / rank. ``tune``
tries learning rates at epsilon 8 on a seed of its own; the best are CHOSEN below, and stay for the other epsilons.
Runs go to FOLDER; finished ones are not run again. Then all finished runs are written to
``docs/results/strategies-brain.json``, with differences to fedit paired by seed. A run takes three minutes on one core
that does nothing else.
"""

from __future__ import annotations

import argparse
import json
import math
import tomllib
from collections.abc import Iterable, Iterator
from itertools import product
from pathlib import Path
from statistics import fmean, stdev
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
STUDY = ROOT / "examples" / "brain-structures-private.toml"
RESULT = ROOT / "docs" / "results" / "strategies-brain.json"
EPSILONS = (math.inf, 8.0, 2.0)
SEEDS = (2026, 2027, 2028)
TUNING_SEED, TUNING_EPSILON = 1999, 8.0
RATES = (2.0, 4.0, 8.0, 16.0)
RANK = {"fedit": 1, "ffa-lora": 2, "alt-gauge": 1, "twin-fresh": 2}
CHOSEN = {"fedit": 4.0, "ffa-lora": 8.0, "alt-gauge": 8.0, "twin-fresh": 8.0}
"""Learning rate of each rule: the best of RATES, as ``tune`` printed them."""
SCALE = 2.0


def variant(rule: str, epsilon: float, seed: int, learning_rate: float) -> StudyConfig:
    """The example with another rule; without noise where epsilon is infinite."""
    study: dict[str, Any] = tomllib.loads(STUDY.read_text())
    study["seed"] = seed
    study["strategy"] = {"name": rule}
    study["adapter"] |= {"rank": RANK[rule], "alpha": SCALE * RANK[rule]}
    study["training"]["learning_rate"] = learning_rate
    if math.isinf(epsilon):
        study["privacy"]["trust"] = "none"
        del study["privacy"]["epsilon"]
    else:
        study["privacy"]["epsilon"] = epsilon
    return StudyConfig.model_validate(study)


def result_of(folder: Path, rule: str, epsilon: float, seed: int, rate: float, *, run: bool = True) -> Results | None:
    """The result of a variant, from its folder or from a run to its end; None if it may not run and has not."""
    place = folder / f"{rule}-{epsilon:g}-{seed}-{rate:g}"
    found = next((read_results(path.parent) for path in place.glob("*/summary.json")), None)
    if found is not None or not run:
        return found
    started = [path.parent for path in place.glob("*/options.json")]
    if started:
        return simulate(resume=started[0]).summary
    place.mkdir(parents=True, exist_ok=True)
    path = place / "study.toml"
    path.write_text(toml_of(variant(rule, epsilon, seed, rate)))
    return simulate(path, out=place, workers=0, baselines=False).summary


def rows_of(folder: Path) -> Iterator[dict[str, object]]:
    """Mean and worst site of each rule and epsilon over the seeds that are finished, and the difference to fedit."""
    for epsilon in EPSILONS:
        finished = {
            (rule, seed): result
            for rule, seed in product(CHOSEN, SEEDS)
            if (result := result_of(folder, rule, epsilon, seed, CHOSEN[rule], run=False))
        }
        for rule in CHOSEN:
            seeds = [seed for seed in SEEDS if (rule, seed) in finished and ("fedit", seed) in finished]
            if not seeds:
                continue
            values = [finished[rule, seed].mean["federated"] for seed in seeds]
            differences = [
                value - finished["fedit", seed].mean["federated"] for value, seed in zip(values, seeds, strict=True)
            ]
            yield {
                "name": rule,
                "epsilon": None if math.isinf(epsilon) else epsilon,
                "learning_rate": CHOSEN[rule],
                "zero_shot": fmean(finished[rule, seed].mean["zero_shot"] for seed in seeds),
                "mean_of_sites": fmean(values),
                "worst_site": fmean(finished[rule, seed].worst_site["federated"] for seed in seeds),
                "difference": fmean(differences),
                "spread": stdev(differences) if len(differences) > 1 else None,
                "seeds": seeds,
                "num_seeds": len(seeds),
                "values": values,
            }


def tune(folder: Path, rules: Iterable[str]) -> None:
    """Try the learning rates on the tuning seed, and show the table from which CHOSEN is."""
    table = Table("rule", "learning rate", f"mean Dice at epsilon {TUNING_EPSILON:g}")
    for rule, rate in product(rules, RATES):
        result = result_of(folder, rule, TUNING_EPSILON, TUNING_SEED, rate)
        assert result is not None
        table.add_row(rule, f"{rate:g}", f"{result.mean['federated']:.4f}")
    Console().print(table)


def main() -> None:
    """Run what is missing, write the result and show it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("what", nargs="?", choices=("tune",))
    parser.add_argument("--rule", action="append", choices=list(CHOSEN))
    parser.add_argument("--epsilon", type=float, action="append", choices=EPSILONS)
    parser.add_argument("--seed", type=int, action="append", choices=SEEDS)
    asked = parser.parse_args()
    torch.set_num_threads(1)
    if asked.what == "tune":
        tune(asked.folder, asked.rule or CHOSEN)
        return
    machine = this_machine()
    for seed, epsilon, rule in product(asked.seed or SEEDS, asked.epsilon or EPSILONS, asked.rule or CHOSEN):
        result_of(asked.folder, rule, epsilon, seed, CHOSEN[rule])
    rows = list(rows_of(asked.folder))
    result = {"command": "python benchmarks/strategies_brain.py FOLDER", **printed([], machine), "rows": rows}
    RESULT.write_text(json.dumps(result, indent=1) + "\n")
    table = Table("epsilon", "rule", "mean of sites", "minus fedit", "worst site", "seeds")
    for row in rows:
        numbers = [f"{row[key]:.4f}" for key in ("mean_of_sites", "difference", "worst_site")]
        epsilon = "inf" if row["epsilon"] is None else f"{row['epsilon']:g}"
        table.add_row(epsilon, str(row["name"]), *numbers, str(row["num_seeds"]))
    Console().print(table)


if __name__ == "__main__":
    main()
