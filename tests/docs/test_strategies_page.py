"""The page about strategies shows what its command printed."""

import importlib.util
import json
import math
import re
import statistics
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs/benchmarks/strategies.md").read_text()
RESULT = json.loads((ROOT / "docs/results/strategies-digits.json").read_text())
ARMS: dict[tuple[str, float | None], dict[str, Any]] = {(arm["name"], arm["epsilon"]): arm for arm in RESULT["arms"]}
EPSILONS = list(dict.fromkeys(epsilon for _, epsilon in ARMS))
STUDENT_T4 = 2.776  # 97.5 % point of Student's t with four degrees of freedom


@pytest.fixture(scope="module")
def page_script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("strategies_page", ROOT / "benchmarks/strategies_page.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["strategies_page"] = module
    spec.loader.exec_module(module)
    return module


def table_of(name: str) -> list[list[str]]:
    """Cells of the rows of a marked table, below its head."""
    (text,) = re.findall(rf"<!--results:{name}-->(.*?)<!--/results-->", PAGE, re.DOTALL)
    return [[cell.strip() for cell in row.strip("|").split("|")] for row in text.strip().splitlines()[2:]]


def paired(name: str, other: str, epsilon: float | None) -> str:
    mine, others = ARMS[name, epsilon]["seeds"], ARMS[other, epsilon]["seeds"]
    found = [a - b for a, b in zip(mine, others, strict=True)]
    half_interval = STUDENT_T4 * statistics.stdev(found) / math.sqrt(len(found))
    return f"{statistics.fmean(found):+.1f} ± {half_interval:.1f}"


def test_accuracies_follow_from_the_seeds_that_the_command_printed() -> None:
    rows = table_of("accuracy")
    assert {name for name, *_ in rows} == {name for name, _ in ARMS} - {"fedsa", "local only"}
    for name, *cells in rows:
        for epsilon, cell in zip(EPSILONS, cells, strict=True):
            mean = statistics.fmean(ARMS[name, epsilon]["seeds"])
            assert cell == f"{mean:.1f} ({paired(name, 'fedit', epsilon)})", (name, epsilon)


def test_differences_to_twin_fresh_follow_from_the_seeds() -> None:
    for name, *cells in table_of("twin-fresh"):
        assert cells == [paired(name, "twin-fresh", epsilon) for epsilon in EPSILONS]


def test_all_tables_are_what_the_command_printed(page_script: ModuleType) -> None:
    results = page_script.Results()
    assert page_script.filled(PAGE, results) == PAGE
    assert set(page_script.tables(results)) == set(re.findall(r"<!--results:([\w-]+)-->", PAGE))


def test_every_promise_was_kept_when_it_was_measured() -> None:
    assert [row for row in RESULT["rows"] if not row["holds"]] == []
    assert all(len(arm["seeds"]) == 5 for arm in ARMS.values())


def test_numbers_in_the_text_are_those_of_the_tables() -> None:
    """Each marked number of the text, `<!--value:arm|epsilon|key-->number<!--/value-->`, is the JSON's."""
    marked = re.findall(r"<!--value:([^|]+)\|([^|]+)\|([^>|]+)-->(.*?)<!--/value-->", PAGE)
    assert len(marked) >= 8
    for name, epsilon, key, shown in marked:
        arm = ARMS[name, None if epsilon == "none" else float(epsilon)]
        if key.startswith("minus "):
            assert shown == paired(name, key.removeprefix("minus "), arm["epsilon"])
        elif key == "naive":
            assert shown == f"{100 * arm['inexact_mean']:.0f} %"
        else:
            assert shown == f"{arm[key]:.1f}"


def test_figure_is_there_in_both_forms() -> None:
    for suffix in (".svg", ".png"):
        assert (ROOT / f"docs/benchmarks/strategies-digits{suffix}").stat().st_size > 10_000
    assert "strategies-digits.png" in PAGE or "strategies-digits.svg" in PAGE
