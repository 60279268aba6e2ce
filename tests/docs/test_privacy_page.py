"""The page about privacy says what the program does."""

import json
import re
import tomllib
from pathlib import Path

from medfed.study import StudyConfig
from medfed.study_sections import PrivacyConfig

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
    rows = {row["name"]: row["value"] for row in result["rows"]}
    expected = [
        f"{rows['lora-exact step / non-private']:.2f}",
        f"{rows['vmap step / non-private']:.2f}",
        f"{rows['opacus-hooks step / non-private']:.2f}",
        f"{rows['opacus-ghost step / non-private']:.2f}",
        f"{rows['lora-exact (peak memory - 4 B P) / non-private']:.2f}",
        f"{rows['lora-exact step / cached: prefix cached, LoRA in the last quarter']:.1f}",
    ]
    assert [row.split("|")[2].strip() for row in table.strip().splitlines()[2:]] == expected
    assert all(row["holds"] for row in result["rows"])
