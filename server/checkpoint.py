"""The checkpoint: all that a killed run needs to go on as if nothing had happened.

One safetensors file per run folder: the global adapter and what the strategy remembers, and in its metadata the
round, the study digest and the metrics so far. It is written beside its place, synced, and renamed, so at every
moment there is either the old one or the new one, whole.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, JsonValue, TypeAdapter, ValidationError
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from medfed.adapter_manifest import AdapterManifest
from medfed.durable_file import replace_durably
from medfed.errors import AdapterMismatchError, CheckpointError
from medfed.payload import decode_adapter, encode_adapter
from medfed.study_sections import Digest, Name

CHECKPOINT = "checkpoint.safetensors"
METRICS = "metrics.jsonl"

_ADAPTER, _BROADCAST, _MEMORY = "adapter", "broadcast:", "memory:"


@dataclass(frozen=True)
class Checkpoint:
    """The state of a run after a round.

    Attributes:
        study_digest: of the resolved study.
        scope: the federation inside the study.
        round: last completed round; 0 before the first.
        adapter_P: the global adapter, float32.
        broadcast: what the strategy tells sites beside it, by name.
        memory: what the strategy remembers at the server, by name.
        metrics: every line of ``metrics.jsonl`` so far, as made by :func:`metrics_line`.
        weights: public weight of each site.
    """

    study_digest: str
    scope: str
    round: int
    adapter_P: Tensor
    metrics: tuple[str, ...]
    weights: dict[str, float]
    broadcast: Mapping[str, Tensor] = field(default_factory=dict)
    memory: Mapping[str, Tensor] = field(default_factory=dict)


class _Facts(BaseModel):
    """What the file's metadata say of the checkpoint."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)

    study_digest: Digest
    scope: Name
    round: Annotated[int, Field(ge=0)]
    weights: dict[str, float]


_LINE: TypeAdapter[dict[str, JsonValue]] = TypeAdapter(dict[str, JsonValue])


def metrics_line(**facts: Any) -> str:
    """One line of metrics as JSON. Made once: a checkpoint holds all of them, and is written every round.

    Raises:
        ValueError: for NaN or infinity, which JSON cannot carry.
    """
    return _encode(facts)


_encode = json.JSONEncoder(allow_nan=False).encode


def write_checkpoint(folder: Path, checkpoint: Checkpoint) -> None:
    """Replace the folder's checkpoint, atomically and durably, and then its ``metrics.jsonl``, atomically.

    The checkpoint holds the metrics too, so ``metrics.jsonl`` is not worth a second wait for the disk.
    """
    facts = {
        "study_digest": checkpoint.study_digest,
        "scope": checkpoint.scope,
        "round": checkpoint.round,
        "weights": checkpoint.weights,
    }
    lines = _joined(checkpoint.metrics)
    data = save(
        {
            _ADAPTER: checkpoint.adapter_P.contiguous(),
            **{f"{_BROADCAST}{name}": tensor.contiguous() for name, tensor in checkpoint.broadcast.items()},
            **{f"{_MEMORY}{name}": tensor.contiguous() for name, tensor in checkpoint.memory.items()},
        },
        metadata={"medfed": _encode(facts), "metrics": lines},
    )
    write_durably(folder / CHECKPOINT, data)
    _replace(folder / METRICS, lines.encode())


def write_metrics(folder: Path, checkpoint: Checkpoint) -> None:
    """Replace the folder's ``metrics.jsonl`` by the checkpoint's, atomically."""
    _replace(folder / METRICS, _joined(checkpoint.metrics).encode())


def _under(prefix: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}


def _require_known(tensors: Iterable[str]) -> None:
    if strange := [name for name in tensors if not name.startswith((_BROADCAST, _MEMORY))]:
        raise ValueError(f"a tensor {strange[0]!r}")


def _joined(lines: Iterable[str]) -> str:
    return "\n".join((*lines, ""))


def read_checkpoint(folder: Path, manifest: AdapterManifest, *, study_digest: str, scope: str) -> Checkpoint | None:
    """The folder's checkpoint, or None if there is none yet.

    Raises:
        CheckpointError: if it is damaged, or belongs to another study or federation.
    """
    path = folder / CHECKPOINT
    if not path.exists():
        return None
    try:
        with safe_open(str(path), framework="pt") as file:
            metadata = file.metadata() or {}
            facts = _Facts.model_validate_json(metadata["medfed"])
            metrics = tuple(metadata["metrics"].splitlines())
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a dict
        for line in metrics:
            _LINE.validate_json(line)
        adapter_P = tensors.pop(_ADAPTER)
        _require_known(tensors)
        checkpoint = Checkpoint(
            adapter_P=adapter_P,
            metrics=metrics,
            broadcast=_under(_BROADCAST, tensors),
            memory=_under(_MEMORY, tensors),
            **facts.model_dump(),
        )
        decode_adapter(encode_adapter(adapter_P, manifest), manifest)
    except (SafetensorError, OSError, KeyError, TypeError, ValueError, AdapterMismatchError, RuntimeError) as error:
        why = error.errors(include_url=False)[0]["msg"] if isinstance(error, ValidationError) else error
        raise CheckpointError(
            f"Expected a whole checkpoint at {path}, got: {why}; restore it or start a new run."
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
    replace_durably(path, data, mode=0o666)  # less what the user's umask takes away


def _replace(path: Path, data: bytes) -> None:
    """Whole or not at all, but not waiting for the disk."""
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    partial.write_bytes(data)
    partial.replace(path)
