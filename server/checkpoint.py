"""The checkpoint: all that a killed run needs to go on as if nothing had happened.

One safetensors file per run folder: the global adapter, and in its metadata the round, the study digest and
the metrics so far. It is written beside its place, synced, and renamed, so at every moment there is either
the old one or the new one, whole.
"""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from medfed.adapter_manifest import AdapterManifest
from medfed.errors import AdapterMismatchError, CheckpointError
from medfed.payload import decode_adapter, encode_adapter

CHECKPOINT = "checkpoint.safetensors"


@dataclass(frozen=True)
class Checkpoint:
    """The state of a run after a round.

    Attributes:
        study_digest: of the resolved study.
        scope: the federation inside the study.
        round: last completed round; 0 before the first.
        adapter_P: the global adapter, float32.
        metrics: every metrics line so far.
        weights: public weight of each site.
    """

    study_digest: str
    scope: str
    round: int
    adapter_P: Tensor
    metrics: tuple[dict[str, Any], ...]
    weights: dict[str, float]


def write_checkpoint(folder: Path, checkpoint: Checkpoint) -> None:
    """Replace the folder's checkpoint and its ``metrics.jsonl``, atomically and durably."""
    facts = {
        "study_digest": checkpoint.study_digest,
        "scope": checkpoint.scope,
        "round": checkpoint.round,
        "metrics": checkpoint.metrics,
        "weights": checkpoint.weights,
    }
    data = save(
        {"adapter": checkpoint.adapter_P.contiguous()},
        metadata={"medfed": json.dumps(facts, allow_nan=False)},
    )
    write_durably(folder / CHECKPOINT, data)
    lines = "".join(json.dumps(line, allow_nan=False) + "\n" for line in checkpoint.metrics)
    write_durably(folder / "metrics.jsonl", lines.encode())


def read_checkpoint(
    folder: Path, manifest: AdapterManifest, *, study_digest: str, scope: str
) -> Checkpoint | None:
    """The folder's checkpoint, or None if there is none yet.

    Raises:
        CheckpointError: if it is damaged, or belongs to another study or federation.
    """
    path = folder / CHECKPOINT
    if not path.exists():
        return None
    try:
        with safe_open(str(path), framework="pt") as file:
            facts = json.loads((file.metadata() or {})["medfed"])
            adapter_P = file.get_tensor("adapter")
        checkpoint = Checkpoint(adapter_P=adapter_P, **{**facts, "metrics": tuple(facts["metrics"])})
        decode_adapter(encode_adapter(adapter_P, manifest), manifest)
    except (SafetensorError, OSError, KeyError, TypeError, ValueError, AdapterMismatchError) as error:
        raise CheckpointError(
            f"Expected a whole checkpoint at {path}, got: {error}; restore it or start a new run."
        ) from None
    if (checkpoint.study_digest, checkpoint.scope) != (study_digest, scope):
        raise CheckpointError(
            f"Expected a checkpoint of study {study_digest[:16]} ({scope}) in {folder}, "
            f"got {checkpoint.study_digest[:16]} ({checkpoint.scope}); resume the run it belongs to."
        )
    return checkpoint


def write_durably(path: Path, data: bytes) -> None:
    """Write ``data`` to ``path`` so that a crash at any point leaves the old content or the new, whole."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    with partial.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    partial.replace(path)
    descriptor = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
