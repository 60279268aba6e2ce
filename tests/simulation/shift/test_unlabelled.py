"""A patient who was never annotated trains nothing and breaks nothing."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import nibabel
import numpy as np
import torch

from medfed.study import StudyConfig
from server.checkpoint import read_checkpoint
from simulation.harness import Run, simulate
from simulation.run_folder import stored_study

MakeStudy = Callable[..., StudyConfig]
StudyFile = Callable[[StudyConfig], Path]


def unlabel(study: StudyConfig, *numbers: int) -> None:
    for site in study.sites:
        assert site.data is not None
        for number in numbers:
            path = site.data.parent / f"label{number}.nii.gz"
            nibabel.save(nibabel.Nifti1Image(np.zeros((64, 64), np.uint8), np.eye(4)), path)


def adapter_of(run: Run) -> torch.Tensor:
    study = stored_study(run.folder)
    state = read_checkpoint(run.folder, study.resolved_manifest, study_digest=study.digest, scope="federated")
    assert state is not None
    return state.adapter_P


def test_site_with_unlabelled_patients_trains_on_the_others(
    make_study: MakeStudy, study_file: StudyFile, tmp_path: Path
) -> None:
    study = make_study(training={"local_epochs": 1, "batch_size": 1, "learning_rate": 0.01})
    unlabel(study, 0)
    run = simulate(study_file(study), out=tmp_path / "runs", workers=0, baselines=False)
    assert bool(torch.isfinite(adapter_of(run)).all())
    assert run.summary.mean["federated"] >= 0.0


def test_private_site_with_unlabelled_patients_trains(
    make_private_study: MakeStudy, study_file: StudyFile, tmp_path: Path
) -> None:
    study = make_private_study()
    unlabel(study, 1)
    run = simulate(study_file(study), out=tmp_path / "runs", workers=0, baselines=False)
    assert bool(torch.isfinite(adapter_of(run)).all())
