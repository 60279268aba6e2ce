"""Nothing grows while a consortium of real processes works: the soak benchmark, short."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parents[2]


@pytest.mark.slow
@pytest.mark.process
def test_forty_rounds_with_three_sites_gain_no_files_and_little_memory(tmp_path: Path) -> None:
    script = REPOSITORY / "benchmarks" / "deployment_soak.py"
    done = subprocess.run(
        [sys.executable, str(script), str(tmp_path / "soak"), "--rounds", "40", "--sites", "3", "--json"],
        capture_output=True,
        text=True,
        timeout=280,
    )
    assert done.stdout, done.stderr
    rows = {row["name"]: row["value"] for row in json.loads(done.stdout)["rows"]}
    assert rows["rounds"] == 40
    for process in ("server", "site-1", "site-2", "site-3"):
        assert rows[f"{process}: files gained"] <= 0
        assert rows[f"{process}: threads gained"] <= 0
    for process in ("superlink", "server", "site-1", "site-2", "site-3"):
        assert rows[f"{process}: files, most"] < 64  # Flower's service keeps a changing number of its database open
        assert rows[f"{process}: growth after warm-up"] <= 8
        assert rows[f"{process}: resident memory, most"] > 50  # it was looked at
