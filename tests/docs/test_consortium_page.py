"""The page about shared noise shows what its commands printed."""

import json
import math
import re
import statistics
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs/consortium.md").read_text()
STUDENT_T4 = 2.776  # 97.5 % point of Student's t with four degrees of freedom


def results(name: str) -> Any:
    return json.loads((ROOT / f"docs/results/{name}.json").read_text())["rows"]


def table_of(name: str) -> list[list[str]]:
    """Cells of the rows of a marked table, below its head."""
    (text,) = re.findall(rf"<!--results:{name}-->(.*?)<!--/results-->", PAGE, re.DOTALL)
    return [[cell.strip() for cell in row.strip("|").split("|")] for row in text.strip().splitlines()[2:]]


def difference(row: dict[str, Any]) -> str:
    return f"{row['difference']:+.1f} ± {row['half_interval']:.1f}"


def test_digits_are_what_the_command_printed() -> None:
    rows = {(row["name"], row["epsilon"]): row for row in results("consortium-digits") if row["kind"] == "arm"}
    table = table_of("digits")
    assert {name for name, *_ in table} == {name for name, _ in rows}
    for name, *cells in table:
        for epsilon, cell in zip((8.0, 2.0, 1.0), cells, strict=True):
            row = rows[name, epsilon]
            shown = f"{row['global']:.1f}" + ("" if name == "pooled" else f" ({difference(row)})")
            assert cell == shown, (name, epsilon)


def test_own_mix_is_what_the_command_printed() -> None:
    rows = {(row["name"], row["epsilon"]): row for row in results("consortium-digits") if row["kind"] == "arm"}
    for name, *cells in table_of("digits-own"):
        for epsilon, cell in zip((8.0, 2.0, 1.0), cells, strict=True):
            assert cell == f"{rows[name, epsilon]['own']:.1f} / {rows[name, epsilon]['worst']:.1f}", (name, epsilon)


def test_variants_are_what_the_command_printed() -> None:
    rows = {(row["name"], row["epsilon"]): row for row in results("consortium-digits") if row["kind"] == "variant"}
    table = table_of("variants")
    assert {name for name, *_ in table} == {name for name, _ in rows}
    for name, *cells in table:
        assert cells == [
            f"{rows[name, epsilon]['global']:.1f}" if name == "Gaussian stand-in" else difference(rows[name, epsilon])
            for epsilon in (8.0, 2.0, 1.0)
        ]


def test_differences_follow_from_what_the_command_printed() -> None:
    rows = {(row["name"], row["epsilon"]): row["seeds"] for row in results("consortium-digits")}
    table = table_of("paired")
    assert len(table) == 7
    for label, *cells in table:
        name, other = label.split(", minus ")
        name = name.removesuffix(", k_min 7") if name.startswith("Gaussian") else name
        for epsilon, cell in zip((8.0, 2.0, 1.0), cells, strict=True):
            pairs = zip(rows[name, epsilon], rows[other, epsilon], strict=True)
            found = [mine - others for mine, others in pairs]
            half_interval = STUDENT_T4 * statistics.stdev(found) / math.sqrt(len(found))
            assert cell == f"{statistics.fmean(found):+.1f} ± {half_interval:.1f}", (label, epsilon)


def test_brain_is_what_the_command_printed() -> None:
    rows = results("consortium-brain")
    assert table_of("brain") == [
        [
            f"{row['epsilon']:g}",
            row["name"],
            f"{row['mean_of_sites']:.3f}",
            f"{row['difference']:+.3f}",
            f"{row['worst_site']:.3f}",
            str(len(row["seeds"])),
        ]
        for row in rows
    ]


def test_excess_is_that_of_the_formula() -> None:
    rows = results("consortium-digits")
    for name, honest in (("consortium, k_min 7", 6), ("consortium, k_min 6", 5)):
        found = {row["excess"] for row in rows if row["name"] == name}
        assert found == {math.sqrt(8 / honest)}
        assert f"{math.sqrt(8 / honest):.3f}" in PAGE
