"""The page about strategies on the real backbone shows what its command printed."""

import ast
import json
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs/benchmarks/strategies-brain.md").read_text()
RESULT = json.loads((ROOT / "docs/results/strategies-brain.json").read_text())


def table_of(name: str) -> list[list[str]]:
    (text,) = re.findall(rf"<!--results:{name}-->(.*?)<!--/results-->", PAGE, re.DOTALL)
    return [[cell.strip() for cell in row.strip("|").split("|")] for row in text.strip().splitlines()[2:]]


def test_rows_are_those_that_the_command_printed() -> None:
    assert table_of("brain") == [
        [
            "no noise" if row["epsilon"] is None else f"{row['epsilon']:g}",
            row["name"],
            f"{row['mean_of_sites']:.3f}",
            f"{row['difference']:+.3f}",
            f"{row['worst_site']:.3f}",
            str(row["num_seeds"]),
        ]
        for row in RESULT["rows"]
    ]


@pytest.mark.parametrize(
    ("table", "epsilon", "chosen"), [("tuning-8", 8.0, "CHOSEN"), ("tuning-2", 2.0, "CHOSEN_AT_2")]
)
def test_learning_rates_are_those_that_tuning_found_best(table: str, epsilon: float, chosen: str) -> None:
    told = {row[0]: row[1:] for row in table_of(table)}
    source = (ROOT / "benchmarks/strategies_brain.py").read_text()
    rates, best = (
        ast.literal_eval(re.findall(rf"^{name} = (.*)$", source, re.MULTILINE)[0]) for name in ("RATES", chosen)
    )
    assert told.keys() == best.keys()
    for rule, rate in best.items():
        scores = {rates[epsilon][place]: float(cell) for place, cell in enumerate(told[rule]) if cell}
        assert scores[rate] == max(scores.values()), rule
