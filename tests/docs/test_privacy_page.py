"""The page about privacy says what the program does."""

import json
import re
import tomllib
from pathlib import Path

from medfed.study import PrivacyConfig, StudyConfig

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs/privacy.md").read_text()


def test_section_of_the_page_is_that_of_the_example() -> None:
    (text,) = re.findall(r"```toml\n(.*?)```", PAGE, re.DOTALL)
    study = StudyConfig.model_validate(tomllib.loads((ROOT / "examples/brain-structures-private.toml").read_text()))
    assert PrivacyConfig.model_validate(tomllib.loads(text)["privacy"]) == study.privacy


def test_utility_is_what_the_command_printed() -> None:
    result = json.loads((ROOT / "docs/results/private-utility.json").read_text())
    for page in (PAGE, (ROOT / "README.md").read_text()):
        (table,) = re.findall(r"<!--results:private-utility-->(.*?)<!--/results-->", page, re.DOTALL)
        rows = {row.split("|")[1].strip(): row for row in table.strip().splitlines()}
        for label, values in result.items():
            for part in values.values():
                shown = f"{part['mean']:.3f} ({part['smallest']:.3f}-{part['largest']:.3f})"
                assert shown in rows[label], (label, shown)


def test_costs_are_what_the_command_printed() -> None:
    result = json.loads((ROOT / "docs/results/dp.json").read_text())
    (table,) = re.findall(r"<!--results:dp-->(.*?)<!--/results-->", PAGE, re.DOTALL)
    shown = [float(row.split("|")[2]) for row in table.strip().splitlines()[2:]]
    printed = [row["value"] for row in result["rows"] if row["unit"] in ("wall ratio", "ratio")]
    assert len(shown) == 6
    assert all(any(abs(value - number) <= 0.051 for number in printed) for value in shown)
    assert all(row["holds"] for row in result["rows"])
