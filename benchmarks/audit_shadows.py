"""Shadow adapters beside several claims: one site of a private run, trained again and again with more and less noise.

    python benchmarks/audit_shadows.py RUN_DIR [CLAIM ...] > docs/results/audit-shadows.json

RUN_DIR is a run of ``medfed simulate benchmarks/lesions_private.toml --no-baselines``; claims are those of
``audit_claims.py``, by default all. Sixteen shadows each, attacked by each other; the other attacks of ``medfed audit``
are left out. Prints one JSON object: claim -> score -> area under the ROC curve with its interval, and members found
at one false alarm in a hundred; and the seconds of one core that it took.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from audit_claims import CLAIMS, variant

from server.audit_result import Membership
from simulation.audit.run import site_shadows
from simulation.audit.scene import Scene
from simulation.audit.shadows import attacks_in_turn
from simulation.progress import Silent
from simulation.run_folder import stored_study

SHADOWS = 16


def shown(one: Membership) -> dict[str, Any]:
    """What the page shows of an attack."""
    found = next(hit for hit in one.hits if hit.false_alarm_rate == 0.01)
    return {
        "auroc": round(one.auroc, 2),
        "low": round(one.low, 2),
        "high": round(one.high, 2),
        "found_at_0.01": round(found.share, 3),
    }


def main(folder: Path, claims: list[str]) -> None:
    """Attack one site for each claim and print the table."""
    torch.set_num_threads(1)
    table: dict[str, Any] = {}
    for name in claims:
        started_s = time.process_time()
        scene = Scene.of(folder, None, study=variant(stored_study(folder), CLAIMS[name]))
        assert scene.plan is not None
        _, _, shadows = site_shadows(scene, SHADOWS, Silent())
        attacks = attacks_in_turn(shadows, np.random.default_rng(0))
        table[name] = {
            "noise_multiplier": scene.plan.noise_multiplier,
            "patients": len(shadows.scores_KN[0]),
            "trained": shadows.num_trained,
            "attacks": {one.attack: shown(one) for one in attacks},
            "cpu_seconds": round(time.process_time() - started_s),
        }
        print(f"{name}: {table[name]}", file=sys.stderr)
    print(json.dumps(table, indent=1))


if __name__ == "__main__":
    main(Path(sys.argv[1]).resolve(), sys.argv[2:] or list(CLAIMS))
