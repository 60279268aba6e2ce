"""The distribution holds exactly our packages, and nobody else's have the same names."""

import subprocess
import sys
import zipfile
from importlib.metadata import distribution, packages_distributions
from pathlib import Path

import pytest

PACKAGES = ("medfed", "privacy", "strategies", "server", "client", "simulation")
ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("package", PACKAGES)
def test_import_name_belongs_to_this_distribution_alone(package: str) -> None:
    owners = set(packages_distributions().get(package, ["medfed"]))  # an editable install lists none
    assert owners == {"medfed"}


@pytest.mark.parametrize("package", PACKAGES)
def test_import_name_resolves_to_this_tree(package: str) -> None:
    found = __import__(package)
    assert Path(found.__path__[0]).resolve() == ROOT / package


def test_every_command_of_the_entry_points_loads() -> None:
    entries = distribution("medfed").entry_points.select(group="medfed.commands")
    assert {"simulate", "report", "study"} <= {entry.name for entry in entries}
    for entry in entries:
        assert entry.load() is not None


@pytest.mark.parametrize("arguments", [["--help"], ["site", "health", "/nowhere"], ["server", "health", "/nowhere"]])
def test_what_is_asked_often_does_not_import_torch(arguments: list[str]) -> None:
    """A health check runs every half minute in every container; torch takes two seconds of a processor."""
    code = f"import sys, medfed.cli\ntry: medfed.cli.main({arguments})\nexcept SystemExit: pass\nassert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)


def test_wheel_holds_all_packages_and_no_tests(tmp_path: Path) -> None:
    subprocess.run(
        [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(tmp_path), str(ROOT)],
        check=True,
        capture_output=True,
    )
    (wheel,) = tmp_path.glob("*.whl")
    names = zipfile.ZipFile(wheel).namelist()
    tops = {name.split("/")[0] for name in names if ".dist-info" not in name}
    assert tops == set(PACKAGES)
    assert {f"{package}/py.typed" for package in PACKAGES} <= set(names)
    assert "server/report.html" in names
