"""The audit beside several claims: one site of a private run, trained again for epsilon 1, 2, 8, and without noise.

    python benchmarks/audit_claims.py RUN_DIR > docs/results/audit.json

RUN_DIR is a run of ``medfed simulate examples/brain-structures-private.toml --no-baselines``. The study's noise is
calibrated anew for each epsilon; everything else stays. Many short runs, all 16 noised steps each; the other attacks of
``medfed audit`` are left out. Prints one JSON object: claim -> attack -> bound, and the seconds that it took.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any

import torch

from medfed.study import StudyConfig
from privacy.plan import calibrated
from server.audit_result import AuditBound
from simulation.audit.run import Effort, game_bounds
from simulation.audit.scene import Scene
from simulation.progress import Silent
from simulation.run_folder import stored_study

CLAIMS: dict[str, dict[str, Any]] = {
    "1": {"epsilon": 1.0},
    "2": {"epsilon": 2.0},
    "8": {"epsilon": 8.0},
    "none": {"epsilon": None, "trust": "none"},
}


def variant(study: StudyConfig, claim: dict[str, Any]) -> StudyConfig:
    """The study with another claim, and the noise for it."""
    assert study.privacy is not None
    privacy = {**study.privacy.model_dump(), "noise_multiplier": None, **claim}
    return calibrated(study.replace(privacy={name: value for name, value in privacy.items() if value is not None}))


def shown(bound: AuditBound) -> dict[str, Any]:
    """What the page shows of a bound."""
    claimed = None if bound.claimed is None else round(bound.claimed, 2)
    return {
        "epsilon": round(bound.epsilon, 2),
        "claimed": claimed,
        "delta": bound.delta,
        "correct": bound.num_correct,
        "guessed": bound.num_guessed,
        "exceeds": bound.exceeds,
    }


def main(folder: Path) -> None:
    """Audit one site for each claim and print the table."""
    torch.set_num_threads(1)
    table: dict[str, Any] = {}
    for name, claim in CLAIMS.items():
        started_s = time.monotonic()
        scene = Scene.of(folder, None, study=variant(stored_study(folder), claim))
        assert scene.plan is not None
        bounds = game_bounds(scene, scene.plan, Effort(), Silent())
        table[name] = {
            "noise_multiplier": scene.plan.noise_multiplier,
            "bounds": {bound.attack: shown(bound) for bound in bounds},
            "seconds": round(time.monotonic() - started_s),
        }
        print(f"{name}: {table[name]}", file=sys.stderr)
    print(json.dumps(table, indent=1))


if __name__ == "__main__":
    main(Path(sys.argv[1]).resolve())
