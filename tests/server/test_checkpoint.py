"""Checkpoints: whole or absent, and only for the run they belong to."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from medfed.adapter_manifest import AdapterManifest
from medfed.errors import CheckpointError
from server.checkpoint import CHECKPOINT, Checkpoint, metrics_line, read_checkpoint, write_checkpoint, write_durably

MANIFEST = AdapterManifest.of({"a": torch.zeros(5)}, method="lora", rank=1)
DIGEST = "d" * 64
STATE = Checkpoint(
    study_digest=DIGEST,
    scope="federated",
    round=3,
    adapter_P=torch.tensor([1.0, -0.0, 1e-38, 3.4e38, 0.1]),
    metrics=(metrics_line(event="train", loss=0.25),),
    weights={"north": 3.0},
)


def read(folder: Path, *, digest: str = DIGEST, scope: str = "federated") -> Checkpoint | None:
    return read_checkpoint(folder, MANIFEST, study_digest=digest, scope=scope)


def test_checkpoint_comes_back_bit_for_bit(tmp_path: Path) -> None:
    write_checkpoint(tmp_path, STATE)
    back = read(tmp_path)
    assert back is not None
    assert torch.equal(back.adapter_P.view(torch.int32), STATE.adapter_P.view(torch.int32))
    assert (back.round, back.metrics, back.weights) == (3, STATE.metrics, STATE.weights)
    assert (tmp_path / "metrics.jsonl").read_text().splitlines() == list(back.metrics)
    assert json.loads(back.metrics[0]) == {"event": "train", "loss": 0.25}


def test_no_checkpoint_is_none(tmp_path: Path) -> None:
    assert read(tmp_path) is None


@pytest.mark.parametrize(("digest", "scope"), [("e" * 64, "federated"), (DIGEST, "pooled")])
def test_checkpoint_of_another_run_is_refused(tmp_path: Path, digest: str, scope: str) -> None:
    write_checkpoint(tmp_path, STATE)
    with pytest.raises(CheckpointError, match="resume the run it belongs to"):
        read(tmp_path, digest=digest, scope=scope)


@pytest.mark.parametrize("keep", [0, 1, 8, 100, -1])
def test_truncated_checkpoint_is_refused(tmp_path: Path, keep: int) -> None:
    write_checkpoint(tmp_path, STATE)
    path = tmp_path / CHECKPOINT
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(CheckpointError, match="whole checkpoint"):
        read(tmp_path)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_metrics_that_json_cannot_carry_are_refused(value: float) -> None:
    with pytest.raises(ValueError, match="JSON"):
        metrics_line(loss=value)


@pytest.mark.process
def test_killed_writer_leaves_the_old_content_or_the_new(tmp_path: Path) -> None:
    """A process that rewrites one file for ever is killed with SIGKILL again and again."""
    path = tmp_path / "file"
    code = (
        "import sys; from pathlib import Path; from server.checkpoint import write_durably\n"
        "n = 0\n"
        "while True:\n"
        "    n += 1; write_durably(Path(sys.argv[1]), bytes([n % 251]) * 200_000)\n"
        "    print(n, flush=True)\n"
    )
    for kill_after in (1, 3, 7):
        with subprocess.Popen([sys.executable, "-c", code, str(path)], stdout=subprocess.PIPE) as process:
            assert process.stdout is not None
            for _ in range(kill_after):
                process.stdout.readline()
            os.kill(process.pid, signal.SIGKILL)
        data = path.read_bytes()
        assert len(data) == 200_000
        assert len(set(data)) == 1


def test_durable_write_leaves_no_partial_file(tmp_path: Path) -> None:
    write_durably(tmp_path / "deep" / "file", b"x")
    assert [p.name for p in (tmp_path / "deep").iterdir()] == ["file"]
