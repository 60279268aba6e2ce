"""A finished run of a small private study, audited once for all tests that only look."""

from collections.abc import Callable
from pathlib import Path

import pytest

from medfed.study import StudyConfig
from simulation.harness import simulate


@pytest.fixture
def make_run(study_file: Callable[[StudyConfig], Path], tmp_path: Path) -> Callable[[StudyConfig], Path]:
    """Simulates the federated arm of a study in this process, and returns the run folder."""

    def make(study: StudyConfig) -> Path:
        return simulate(study_file(study), out=tmp_path / "runs", baselines=False, workers=0, device="cpu").folder

    return make
