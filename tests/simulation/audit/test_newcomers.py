"""Patients made for the attack: as the site's own are, and none of them."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from client.data import load_cohort
from medfed.models.pixels import PixelSpec
from medfed.study import StudyConfig
from simulation.audit.newcomers import newcomers, num_made
from simulation.cohort import write_cohort
from simulation.harness import recipe_of

STUDY = StudyConfig.model_validate(
    {
        "name": "newcomers",
        "seed": 5,
        "backbone": {"name": "stand-in-classifier", "sha256": "0" * 64},
        "adapter": {"method": "heads"},
        "task": {
            "kind": "classification",
            "targets": {
                "lesion_present": ["absent", "present"],
                "lesion_side": ["none", "left", "right"],
                "lesion_size": ["none", "small", "large"],
            },
        },
        "training": {"batch_size": 2, "learning_rate": 0.1, "local_epochs": 1},
        "rounds": {"num_rounds": 1},
        "cohort": {"kind": "brain-lesions"},
        "sites": [
            {
                "name": name,
                "scanner": "reference-3t",
                "train_patients": 2,
                "test_patients": 1,
                "lesion_prevalence": 0.5,
            }
            for name in ("north", "south")
        ],
    }
)
PIXELS = PixelSpec(image_size=28)


def scene(manifest: Path) -> Any:
    cohort = load_cohort("south", [manifest], STUDY.task, PIXELS)
    return SimpleNamespace(
        study=STUDY, site=SimpleNamespace(name="south"), cohort=cohort, model=SimpleNamespace(pixels=PIXELS)
    )


@pytest.mark.weights
def test_newcomers_are_the_next_patients_of_the_same_recipe(tmp_path: Path) -> None:
    at = scene(write_cohort(recipe_of(STUDY), tmp_path / "cohort")["south"])
    made: list[int] = []
    found = newcomers(at, 2, done=lambda: made.append(1))
    assert [item.patient_id for item in found] == ["south-0003", "south-0004"]
    assert len(made) == num_made(at, 2) == 5
    digests = {item.image_digest for item in at.cohort.items}
    assert digests.isdisjoint(item.image_digest for item in found)
    assert {item.image_CHW.shape for item in found} == {item.image_CHW.shape for item in at.cohort.items}


def test_nobody_is_made_if_nobody_is_asked_for() -> None:
    assert newcomers(SimpleNamespace(), 0) == ()  # type: ignore[arg-type]
    assert num_made(SimpleNamespace(), 0) == 0  # type: ignore[arg-type]
