"""The page with both demos' tables shows what the command printed."""

import json
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs/evaluation.md").read_text()
PRINTED = json.loads((ROOT / "docs/results/evaluation.json").read_text())
COLUMNS = ("zero_shot", "local_only", "federated", "pooled")
METRICS = {
    "Dice": "dice",
    "95 % Hausdorff distance, mm": "hd95",
    "mean surface distance, mm": "surface-distance",
    "balanced accuracy": "balanced-accuracy",
    "AUROC": "auroc",
    "AUPRC": "auprc",
    "sensitivity at specificity 0.9": "sensitivity-at-specificity-0.9",
    "calibration error": "ece",
    "calibration error after scaling": "ece-scaled",
    "structures missed": "missed",
}


def rows_of(name: str) -> list[list[str]]:
    (table,) = re.findall(rf"<!--results:{re.escape(name)}-->(.*?)<!--/results-->", PAGE, re.DOTALL)
    return [[cell.strip() for cell in row.split("|")[1:-1]] for row in table.strip().splitlines()]


@pytest.mark.parametrize("run", PRINTED)
def test_every_metric_of_a_run_is_as_it_was_printed(run: str) -> None:
    printed = PRINTED[run]["over_sites"]
    rows = rows_of(run)[2:]
    assert {METRICS[row[0]] for row in rows} == set(printed)
    for name, *cells in rows:
        digits = 2 if name.endswith("mm") else 3
        of = printed[METRICS[name]]
        assert cells == [
            f"{of[one]['mean']:.{digits}f} ({of[one]['worst']:.{digits}f})" if one in of else "" for one in COLUMNS
        ]


def test_every_difference_by_joining_is_as_it_was_printed() -> None:
    shown = set()
    for names in re.findall(r"<!--results:joining:(.*?)-->", PAGE):
        runs = [run.strip() for run in names.split(";")]
        shown |= set(runs)
        header, _, *rows = rows_of(f"joining:{names}")
        assert header[1:] == runs
        for site, *cells in rows:
            joining = [PRINTED[run]["differences"][site]["joining"] for run in runs]
            assert cells == [f"{one['value']:+.3f} ({one['low']:+.3f} to {one['high']:+.3f})" for one in joining]
    assert shown == set(PRINTED)


def test_of_the_studies_without_privacy_no_site_gains_or_loses_clearly_by_joining() -> None:
    for run in ("brain", "lesions"):
        for differences in PRINTED[run]["differences"].values():
            assert differences["joining"]["low"] < 0 < differences["joining"]["high"]


def test_what_the_page_says_of_the_numbers_is_so() -> None:
    clipped, noised = (PRINTED[f"brain, {run}"]["over_sites"]["dice"] for run in ("clipped, no noise", "epsilon 8"))
    cost = [clipped["federated"][over] - noised["federated"][over] for over in ("mean", "worst")]
    assert "costs {:.3f} of mean Dice and {:.3f} at the worst site".format(*cost) in PAGE
    behind = [run["local_only"]["mean"] - run["federated"]["mean"] for run in (clipped, noised)]
    assert "by {:.3f} without noise and {:.3f} with".format(*behind) in PAGE
    pooling = [PRINTED["lesions"]["differences"][site]["pooling"] for site in ("east", "south")]
    assert all(one["low"] > 0 for one in pooling)
    assert "by {:.3f} and {:.3f}".format(*(one["value"] for one in pooling)) in PAGE
    for run in ("lesions, clipped, no noise", "lesions, epsilon 8"):
        assert PRINTED[run]["differences"]["south"]["joining"]["low"] > 0
