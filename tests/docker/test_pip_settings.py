"""pip's settings for a build that sees nothing of this machine: read as pip prints them, written as pip reads them."""

import importlib.util
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def pip_settings() -> ModuleType:
    spec = importlib.util.spec_from_file_location("pip_settings", ROOT / "docker" / "pip_settings.py")
    assert spec
    assert spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_environment_wins_over_files_as_in_pip(pip_settings: ModuleType) -> None:
    listing = ":env:.timeout='180'\n:env:.config-file='/x/pip.conf'\nglobal.timeout='9'\ninstall.timeout='8'\ninstall.pre='True'\n"
    assert pip_settings.read_settings(listing) == {"global": {"timeout": "180"}, "install": {"pre": "True"}}


def test_paths_are_found_in_every_form_and_an_index_with_the_files_beside_it(
    pip_settings: ModuleType, tmp_path: Path
) -> None:
    index, wheels, pinned = tmp_path / "my index/simple", tmp_path / "wheels", tmp_path / "c.txt"
    index.mkdir(parents=True)
    wheels.mkdir()
    pinned.touch()
    values = {
        "index-url": "https://index.example/simple",
        "extra-index-url": f"{index.as_uri()} {tmp_path.as_uri()}/gone/simple",
        "find-links": f"\n{wheels}\nrelative/wheels",
        "constraint": str(pinned),
        "timeout": "9",
    }
    assert pip_settings.named_paths({"global": values}) == [pinned, index.parent, wheels]


def test_what_is_written_is_what_pip_reads_back(
    pip_settings: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sections = {
        "global": {"find-links": "/a\n/b", "extra-index-url": "https://u:p%40@one.example https://two.example"},
        "install": {"pre": "True"},
    }
    file = tmp_path / "pip.conf"
    pip_settings.write_settings(sections, file)
    command = [sys.executable, "-I", "-m", "pip", "config", "list"]
    environment = {"PIP_CONFIG_FILE": str(file), "HOME": str(tmp_path), "PATH": "/usr/bin:/bin"}
    printed = subprocess.run(command, env=environment, capture_output=True, text=True)
    if printed.returncode:  # an environment without pip
        pytest.skip(printed.stderr)
    read = pip_settings.read_settings(printed.stdout)
    assert read["install"] == sections["install"]
    assert {name: read["global"][name].split() for name in sections["global"]} == {
        name: value.split() for name, value in sections["global"].items()
    }
