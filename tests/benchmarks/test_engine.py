"""The engine benchmark runs, says what it measured, and the apps compute what a plain loop computes."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "engine.py"


@pytest.mark.exhaustive
@pytest.mark.process
def test_small_run_agrees_with_the_plain_loop() -> None:
    done = subprocess.run(
        [sys.executable, str(SCRIPT), "--json", "--quick"], capture_output=True, text=True, timeout=280
    )
    assert done.returncode == 0, done.stdout + done.stderr
    printed = json.loads(done.stdout)
    rows = {row["name"]: row for row in printed["rows"]}
    assert all({"name", "value", "unit", "target", "holds"} == set(row) for row in rows.values())
    for workload in ("vit16q", "tiny100"):
        assert rows[f"{workload} bit-identical for 0, 1, 2 workers"]["value"] is True
        assert rows[f"{workload} parameters, relative distance to plain"]["value"] <= 1e-6
        assert rows[f"{workload} serial / plain"]["value"] > 0
    assert printed["machine"]["cores"] >= 1
    assert "torch" in printed["versions"]
