"""Pages for hospitals: every command exists with the options that are named, and every message is one that is said."""

import re
import shlex
from pathlib import Path

import click
import pytest

from medfed.cli import root
from server.certificates import AUTHORITY_VALIDITY, RENEW_BEFORE, SERVER_VALIDITY
from server.metrics_endpoint import StatusCollector
from server.run_status import RunStatus, SiteStatus, now_text

ROOT = Path(__file__).parents[2]
PAGES = [
    *(ROOT / "docs" / name for name in ("operations.md", "for-the-data-protection-officer.md")),
    *(ROOT / "docs/for-the-clinician-researcher.md", ROOT / "docker/README.md", ROOT / "README.md"),
]
OPERATIONS = (ROOT / "docs/operations.md").read_text()
PACKAGES = ("medfed", "privacy", "server", "client")


def command_lines(text: str) -> list[list[str]]:
    """Words after ``medfed`` of every command of a page, of blocks and of the text."""
    blocks = re.findall(r"```(?:bash|ini|)\n(.*?)```", text, re.DOTALL)
    joined = "\n".join(blocks).replace("\\\n", " ")
    found = re.findall(r"(?<![\w/.-])(?:/opt/medfed/bin/)?medfed ([a-z][^\n;|&>#]*)", joined)
    found += re.findall(
        r"(?:runner|coordinator|\$s|medfed-\w+:0\.1\.0) ((?:server|site|study|cohort|provision) [^\n;]*)", joined
    )
    inline = re.sub(r"```.*?```", "", text, flags=re.DOTALL)
    found += re.findall(r"`medfed ([a-z][^`]*)`", inline)
    return [shlex.split(line.rstrip(")")) for line in found]


def resolve(words: list[str]) -> tuple[click.Command, list[str]]:
    """The command that the words name, and what is left of them."""
    context = click.Context(root)
    command: click.Command | None = root
    rest = list(words)
    while rest and isinstance(command, click.Group) and not rest[0].startswith("-"):
        found = command.get_command(context, rest[0])
        assert found is not None, words
        command, rest = found, rest[1:]
    assert command is not None
    return command, rest


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_every_command_exists_with_the_options_that_are_named(page: Path) -> None:
    lines = command_lines(page.read_text())
    assert len(lines) > 5
    for words in lines:
        command, rest = resolve(words)
        known = {name for parameter in command.params for name in parameter.opts} | {"--help"}
        for option in (word for word in rest if word.startswith("--")):
            assert option.split("=")[0] in known, words


def test_an_option_that_is_none_is_found() -> None:
    command, rest = resolve(["site", "init", "--epsilonn", "3"])
    assert rest == ["--epsilonn", "3"]
    assert "--epsilonn" not in {name for parameter in command.params for name in parameter.opts}


def test_every_symptom_is_a_message_that_the_code_says() -> None:
    table = OPERATIONS.split("## What to do when")[1]
    says = [row.split("|")[1].strip(" `") for row in table.splitlines() if row.startswith("| `")]
    source = "\n".join(path.read_text() for package in PACKAGES for path in (ROOT / package).rglob("*.py"))
    source = re.sub(r'"\s*\n\s*f?"', "", source)
    assert len(says) > 12
    for message in says:
        assert message in source, message


def test_numbers_of_the_operations_page_are_those_of_the_code() -> None:
    assert f"| server certificate | {SERVER_VALIDITY.days} days |" in OPERATIONS
    assert f"| authority | {AUTHORITY_VALIDITY.days} days |" in OPERATIONS
    assert f"{RENEW_BEFORE.days} days before its end" in OPERATIONS
    status = RunStatus(
        study="s",
        study_digest="",
        consortium="c",
        num_rounds=1,
        started_at=now_text(),
        updated_at=now_text(),
        sites={"a": SiteStatus(epsilon=1.0)},
    )
    gauges = {metric.name for metric in StatusCollector(lambda: status).collect()}
    named = set(re.findall(r"medfed_[a-z_]+", OPERATIONS))
    assert named
    assert named <= gauges
