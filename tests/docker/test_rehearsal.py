"""The rehearsal without an engine: the script is sound, and what it types are the README's commands, all of them."""

import re
import subprocess
from pathlib import Path

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "docker" / "rehearse.sh"


def typed() -> list[str]:
    """What the script finds in the README, by the script's own expression."""
    found = re.search(r"^sed -n '([^']+)' \"\$root/docker/README\.md\"", SCRIPT.read_text(), re.MULTILINE)
    assert found
    command = ["sed", "-n", found[1], str(ROOT / "docker" / "README.md")]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout.splitlines()


def test_script_is_bash() -> None:
    subprocess.run(["bash", "-n", str(SCRIPT)], check=True)


def test_commands_are_those_of_the_consortium_from_the_first_to_the_last() -> None:
    commands = typed()
    assert commands[0].startswith("export MEDFED_DEMO=")
    assert " server run /consortium " in commands[-1]
    assert commands == [line for line in commands if line and not line.startswith(("#", "`"))]
    assert sum(line.startswith("docker compose ") for line in commands) == 7
    assert sum(line.startswith("for s in north east south;") for line in commands) == 2


def test_script_knows_no_step_of_the_images_or_of_the_consortium() -> None:
    text = SCRIPT.read_text()
    for step in (
        "pip install torch",
        "constraints.txt",
        "COPY",
        "provision",
        "cohort write",
        "site init",
        "study sign",
    ):
        assert step not in text
