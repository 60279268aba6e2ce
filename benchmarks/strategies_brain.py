"""The main rules on a real backbone: LiteMedSAM adapted to the brain cohort, without noise and at epsilon 8 and 2.

    python benchmarks/strategies_brain.py FOLDER tune [--epsilon 8] [--rule NAME]
    python benchmarks/strategies_brain.py FOLDER [--rule NAME] [--epsilon E] [--seed S] ...

Simulations of ``examples/brain-structures-private.toml`` by the real apps, the federated arm alone: four hospitals of
24 training patients, four rounds of four noised steps, trust ``site``. Every rule trains as many numbers of a layer as
LoRA of rank 1 does (a rule that trains one side at a time: in two rounds), with the same scale alpha / rank. ``tune``
tries learning rates on a seed of its own, at epsilon 8 for all rules and at epsilon 2 for two of them; the best are
CHOSEN below. Where nothing was tuned a rule has its rate of epsilon 8. Runs go to FOLDER; finished ones are not run
again. Then all finished runs are written to ``docs/results/strategies-brain.json``, with differences to fedit paired by
seed. A run takes three minutes on one core that does nothing else.
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

import matplotlib.pyplot as plt
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
FIGURE = ROOT / "docs" / "benchmarks" / "strategies-brain"
EPSILONS = (math.inf, 8.0, 2.0)
SEEDS = (2026, 2027, 2028)
TUNING_SEED = 1999
RATES = {8.0: (2.0, 4.0, 8.0, 16.0), 2.0: (2.0, 4.0, 8.0)}
RANK = {"fedit": 1, "ffa-lora": 2, "alt-gauge": 1, "twin-fresh": 2}
CHOSEN = {"fedit": 4.0, "ffa-lora": 8.0, "alt-gauge": 8.0, "twin-fresh": 8.0}
CHOSEN_AT_2 = {"fedit": 2.0, "twin-fresh": 4.0}
"""Learning rate of each rule: the best of those of RATES that ``tune`` tried."""
SCALE = 2.0


def rate_of(rule: str, epsilon: float) -> float:
    """The learning rate of a rule."""
    return CHOSEN_AT_2.get(rule, CHOSEN[rule]) if epsilon == 2.0 else CHOSEN[rule]


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


def rows_of(folder: Path) -> Iterator[dict[str, Any]]:
    """Mean and worst site of each rule and epsilon over the seeds that are finished, and the difference to fedit."""
    for epsilon in EPSILONS:
        finished = {
            (rule, seed): result
            for rule, seed in product(CHOSEN, SEEDS)
            if (result := result_of(folder, rule, epsilon, seed, rate_of(rule, epsilon), run=False))
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
                "learning_rate": rate_of(rule, epsilon),
                "zero_shot": fmean(finished[rule, seed].mean["zero_shot"] for seed in seeds),
                "mean_of_sites": fmean(values),
                "worst_site": fmean(finished[rule, seed].worst_site["federated"] for seed in seeds),
                "difference": fmean(differences),
                "spread": stdev(differences) if len(differences) > 1 else None,
                "seeds": seeds,
                "num_seeds": len(seeds),
                "values": values,
            }


def draw(rows: list[dict[str, Any]]) -> None:
    """The table as a figure, PNG and SVG: mean over sites filled, worst site open, a tick for each seed."""
    figure, axes = plt.subplots(figsize=(8, 3.4), layout="constrained")
    rules = list(CHOSEN)
    looks = {None: ("o", "#1c2833", "no noise"), 8.0: ("s", "#1f6fb2", "epsilon 8"), 2.0: ("^", "#d1600a", "epsilon 2")}
    for row in rows:
        marker, colour, label = looks[row["epsilon"]]
        height = len(rules) - rules.index(row["name"]) - 0.22 * list(looks).index(row["epsilon"])
        first = label if row["name"] == rules[0] else None
        axes.plot(row["mean_of_sites"], height, marker, color=colour, markersize=8, label=first)
        axes.plot(row["worst_site"], height, marker, color=colour, markersize=8, fillstyle="none")
        axes.plot(row["values"], [height] * row["num_seeds"], "|", color=colour, alpha=0.6)
    zero_shot = fmean(row["zero_shot"] for row in rows)
    axes.axvline(zero_shot, color="#8a949e", linewidth=1)
    axes.annotate("zero-shot", (zero_shot, len(rules) + 0.3), color="#8a949e", ha="left", xytext=(4, 0),
                  textcoords="offset points")  # fmt: skip
    axes.set_ylim(0.3, len(rules) + 0.6)
    axes.set_yticks([len(rules) - place - 0.22 for place in range(len(rules))], rules)
    axes.set_xlabel("Dice on held-out patients: mean of sites (filled; ticks: seeds) and worst site (open)")
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.tick_params(axis="y", length=0)
    axes.grid(axis="x", color="#e4e8eb")
    figure.legend(loc="outside upper left", ncols=3, frameon=False)
    for suffix in ("png", "svg"):
        figure.savefig(FIGURE.with_suffix(f".{suffix}"), dpi=160, metadata={"Date": None} if suffix == "svg" else None)
    plt.close(figure)


def tune(folder: Path, epsilon: float, rules: Iterable[str], rates: Iterable[float]) -> None:
    """Try learning rates on the tuning seed, and show the table from which CHOSEN is."""
    table = Table("rule", "learning rate", f"mean Dice at epsilon {epsilon:g}")
    for rule, rate in product(rules, rates):
        result = result_of(folder, rule, epsilon, TUNING_SEED, rate)
        assert result is not None
        table.add_row(rule, f"{rate:g}", f"{result.mean['federated']:.4f}")
    Console().print(table)


def main() -> None:
    """Run what is missing, write the result and show it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("what", nargs="?", choices=("tune",))
    parser.add_argument("--rule", action="append", choices=list(CHOSEN))
    parser.add_argument("--rate", type=float, action="append", help="for tune: instead of all")
    parser.add_argument("--epsilon", type=float, action="append", choices=EPSILONS)
    parser.add_argument("--seed", type=int, action="append", choices=SEEDS)
    asked = parser.parse_args()
    torch.set_num_threads(1)
    if asked.what == "tune":
        for epsilon in asked.epsilon or RATES:
            if epsilon not in RATES:
                parser.error("tune works at epsilon 8 and 2")
            rules = asked.rule or (CHOSEN_AT_2 if epsilon == 2.0 else CHOSEN)
            tune(asked.folder, epsilon, rules, asked.rate or RATES[epsilon])
        return
    machine = this_machine()
    for seed, epsilon, rule in product(asked.seed or SEEDS, asked.epsilon or EPSILONS, asked.rule or CHOSEN):
        result_of(asked.folder, rule, epsilon, seed, rate_of(rule, epsilon))
    rows = list(rows_of(asked.folder))
    result = {"command": "python benchmarks/strategies_brain.py FOLDER", **printed([], machine), "rows": rows}
    RESULT.write_text(json.dumps(result, indent=1) + "\n")
    draw(rows)
    table = Table("epsilon", "rule", "mean of sites", "minus fedit", "worst site", "seeds")
    for row in rows:
        numbers = [f"{row[key]:.4f}" for key in ("mean_of_sites", "difference", "worst_site")]
        epsilon = "inf" if row["epsilon"] is None else f"{row['epsilon']:g}"
        table.add_row(epsilon, str(row["name"]), *numbers, str(row["num_seeds"]))
    Console().print(table)


if __name__ == "__main__":
    main()
