import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from medfed.errors import MedfedError
from medfed.metrics.calibration import (
    MAX_TEMPERATURE,
    NUM_BINS,
    calibration_error,
    fitted_temperature,
    reliability_bins,
    softmax,
)


def _cases(n=200, seed=0):
    generator = np.random.default_rng(seed)
    logits = generator.normal(scale=2.0, size=(n, 3))
    truth = np.array([generator.choice(3, p=row) for row in softmax(logits)])
    return logits, truth


def _slow_error(probability, truth):
    error = 0.0
    for low in range(NUM_BINS):
        gap, members = 0.0, 0
        for row, label in zip(probability, truth, strict=True):
            confidence = max(row)
            if low <= confidence * NUM_BINS < low + 1 or (low == NUM_BINS - 1 and confidence == 1.0):
                gap += float(np.argmax(row) == label) - confidence
                members += 1
        error += abs(gap) if members else 0.0
    return error / len(truth)


def test_error_is_that_of_the_obvious_loop():
    logits, truth = _cases()
    probability = softmax(logits)
    found = calibration_error(probability, truth, np.ones((1, len(truth))))[0]
    assert found == pytest.approx(_slow_error(probability, truth), abs=1e-12)
    assert reliability_bins(probability, truth).error == pytest.approx(found, abs=1e-12)


def test_error_under_multiplicities_is_that_of_the_repeated_cases():
    logits, truth = _cases(60)
    weight = np.random.default_rng(1).integers(0, 4, size=60)
    drawn = np.repeat(np.arange(60), weight)
    found = calibration_error(softmax(logits), truth, weight[None].astype(float))[0]
    assert found == pytest.approx(_slow_error(softmax(logits)[drawn], truth[drawn]), abs=1e-12)


@given(st.integers(1, 59))
def test_bins_of_two_sites_add_up_to_those_of_both(cut):
    logits, truth = _cases(60)
    probability = softmax(logits)
    both = reliability_bins(probability[:cut], truth[:cut]) + reliability_bins(probability[cut:], truth[cut:])
    whole = reliability_bins(probability, truth)
    assert both.count_B.tolist() == whole.count_B.tolist()
    assert both.error == pytest.approx(whole.error, abs=1e-12)


@pytest.mark.parametrize("true_temperature", [0.5, 1.0, 3.0])
def test_temperature_that_made_the_labels_is_found(true_temperature):
    generator = np.random.default_rng(2)
    logits = generator.normal(scale=3.0, size=(4000, 3))
    truth = np.array([generator.choice(3, p=row) for row in softmax(logits, true_temperature)])
    assert fitted_temperature(logits, truth) == pytest.approx(true_temperature, rel=0.1)


def test_temperature_is_the_best_of_a_grid():
    logits, truth = _cases(50)

    def loss(temperature):
        return -np.log(softmax(logits, temperature)[np.arange(50), truth]).mean()

    found = fitted_temperature(logits, truth)
    assert all(loss(found) <= loss(other) + 1e-6 for other in np.geomspace(0.05, 20, 200))


def test_temperature_changes_no_prediction():
    logits, _ = _cases(50)
    assert (softmax(logits, 7.0).argmax(axis=1) == logits.argmax(axis=1)).all()


def test_always_right_gets_the_smallest_temperature_and_no_cases_none():
    assert fitted_temperature(np.eye(3) * 0.1, np.arange(3)) == pytest.approx(1 / MAX_TEMPERATURE, rel=1e-3)
    assert fitted_temperature(np.zeros((0, 3)), np.zeros(0, dtype=np.int64)) is None


def test_what_is_no_probability_is_refused():
    with pytest.raises(MedfedError, match=r"\[0, 1\]"):
        reliability_bins(np.array([[np.nan, 1.0]]), np.array([0]))
    with pytest.raises(MedfedError, match="finite logits"):
        fitted_temperature(np.array([[np.inf, 0.0]]), np.array([0]))
    assert math.isnan(reliability_bins(np.zeros((0, 2)), np.zeros(0, dtype=np.int64)).error)


def test_certainty_belongs_to_the_last_bin():
    bins = reliability_bins(np.array([[1.0, 0.0], [0.5, 0.5]]), np.array([0, 1]))
    assert bins.count_B[-1] == 1
    assert bins.count_B[5] == 1
    assert bins.correct_B.sum() == 1


def test_large_logits_do_not_overflow():
    assert softmax(np.array([[1e4, 0.0]])).tolist() == [[1.0, 0.0]]
