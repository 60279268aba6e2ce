"""Preflight of this machine: policy, ledger, keys, disk, memory, device, weights, Flower."""

from __future__ import annotations

import os
import shutil
import stat
from collections.abc import Callable, Iterator
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from client.policy import SitePolicy
from client.preflight_check import Check, Part, PreflightInputs, count, guarded
from medfed.device import choose_device
from medfed.flower_version import WORKS_WITH
from medfed.study import StudyConfig

_SET_UP: Part = "set-up"

FLOWER_SERIES = WORKS_WITH
"""The Flower releases whose private names are built on; the same that pyproject.toml requires."""

_GIB = 2**30
_DISK_GIB, _DISK_LEAST_GIB = 5, 1
_MEMORY_GIB, _MEMORY_LEAST_GIB = 4, 2
"""Room for weights, torch and a feature cache: rough figures to warn by, not measured needs."""


def site_checks(inputs: PreflightInputs, policy: SitePolicy | None) -> list[Check]:
    """Everything there is to say about the machine; the policy itself was read before."""
    looks: tuple[tuple[str, Callable[[], Check | Iterator[Check]]], ...] = (
        ("policy", lambda: _policy(inputs, policy)),
        ("study and policy", lambda: _study_and_policy(inputs.study, policy)),
        ("ledger", lambda: _ledger(inputs, policy)),
        ("private files", lambda: _private_files(inputs)),
        ("backbone weights", lambda: _weights(inputs.study)),
        ("device", lambda: _device(inputs)),
        ("memory", _memory),
        ("disk", lambda: _disk(inputs)),
        ("Flower", _flower),
    )
    return [found for name, look in looks for found in guarded(_SET_UP, name, look)]


def _policy(inputs: PreflightInputs, policy: SitePolicy | None) -> Iterator[Check]:
    if policy is None:
        return
    budget = policy.budget
    told = f"at least {count(policy.minimum_patients, 'patient')}"
    if budget is None:
        yield Check(
            _SET_UP,
            "policy",
            "warn",
            f"{told}; no budget, so no study with privacy can train.",
            "decide with the data-protection officer what all studies together may spend, and add [budget].",
        )
    else:
        yield Check(
            _SET_UP,
            "policy",
            "ok",
            f"{told}; all studies together may spend epsilon {budget.epsilon:g} at delta {budget.delta:g} "
            f"per {budget.unit}",
        )
    if policy.allow_unprotected:
        yield Check(
            _SET_UP,
            "unprotected studies",
            "warn",
            "the policy lets studies without noise train.",
            "set allow_unprotected = false unless that was decided.",
        )


def _study_and_policy(study: StudyConfig | None, policy: SitePolicy | None) -> Iterator[Check]:
    """Everything that the policy asks of the study itself, but for the approval."""
    if study is not None and policy is not None:
        policy.model_copy(update={"approved_studies": (study.digest,)}).check_study(study)
        told = f"the policy's rules allow {study.name!r}; approval is a step of its own"
        yield Check(_SET_UP, "study and policy", "ok", told)


def _ledger(inputs: PreflightInputs, policy: SitePolicy | None) -> Iterator[Check]:
    from client.spending import read_spending

    if inputs.ledger is None:
        return
    if not inputs.ledger.exists():
        yield Check(_SET_UP, "ledger", "ok", "none yet; it is made when the first private round comes")
        return
    shown = read_spending(inputs.ledger, inputs.ledger_public_key)
    if shown.error is not None:
        yield Check(
            _SET_UP,
            "ledger",
            "fail",
            f"only {_entries(shown.entries)} verified: {shown.error}",
            "train nothing; find out who changed it, and restore the newest true copy.",
        )
        return
    cap = None if policy is None or policy.budget is None else policy.budget.epsilon
    yield Check(_SET_UP, "ledger", "ok", f"chain of {_entries(shown.entries)} verified")
    for cohort in shown.cohorts:
        limit = cohort.cap if cap is None else cap
        left = limit - cohort.epsilon
        told = f"cohort {cohort.cohort}: epsilon {cohort.epsilon:.3f} of {limit:g} spent, {max(left, 0.0):.3f} left"
        if left > 0:
            yield Check(_SET_UP, "budget", "ok", told)
        else:
            yield Check(
                _SET_UP, "budget", "fail", f"{told}.", "nothing trains on these patients any more unless it is raised."
            )


def _entries(number: int) -> str:
    return "1 entry" if number == 1 else f"{number} entries"


