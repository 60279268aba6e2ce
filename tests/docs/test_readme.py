"""The documents say what the program does."""

import json
import re
import tomllib
from pathlib import Path

import pytest

from medfed.study import StudyConfig, read_study

ROOT = Path(__file__).parents[2]
PAGES = [
    ROOT / "README.md",
    *sorted((ROOT / "docs").rglob("*.md")),
    ROOT / "docker/README.md",
    ROOT / "benchmarks/README.md",
]


@pytest.mark.parametrize("page", PAGES, ids=lambda p: str(p.relative_to(ROOT)))
def test_every_relative_link_leads_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)#]+)\)", page.read_text()):
        if not target.startswith("http"):
            assert (page.parent / target).exists(), target


@pytest.mark.parametrize("page", PAGES, ids=lambda p: str(p.relative_to(ROOT)))
def test_every_make_target_and_command_exists(page: Path) -> None:
    from importlib.metadata import distribution

    makefile = (ROOT / "Makefile").read_text()
    commands = {entry.name for entry in distribution("medfed").entry_points.select(group="medfed.commands")}
    text = "\n".join(re.findall(r"```(?:bash|)\n(.*?)```", page.read_text(), re.DOTALL))
    for target in re.findall(r"\bmake ([a-z-]+)", text):
        assert re.search(rf"^{target}:", makefile, re.MULTILINE), target
    for command in re.findall(r"^medfed ([a-z]+)", text, re.MULTILINE):
        assert command in commands, command


def test_study_of_the_data_page_is_valid() -> None:
    (text,) = re.findall(r"```toml\n(.*?)```", (ROOT / "docs/your-own-data.md").read_text(), re.DOTALL)
    assert StudyConfig.model_validate(tomllib.loads(text)).site_names == ("north", "south")


@pytest.mark.parametrize("name", ["brain-structures", "lesion-classification"])
def test_results_of_the_readme_are_those_the_command_printed(name: str) -> None:
    result = json.loads((ROOT / f"docs/results/{name}.json").read_text())
    study = StudyConfig.model_validate(tomllib.loads((ROOT / f"examples/{name}.toml").read_text()))
    assert list(result["sites"]) == list(study.site_names)
    (table,) = re.findall(rf"<!--results:{name}-->(.*?)<!--/results-->", (ROOT / "README.md").read_text(), re.DOTALL)
    rows = {row.split("|")[1].strip(" *"): row for row in table.strip().splitlines()}
    for label, values in [("mean of sites", result["mean"]), ("worst site", result["worst_site"])]:
        for value in values.values():
            assert f"{value:.3f}" in rows[label], (label, value)
    for site, metrics in result["sites"].items():
        for value in metrics[result["primary"]].values():
            assert f"{value:.3f}" in rows[site], (site, value)


def test_examples_name_the_weights_that_the_packages_ship() -> None:
    from medfed.models.registry import backbone_of

    for path in (ROOT / "examples").glob("*.toml"):
        if path.name == "consortium.toml":  # who takes part, not what is done
            continue
        study = read_study(path)
        entry = backbone_of(study.backbone)
        assert entry.target_expression(study.adapter.targets)


def medfed_commands(text: str) -> list[str]:
    """Every command of the program in a shell text, one by one, without what the shell does with it."""
    text = re.sub(r" 2>\S+", "", text.replace('"', ""))
    return [found.strip() for found in re.findall(r"(?:^|; |do )\s*medfed ([^;&\n]*)", text, re.MULTILINE)]


def test_block_of_the_readme_and_the_script_do_the_same_in_ten_lines() -> None:
    (block,) = (b for b in re.findall(r"```bash\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL) if "sign" in b)
    assert len(block.strip().splitlines()) <= 10
    script = (ROOT / "examples/consortium.sh").read_text().split("trap stop EXIT\n")[1].split('\necho "run ')[0]
    for variable, value in (
        ("$study", "examples/three-hospitals.toml"),
        ("$consortium", "examples/consortium.toml"),
        ("$demo", "demo"),
        ("$site", "$s"),
    ):
        script = script.replace(variable, value)
    commands = medfed_commands(block)
    assert len(commands) == 12
    assert medfed_commands(script) == commands
    assert "examples/consortium.sh" in (ROOT / "Makefile").read_text()
