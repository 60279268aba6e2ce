import numpy as np
import pytest

from medfed.errors import MedfedError
from medfed.metrics.resampling import Estimate, estimate, patient_weights, weighted_mean


def test_row_zero_is_the_cohort_and_every_resample_draws_as_many_patients():
    weights = patient_weights(7, seed=1, num_resamples=50)
    assert weights.shape == (51, 7)
    assert (weights[0] == 1).all()
    assert (weights.sum(axis=1) == 7).all()
    assert np.array_equal(weights, patient_weights(7, seed=1, num_resamples=50))
    assert not np.array_equal(weights, patient_weights(7, seed=2, num_resamples=50))


def test_interval_is_that_of_the_slow_bootstrap():
    values = np.random.default_rng(3).normal(0.7, 0.1, size=20)
    weights = patient_weights(20, seed=4)
    found = estimate(weighted_mean(values, weights))
    means = [values[np.repeat(np.arange(20), row.astype(int))].mean() for row in weights[1:]]
    assert found == Estimate(
        pytest.approx(values.mean()),
        pytest.approx(np.percentile(means, 2.5)),
        pytest.approx(np.percentile(means, 97.5)),
    )


def test_interval_covers_the_truth_about_as_often_as_it_says():
    generator = np.random.default_rng(5)
    covered = 0
    for seed in range(300):
        found = estimate(weighted_mean(generator.normal(size=40), patient_weights(40, seed, num_resamples=400)))
        covered += found.low <= 0.0 <= found.high
    assert 0.90 <= covered / 300 <= 0.98


def test_metric_without_a_value_has_no_estimate_and_a_rare_one_no_interval():
    assert estimate(np.array([np.nan, 1.0, 1.0])) is None
    assert estimate(np.array([0.5])) == Estimate(0.5, None, None)
    half_undefined = np.array([0.5, *[0.4, np.nan] * 50])
    assert estimate(half_undefined) == Estimate(0.5, None, None)
    assert estimate(np.array([0.5, *[0.4] * 95, *[np.nan] * 5])).low == pytest.approx(0.4)


def test_values_that_are_not_there_do_not_count():
    found = weighted_mean(np.array([1.0, np.nan, 3.0]), np.array([[1.0, 5.0, 1.0], [0.0, 1.0, 0.0]]))
    assert found[0] == 2.0
    assert np.isnan(found[1])


def test_difference_is_told_from_zero_by_its_interval_alone():
    assert Estimate(0.1, 0.01, 0.2).excludes_zero
    assert not Estimate(0.1, -0.01, 0.2).excludes_zero
    assert not Estimate(0.1, None, None).excludes_zero


def test_cohort_without_patients_is_refused():
    with pytest.raises(MedfedError, match="at least one patient"):
        patient_weights(0, seed=0)
