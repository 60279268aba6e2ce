"""A row keeps its target or says that it does not."""

import math

import pytest

from simulation.bench.rows import Row, printed, table, this_machine


@pytest.mark.parametrize(
    ("row", "holds"),
    [
        pytest.param(Row("a", 1.1, "ratio", 1.1), True, id="at the upper bound"),
        pytest.param(Row("a", 1.11, "ratio", 1.1), False, id="above it"),
        pytest.param(Row("a", 4.0, "ratio", 4.0, at_least=True), True, id="at the lower bound"),
        pytest.param(Row("a", 3.9, "ratio", 4.0, at_least=True), False, id="below it"),
        pytest.param(Row("a", 99.0, "ratio"), True, id="no target"),
        pytest.param(Row("a", True, "", True), True, id="true as it must be"),
        pytest.param(Row("a", False, "", True), False, id="not true"),
        pytest.param(Row("a", math.nan, "ratio", 1.1), False, id="NaN against an upper bound"),
        pytest.param(Row("a", math.nan, "ratio", 1.1, at_least=True), False, id="NaN against a lower bound"),
    ],
)
def test_row_holds_when_its_target_is_kept(row: Row, holds: bool) -> None:
    assert row.holds is holds


def test_printed_object_has_the_documented_keys() -> None:
    facts = printed([Row("a", 1.0, "ratio", 2.0)], this_machine())
    assert facts["rows"] == [{"name": "a", "value": 1.0, "unit": "ratio", "target": 2.0, "holds": True}]
    assert set(facts) == {"rows", "machine", "versions"}
    assert {"python", "torch", "opacus"} <= set(facts["versions"])  # type: ignore[call-overload]


def test_table_shows_which_way_a_target_bounds() -> None:
    bounds = table([Row("a", 1.0, "", 2.0), Row("b", 5.0, "", 4.0, at_least=True), Row("c", 1.0, "")]).columns[3]
    assert list(bounds.cells) == ["≤ 2", "≥ 4", ""]