def _private_files(inputs: PreflightInputs) -> Iterator[Check]:
    wrong = False
    for path in inputs.private_files:
        if not path.exists():
            wrong = True
            yield Check(_SET_UP, "private files", "fail", f"{path.name}: not there.", "restore it from the backup.")
            continue
        mode = stat.S_IMODE(path.stat().st_mode)
        if mode & (stat.S_IRWXG | stat.S_IRWXO):
            wrong = True
            fitting = "0700" if path.is_dir() else "0600"
            yield Check(
                _SET_UP,
                "private files",
                "fail",
                f"{path.name}: others may use it (mode {mode:04o}).",
                f"chmod {fitting} {path}; make a new key if others could have read this one.",
            )
        elif not os.access(path, os.R_OK):
            wrong = True
            yield Check(
                _SET_UP,
                "private files",
                "fail",
                f"{path.name}: this account may not read it.",
                "run as the account that owns the site's folder.",
            )
    if inputs.private_files and not wrong:
        yield Check(_SET_UP, "private files", "ok", f"{count(len(inputs.private_files), 'path')} for their owner alone")


def _weights(study: StudyConfig | None) -> Iterator[Check]:
    from medfed.models.registry import backbone_of
    from medfed.models.weights import locate, verify_sha256

    if study is None:
        return
    weights = backbone_of(study.backbone).weights
    if weights is None:
        yield Check(_SET_UP, "backbone weights", "ok", f"{study.backbone.name} is made from scratch")
        return
    verify_sha256(locate(weights), study.backbone.sha256)
    yield Check(
        _SET_UP,
        "backbone weights",
        "ok",
        f"{study.backbone.name}, sha256 {study.backbone.sha256[:16]}, as the study names",
    )


def _device(inputs: PreflightInputs) -> Iterator[Check]:
    import torch

    device = choose_device(inputs.device)
    if device.type != "cuda":
        yield Check(_SET_UP, "device", "ok", f"{device.type}, {count(os.cpu_count() or 1, 'core')}")
        return
    free, total = torch.cuda.mem_get_info(device)
    yield Check(
        _SET_UP,
        "device",
        "ok",
        f"{torch.cuda.get_device_name(device)}, {free / _GIB:.1f} of {total / _GIB:.1f} GiB free",
    )


def _memory() -> Iterator[Check]:
    free_bytes = available_memory_bytes()
    if free_bytes is not None:
        yield _room("memory", free_bytes, _MEMORY_GIB, _MEMORY_LEAST_GIB, "stop other programs, or add memory.")


def available_memory_bytes() -> int | None:
    """What a new program may use: what Linux says is available, at most what its control group leaves; else None."""
    try:
        lines = dict(line.split(":", 1) for line in Path("/proc/meminfo").read_text().splitlines())
        free = int(lines["MemAvailable"].split()[0]) * 1024
    except (OSError, KeyError, ValueError):
        return None
    group = Path("/sys/fs/cgroup")
    try:
        free = min(free, int((group / "memory.max").read_text()) - int((group / "memory.current").read_text()))
    except (OSError, ValueError):  # no such group, or "max"
        return free
    return max(free, 0)


def _disk(inputs: PreflightInputs) -> Iterator[Check]:
    if inputs.state is not None:
        free_bytes = shutil.disk_usage(inputs.state).free
        yield _room("disk", free_bytes, _DISK_GIB, _DISK_LEAST_GIB, f"make room on the disk of {inputs.state}.")
        if not os.access(inputs.state, os.W_OK):
            yield Check(
                _SET_UP,
                "disk",
                "fail",
                f"{inputs.state}: this account may not write there.",
                "run as the account that owns the site's folder.",
            )


def _room(name: str, free_bytes: int, enough_gib: int, least_gib: int, what_to_do: str) -> Check:
    told = f"{free_bytes / _GIB:.1f} GiB free"
    if free_bytes >= enough_gib * _GIB:
        return Check(_SET_UP, name, "ok", told)
    outcome = "warn" if free_bytes >= least_gib * _GIB else "fail"
    return Check(
        _SET_UP, name, "warn" if outcome == "warn" else "fail", f"{told}; {enough_gib} GiB is safe.", what_to_do
    )


def _flower() -> Check:
    try:
        installed = version("flwr")
    except PackageNotFoundError:
        installed = "none"
    if installed == FLOWER_SERIES or installed.startswith(f"{FLOWER_SERIES}."):
        return Check(_SET_UP, "Flower", "ok", f"version {installed}")
    return Check(
        _SET_UP,
        "Flower",
        "fail",
        f"version {installed}; this software is built on {FLOWER_SERIES}.",
        f"pip install 'flwr=={FLOWER_SERIES}.*'",
    )
