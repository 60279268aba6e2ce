"""The figure and the tables of docs/benchmarks/strategies.md, from what the benchmark printed.

medfed bench strategies --json > docs/results/strategies-digits.json
python benchmarks/strategies_page.py
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import matplotlib as mpl
import matplotlib.pyplot as plt

ROOT = Path(__file__).parents[1]
RESULT = ROOT / "docs" / "results" / "strategies-digits.json"
PAGE = ROOT / "docs" / "benchmarks" / "strategies.md"
FIGURE = ROOT / "docs" / "benchmarks" / "strategies-digits"

Facts = dict[str, Any]
INK, QUIET = "#1c2833", "#8a949e"
COLOURS = {None: "#1c2833", 8.0: "#1f6fb2", 2.0: "#d1600a"}
MARKERS = {None: "o", 8.0: "s", 2.0: "^"}
REFERENCE_ROWS = ("full fine-tuning", "centralised", "head-only")
OWN_ROWS = ("fedsa", "local only")
"""Tuned for each site's own mix: their accuracy over all styles says nothing about them."""


def epsilon_text(epsilon: float | None) -> str:
    return "no noise" if epsilon is None else f"epsilon {epsilon:g}"


class Results:
    """The table, by arm and epsilon."""

    def __init__(self, path: Path = RESULT) -> None:
        self.all = json.loads(path.read_text())
        arms: list[Facts] = self.all["arms"]
        self.names = list(dict.fromkeys(arm["name"] for arm in arms))
        self.epsilons = list(dict.fromkeys(arm["epsilon"] for arm in arms))
        self._at = {(arm["name"], arm["epsilon"]): arm for arm in arms}

    def at(self, name: str, epsilon: float | None) -> Facts:
        return self._at[name, epsilon]

    def per_epsilon(self, names: list[str], cell: Callable[[Facts], str]) -> Iterator[list[str]]:
        for name in names:
            yield [name, *(cell(self.at(name, epsilon)) for epsilon in self.epsilons)]

    @property
    def of_one_model(self) -> list[str]:
        return [name for name in self.names if name not in OWN_ROWS]


def difference(facts: Facts, to: str) -> str:
    found = facts["difference"][to]
    return f"{found['mean']:+.1f} ± {found['half_interval']:.1f}"


def tables(results: Results) -> dict[str, list[list[str]]]:
    """Cells of each marked table, its head first."""
    columns = [epsilon_text(epsilon) for epsilon in results.epsilons]
    private = [epsilon for epsilon in results.epsilons if epsilon is not None]
    federated = [name for name in results.names if results.at(name, private[0])["traffic_MB"] is not None]
    return {
        "accuracy": [
            ["accuracy, %", *columns],
            *results.per_epsilon(
                results.of_one_model, lambda facts: f"{facts['accuracy']:.1f} ({difference(facts, 'fedit')})"
            ),
        ],
        "twin-fresh": [
            ["minus twin-fresh, points", *columns],
            *results.per_epsilon(
                [name for name in results.of_one_model if name != "twin-fresh"],
                lambda facts: difference(facts, "twin-fresh"),
            ),
        ],
        "sites": [
            ["own mix / worst site, %", *columns],
            *results.per_epsilon(results.names, lambda facts: f"{facts['own_mix']:.1f} / {facts['worst_site']:.1f}"),
        ],
        "calibration": [
            ["calibration error, %", *columns],
            *results.per_epsilon(results.names, lambda facts: f"{facts['calibration_error']:.1f}"),
        ],
        "sent": [
            ["", "trains", "up, MB", "down, mean MB", "down, last MB", "secure sum", "promises exactness"],
            *(_sent(results.at(name, private[0])) for name in federated),
        ],
        "exactness": [
            ["distance from the mean of products", *columns],
            *results.per_epsilon(
                [name for name in federated if results.at(name, private[0])["inexact"] is not None], _distance
            ),
        ],
        "settings": [
            ["rate / clip norm / local steps", *columns],
            *results.per_epsilon(results.names, _setting),
        ],
    }


def _sent(facts: Facts) -> list[str]:
    traffic = facts["traffic_MB"]
    return [
        facts["name"],
        f"{facts['num_parameters']:,}",
        f"{traffic['up']:.2f}",
        f"{traffic['down']:.2f}",
        f"{traffic['last_down']:.2f}",
        "needs individuals" if facts["needs_individuals"] else "1 pass",
        "yes" if facts["promises_exactness"] else "no",
    ]


def _distance(facts: Facts) -> str:
    if facts["promises_exactness"]:
        return f"{facts['inexact']:.0e}"
    return f"{100 * facts['inexact_mean']:.1f} % (worst {100 * facts['inexact']:.1f} %)"


def _setting(facts: Facts) -> str:
    training = facts["training"]
    return f"{training['learning_rate']:g} / {training['clip_norm_l2']:g} / {training['local_steps']}"


