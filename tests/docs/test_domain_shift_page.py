"""docs/domain-shift.md names every family, key and preset there is, and the numbers that the commands printed."""

import json
import re
from pathlib import Path

import pytest

from medfed import shift_profile
from medfed.section import Section
from medfed.shift_presets import PRESETS
from medfed.shift_profile import QuantityShift, ShiftProfile
from medfed.study import read_study
from simulation.shift.labels import PREVALENCE

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs/domain-shift.md").read_text()
RESULTS = ROOT / "docs/results"


def rows() -> dict[str, list[str]]:
    """Cells of every table row of the page, by the first."""
    lines = [line for line in PAGE.splitlines() if line.startswith("|")]
    return {cells[0]: cells[1:] for cells in ([cell.strip() for cell in line.strip("|").split("|")] for line in lines)}


def test_every_family_and_every_key_is_on_the_page() -> None:
    for family in set(ShiftProfile.model_fields) - {"presets"}:
        assert f"`{family}`" in PAGE or f"`{family} =" in PAGE or f"`{family} = {{" in PAGE, family
    sections = [
        found for found in vars(shift_profile).values() if isinstance(found, type) and issubclass(found, Section)
    ]
    keys = {key for section in sections for key in section.model_fields} - set(ShiftProfile.model_fields)
    missing = [key for key in sorted(keys) if not re.search(rf"\b{key}\b", PAGE)]
    assert not missing, missing
    assert set(QuantityShift.model_fields) <= keys


def test_every_preset_is_on_the_page_with_its_families() -> None:
    found = rows()
    for name, preset in PRESETS.items():
        assert found[f"`{name}`"] == [preset.description, ", ".join(preset.profile.families)]


def test_prevalence_table_is_the_one_that_is_used() -> None:
    found = rows()
    for finding, sources in PREVALENCE.items():
        assert [float(cell) / 100 for cell in found[f"`{finding}`"]] == pytest.approx(list(sources.values()))


def test_scores_of_the_example_are_those_the_command_printed() -> None:
    result = json.loads((RESULTS / "brain-under-shift.json").read_text())
    study = read_study(ROOT / "examples/brain-under-shift.toml")
    assert list(result["sites"]) == list(study.site_names)
    found = rows()
    for site, metrics in result["sites"].items():
        assert found[site] == [f"{value:.3f}" for value in metrics[result["primary"]].values()]
    assert found["mean of sites"] == [f"{value:.3f}" for value in result["mean"].values()]
    caudate = result["sites"]["rural"]["dice/caudate-left"]
    assert f"alone it reaches {caudate['local_only']:.3f}" in PAGE
    assert f"with the others {caudate['federated']:.3f}" in PAGE


def test_measured_shift_of_the_example_is_what_the_command_printed() -> None:
    measured = json.loads((RESULTS / "brain-under-shift-measured.json").read_text())
    assert measured["study_digest"] == read_study(ROOT / "examples/brain-under-shift.toml").digest
    pairs = {" and ".join(pair["sites"]): pair for pair in measured["pairs"]}
    shown = {name.split(" (")[0]: cells for name, cells in rows().items() if " and " in name}
    shown = {name: cells for name, cells in shown.items() if name in pairs}
    assert len(shown) == 4
    for name, cells in shown.items():
        assert cells == [f"{pairs[name]['mmd_squared']:.3f}", f"{pairs[name]['p_value']:.3f}"]
