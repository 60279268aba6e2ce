"""Both demos, with privacy, without noise, and as they are: what ``docs/evaluation.md`` shows.

    python benchmarks/evaluation_tables.py FOLDER > docs/results/evaluation.json

Six simulations with all arms, about half an hour on two idle cores; run folders go to FOLDER, and those of the same
studies that are there already are not run again. Prints one JSON object: run -> what it promises, primary metric, every
metric by column over the sites, and the comparisons at each site with their intervals.
"""

from __future__ import annotations

import json
import sys
import tomllib
from pathlib import Path
from typing import Any

from private_utility import run_of

from medfed.study import StudyConfig
from privacy.plan import PrivacyPlan
from server.evaluation import Evaluation, read_evaluation
from server.results import read_results

ROOT = Path(__file__).parents[1]
PRIVATE = 'trust = "site"'
TARGET = "epsilon = 8.0\n"


def without_noise(text: str) -> str:
    """A private study that draws and clips the same and adds nothing."""
    assert text.count(PRIVATE) == text.count(TARGET) == 1
    return text.replace(PRIVATE, 'trust = "none"').replace(TARGET, "")


def studies() -> dict[str, str]:
    """Name of a run -> its study file."""
    brain, lesions = (ROOT / "examples" / f"{name}.toml" for name in ("brain-structures", "lesion-classification"))
    private_brain = (ROOT / "examples" / "brain-structures-private.toml").read_text()
    private_lesions = (ROOT / "benchmarks" / "lesions_private.toml").read_text()
    return {
        "brain": brain.read_text(),
        "brain, clipped, no noise": without_noise(private_brain),
        "brain, epsilon 8": private_brain,
        "lesions": lesions.read_text(),
        "lesions, clipped, no noise": without_noise(private_lesions),
        "lesions, epsilon 8": private_lesions,
    }


def finished(text: str, folder: Path) -> Path:
    """The folder of a run with all arms of a study file."""
    return run_of(StudyConfig.model_validate(tomllib.loads(text)), text, folder, baselines=True)


def shown(folder: Path) -> dict[str, Any]:
    """What the page shows of a run."""
    study, evaluation = StudyConfig.model_validate_json((folder / "study.json").read_bytes()), read_evaluation(folder)
    assert evaluation is not None
    spent = read_results(folder).privacy.sites.values()
    return {
        "epsilon": max((site.epsilon for site in spent), default=None),
        "noise_multiplier": None if study.privacy is None else PrivacyPlan.of_study(study).noise_multiplier,
        "training_patients": [study.declared_units(site.name) or site.train_patients for site in study.sites],
        "held_out_patients": [evaluation.sites[site].patients for site in study.site_names],
        "over_sites": over_sites(evaluation),
        "differences": {
            site: {name: measured.model_dump(exclude_none=True) for name, measured in found.differences.items()}
            for site, found in evaluation.sites.items()
        },
    }


def over_sites(evaluation: Evaluation) -> dict[str, dict[str, dict[str, float]]]:
    """Metric -> column -> mean and worst; of all structures or targets together."""
    return {
        metric: {column: {"mean": of.mean, "worst": of.worst} for column, of in columns.items()}
        for metric, columns in evaluation.over_sites.items()
        if "/" not in metric
    }


def main(folder: Path) -> None:
    """Run what is missing and print the tables."""
    folder.mkdir(parents=True, exist_ok=True)
    print(json.dumps({name: shown(finished(text, folder)) for name, text in studies().items()}, indent=1))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
