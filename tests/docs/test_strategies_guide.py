"""The strategies page says what the registry holds, and the rule on it runs."""

import re
import tomllib
from collections.abc import Callable
from pathlib import Path

import pytest

from medfed.study import StudyConfig
from medfed.study_sections import StrategyConfig
from simulation.harness import simulate
from strategies import registry
from strategies.strategy import IndividualRule, Rule

PAGE = (Path(__file__).parents[2] / "docs/strategies.md").read_text()


def test_table_has_every_rule_with_what_its_class_says() -> None:
    (table,) = re.findall(r"<!--rules-->(.*?)<!--/rules-->", PAGE, re.DOTALL)
    rows = [[cell.strip() for cell in row.split("|")[1:-1]] for row in table.strip().splitlines()[2:]]
    told = {row[0].strip("`"): (row[2], row[3]) for row in rows}
    assert told == {
        rule.name: ("yes" if rule.exact else "no", "no" if issubclass(rule, IndividualRule) else "yes")
        for rule in registry.RULES.values()
    }
    for alias in registry.RULES.keys() - told.keys():
        assert f"`{alias}`" in PAGE


def test_sections_of_a_study_on_the_page_are_valid() -> None:
    for text in re.findall(r"```toml\n(.*?)```", PAGE, re.DOTALL):
        StrategyConfig.model_validate({"name": "fedit", **tomllib.loads(text)["strategy"]})


@pytest.mark.usefixtures("without_pictures")
def test_rule_on_the_page_trains_a_federation(
    make_study: Callable[..., StudyConfig],
    study_file: Callable[[StudyConfig], Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    (text,) = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)
    assert len(text.splitlines()) <= 30
    found: dict[str, type[Rule]] = {}
    exec(compile(text, "docs/strategies.md", "exec"), found)
    monkeypatch.setitem(registry.RULES, "b-then-a", found["BThenA"])
    study = make_study(strategy={"name": "b-then-a"}, rounds={"num_rounds": 11})
    run = simulate(study_file(study), out=tmp_path, workers=0, baselines=False)
    assert run.summary.rounds == 11
