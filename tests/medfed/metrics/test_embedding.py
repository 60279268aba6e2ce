import math

import numpy as np
import pytest

from medfed.errors import MedfedError
from medfed.metrics.embedding import effective_rank


def test_equal_directions_count_fully():
    corners = np.concatenate([np.eye(5), -np.eye(5)])
    assert effective_rank(corners) == pytest.approx(5.0)
    assert effective_rank(7.0 + 3.0 * corners) == pytest.approx(5.0)


def test_value_is_that_of_the_definition():
    features = np.random.default_rng(0).normal(size=(30, 6)) @ np.diag([5, 2, 1, 1, 0.1, 0.01])
    centred = features - features.mean(axis=0)
    singular = np.sqrt(np.linalg.eigvalsh(centred.T @ centred))
    share = singular / singular.sum()
    assert effective_rank(features) == pytest.approx(np.prod(share**-share), rel=1e-6)


def test_collapse_lowers_it_to_one():
    line = np.arange(10.0)[:, None] * np.ones((1, 4))
    assert effective_rank(line) == pytest.approx(1.0)


def test_without_spread_there_is_no_rank():
    assert math.isnan(effective_rank(np.full((5, 3), 2.0)))
    assert math.isnan(effective_rank(np.ones((1, 3))))
    with pytest.raises(MedfedError, match="finite features"):
        effective_rank(np.array([[np.nan, 1.0], [0.0, 1.0]]))
