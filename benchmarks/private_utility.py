"""What patient-level privacy costs in Dice: the private demo at several epsilons and seeds, beside no noise.

    python benchmarks/private_utility.py FOLDER

Nine simulations of the federated arm of ``examples/brain-structures-private.toml``, about 25 minutes on two idle
cores; run folders go to FOLDER, and those that are there already are not run again. Prints one JSON object:
epsilon -> mean, smallest and largest over the seeds of the mean Dice over sites, and of the worst site's.
"""

from __future__ import annotations

import json
import sys
import tomllib
from pathlib import Path
from statistics import fmean
from typing import Any

import torch

from medfed.models.adapted import resolve
from medfed.study import StudyConfig
from privacy.plan import calibrated
from server.results import Results, read_results
from simulation.harness import simulate

STUDY = Path(__file__).parents[1] / "examples" / "brain-structures-private.toml"
SEEDS = (2026, 2027, 2028)
LEVELS: dict[str, dict[str, Any]] = {
    "no noise": {"trust": "none", "epsilon": None},
    "epsilon 8": {"epsilon": 8.0},
    "epsilon 2": {"epsilon": 2.0},
}


def variant(seed: int, privacy: dict[str, Any]) -> StudyConfig:
    """The example with another seed and other keys in ``[privacy]``."""
    study = tomllib.loads(STUDY.read_text())
    study["seed"] = seed
    study["privacy"] = {name: value for name, value in (study["privacy"] | privacy).items() if value is not None}
    return StudyConfig.model_validate(study)


def result_of(study: StudyConfig, folder: Path) -> Results:
    """The result of the federated arm of a study, from a finished run in ``folder`` or from a new one."""
    return read_results(run_of(study, toml_of(study), folder, baselines=False))


def run_of(study: StudyConfig, text: str, folder: Path, *, baselines: bool) -> Path:
    """The folder of a finished run of a study, whose file holds ``text``: one that is in ``folder``, or a new one."""
    digest = resolve(calibrated(study), torch.device("cpu")).digest
    for run in folder.glob("*/summary.json"):
        if StudyConfig.model_validate_json((run.parent / "study.json").read_bytes()).digest == digest:
            return run.parent
    path = folder / f"{digest}.toml"
    path.write_text(text)
    return simulate(path, out=folder, baselines=baselines).folder


def toml_of(study: StudyConfig) -> str:
    """A study as TOML, the part of it that this study needs."""
    data = study.model_dump(mode="json", exclude_none=True)
    lines = [f"{key} = {json.dumps(value)}" for key, value in data.items() if not isinstance(value, (dict, list))]
    for key, value in data.items():
        for section in value if isinstance(value, list) else [value] if isinstance(value, dict) else []:
            lines.append(f"[[{key}]]" if isinstance(value, list) else f"[{key}]")
            lines += [f"{name} = {json.dumps(content)}" for name, content in section.items()]
    return "\n".join(lines) + "\n"


def spread(values: list[float]) -> dict[str, float]:
    """Mean, smallest and largest."""
    return {"mean": fmean(values), "smallest": min(values), "largest": max(values)}


def main(folder: Path) -> None:
    """Run what is missing and print the table."""
    folder.mkdir(parents=True, exist_ok=True)
    results = {name: [result_of(variant(seed, keys), folder) for seed in SEEDS] for name, keys in LEVELS.items()}
    table = {
        "zero-shot": [(r.mean["zero_shot"], r.worst_site["zero_shot"]) for r in results["no noise"]],
        **{name: [(r.mean["federated"], r.worst_site["federated"]) for r in runs] for name, runs in results.items()},
    }
    print(
        json.dumps(
            {
                name: {"mean_of_sites": spread([m for m, _ in rows]), "worst_site": spread([w for _, w in rows])}
                for name, rows in table.items()
            },
            indent=2,
        )
    )


if __name__ == "__main__":
    main(Path(sys.argv[1]))
