"""A study of one site, and the model it adapts."""

from collections.abc import Callable

import pytest
import torch

from medfed.models.adapted import AdaptedModel, adapted_model
from medfed.study import StudyConfig


@pytest.fixture
def study(make_study: Callable[..., StudyConfig]) -> StudyConfig:
    return make_study(("north",))


@pytest.fixture
def model(study: StudyConfig) -> AdaptedModel:
    return adapted_model(study, torch.device("cpu"))
