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


RUNS = [printed(name)["run"] for name in ("audit-run", "audit-lesions")]


def interval(one: dict[str, Any]) -> str:
    return f"{one['auroc']:.2f} ({one['low']:.2f} to {one['high']:.2f})"


def test_audits_of_two_runs_are_what_the_command_wrote() -> None:
    expected = [
        [
            ATTACKS[brain["attack"]],
            f"{brain['delta']:g}",
            f"{brain['claimed']:.2f}",
            f"{brain['epsilon']:.2f}",
            f"{lesions['epsilon']:.2f}",
        ]
        for brain, lesions in zip(*(run["bounds"] for run in RUNS), strict=True)
    ]
    assert rows_of("audit-runs") == expected
    minutes = [str(round(run["wall_s"] / 60)) for run in RUNS]
    assert f"took {minutes[0]} and {minutes[1]} minutes" in PAGE


def test_membership_is_shown_as_it_was_written() -> None:
    columns = [
        [interval(one) for one in (*run["membership"], *run["shadows"]["released"], *run["shadows"]["alone"])]
        for run in RUNS
    ]
    assert [row[1:] for row in rows_of("audit-membership")] == [list(row) for row in zip(*columns, strict=True)]


def test_shadows_beside_claims_are_what_the_command_printed() -> None:
    results = printed("audit-shadows")
    expected = [
        [
            claim,
            *(interval(result["attacks"][attack]) for attack in ("loss", "likelihood-ratio")),
            f"{result['attacks']['likelihood-ratio']['found_at_0.01']:.3f}",
        ]
        for claim, result in results.items()
    ]
    assert rows_of("audit-shadows") == expected
    assert f"{sum(result['cpu_seconds'] for result in results.values())} s of processor" in PAGE


def test_searches_are_shown_as_they_were_written_and_none_beats_the_mean_image() -> None:
    columns = []
    for run in RUNS:
        found = run["adapter_inversion"]
        assert all(one["ssim"] < found["mean_ssim"] for one in found["searches"])  # "no search found anything"
        places = f"of {found['num_images']}"
        columns.append(
            [f"{one['cosine']:.2f}, {one['ssim']:.2f}, {one['rank']} {places}" for one in found["searches"]]
            + [f"SSIM {found['mean_ssim']:.2f}"]
        )
    assert [row[2:] for row in rows_of("audit-inversion")] == [list(row) for row in zip(*columns, strict=True)]


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
