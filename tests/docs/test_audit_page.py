"""The page about the audit shows what the commands printed."""

import json
import re
from pathlib import Path
from typing import Any

from server.audit_result import ATTACKS

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs/audit.md").read_text()


def rows_of(name: str) -> list[list[str]]:
    (table,) = re.findall(rf"<!--results:{name}-->(.*?)<!--/results-->", PAGE, re.DOTALL)
    return [[cell.strip() for cell in row.split("|")[1:-1]] for row in table.strip().splitlines()[2:]]


def printed(name: str) -> Any:
    return json.loads((ROOT / f"docs/results/{name}.json").read_text())


def test_bounds_beside_claims_are_what_the_command_printed() -> None:
    expected = []
    for name, result in printed("audit").items():
        bound = result["bounds"]["likelihood"]
        assert bound["claimed"] is None or bound["epsilon"] < bound["claimed"]
        expected.append(
            [
                "none" if name == "none" else f"{bound['claimed']:.2f}",
                f"{result['noise_multiplier']:.4f}",
                f"{bound['epsilon']:.2f}",
                f"{bound['correct']} of {bound['guessed']}",
            ]
        )
    assert rows_of("audit") == expected
    assert f"took {sum(result['seconds'] for result in printed('audit').values())} s" in PAGE


def test_audit_of_a_run_is_what_the_command_wrote() -> None:
    run = printed("audit-run")["run"]
    expected = [
        [ATTACKS[bound["attack"]], f"{bound['delta']:g}", f"{bound['claimed']:.2f}", f"{bound['epsilon']:.2f}"]
        for bound in run["bounds"]
    ]
    assert rows_of("audit-run") == expected
    for one in run["membership"]:
        assert re.search(rf"{one['auroc']:.2f}\s+\({one['low']:.2f} to {one['high']:.2f}\)", PAGE), (
            "the page shows other areas"
        )


def test_every_broken_mechanism_is_refuted_by_what_the_page_says() -> None:
    shown = rows_of("audit-broken")
    results = printed("audit-broken")
    words = {attack: ATTACKS[attack].removeprefix("many short runs: ") for attack in ATTACKS}
    assert [row[0] for row in shown] == [result["mechanism"] for result in results]
    for row, result in zip(shown, results, strict=True):
        by = next((attack for attack in words if words[attack] == row[2]), None)
        assert (by is None) == (not result["refuted_by"]) == result["mechanism"].startswith("as it is")
        assert by is None or by in result["refuted_by"]
        assert row[1] == f"{result['claimed']:.2f}"
        assert row[3] == f"{result['bounds'][by or 'likelihood']:.2f}"