def markdown(cells: list[list[str]]) -> str:
    rule = ["---"] * len(cells[0])
    return "\n".join(f"| {' | '.join(row)} |" for row in [cells[0], rule, *cells[1:]])


def filled(page: str, results: Results) -> str:
    """The page with each marked table replaced."""
    for name, cells in tables(results).items():
        mark = re.compile(rf"(<!--results:{name}-->\n).*?(<!--/results-->)", re.DOTALL)
        body = markdown(cells)
        page, count = mark.subn(lambda found, body=body: f"{found[1]}{body}\n{found[2]}", page)
        if count != 1:
            raise SystemExit(f"Expected one table results:{name} in {PAGE}, got {count}; add its marks.")
    return re.sub(
        r"(<!--value:([^|]+)\|([^|]+)\|([^>|]+)-->).*?(<!--/value-->)",
        lambda found: f"{found[1]}{_value(results, *found.group(2, 3, 4))}{found[5]}",
        page,
    )


def _value(results: Results, name: str, epsilon: str, key: str) -> str:
    """A number of the text."""
    facts = results.at(name, None if epsilon == "none" else float(epsilon))
    if key.startswith("minus "):
        return difference(facts, key.removeprefix("minus "))
    return f"{100 * facts['inexact_mean']:.0f} %" if key == "naive" else f"{facts[key]:.1f}"


def draw(results: Results) -> None:
    """Accuracy of each rule, and its paired difference to naive averaging."""
    mpl.rcParams.update({"font.family": "DejaVu Sans", "font.size": 9.5, "svg.hashsalt": "medfed"})
    drawn = [epsilon for epsilon in results.epsilons if epsilon in COLOURS]
    last = drawn[-1]
    rules = [name for name in results.of_one_model if name not in REFERENCE_ROWS]
    rules.sort(key=lambda name: results.at(name, last)["accuracy"])
    references = [name for name in REFERENCE_ROWS if name in results.names]
    references.sort(key=lambda name: results.at(name, last)["accuracy"])
    names = references + rules
    figure, (left, right) = plt.subplots(1, 2, figsize=(9.6, 0.36 * len(names) + 1.7), sharey=True, width_ratios=(3, 2))
    position = {name: index + (0.7 if name in rules else 0.0) for index, name in enumerate(names)}
    for epsilon in drawn:
        style: Facts = {"color": COLOURS[epsilon], "marker": MARKERS[epsilon], "linestyle": "none", "zorder": 3}
        values = [results.at(name, epsilon)["accuracy"] for name in names]
        left.plot(values, [position[name] for name in names], markersize=6, label=epsilon_text(epsilon), **style)
        for name in names:
            seeds = results.at(name, epsilon)["seeds"]
            left.plot(seeds, [position[name]] * len(seeds), "|", color=COLOURS[epsilon], alpha=0.45, markersize=6)
    private = [epsilon for epsilon in drawn if epsilon is not None]
    compared = [name for name in names if name != "fedit"]
    for offset, epsilon in zip((0.15, -0.15), private, strict=True):
        found = [results.at(name, epsilon)["difference"]["fedit"] for name in compared]
        right.errorbar(
            [one["mean"] for one in found],
            [position[name] + offset for name in compared],
            xerr=[one["half_interval"] for one in found],
            fmt=MARKERS[epsilon],
            color=COLOURS[epsilon],
            markersize=4.5,
            elinewidth=1.2,
            capsize=0,
        )
    right.axvline(0, color=INK, linewidth=0.9)
    left.set_yticks([position[name] for name in names], names)
    left.set_xlabel("accuracy over all styles, % (ticks: seeds)")
    right.set_xlabel("points over fedit, same seeds, 95 % interval")
    border = (position[rules[0]] + position[references[-1]]) / 2
    for axis in (left, right):
        axis.axhline(border, color=QUIET, linewidth=0.7, linestyle=(0, (4, 3)))
        axis.grid(axis="x", color="#e3e7ea", linewidth=0.7)
        axis.set_axisbelow(True)
        axis.tick_params(length=0, colors=INK)
        for side in ("top", "right", "left"):
            axis.spines[side].set_visible(False)
        axis.spines["bottom"].set_color(QUIET)
    figure.legend(loc="upper left", ncols=len(drawn), frameon=False, bbox_to_anchor=(0.14, 1.0), handletextpad=0.2)
    figure.tight_layout(rect=(0, 0, 1, 0.95))
    figure.savefig(FIGURE.with_suffix(".svg"), metadata={"Date": None})
    figure.savefig(FIGURE.with_suffix(".png"), dpi=200)
    plt.close(figure)


def main() -> None:
    mpl.use("Agg")
    results = Results()
    PAGE.write_text(filled(PAGE.read_text(), results))
    draw(results)


if __name__ == "__main__":
    main()
