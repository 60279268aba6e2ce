import warnings

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from sklearn.metrics import average_precision_score, balanced_accuracy_score, roc_auc_score, roc_curve

from medfed.errors import MedfedError
from medfed.metrics.ranking import (
    area_under_roc,
    average_precision,
    balanced_accuracy,
    sensitivity_at_specificity,
)

CASES = st.lists(st.tuples(st.integers(0, 6), st.booleans(), st.integers(0, 3)), min_size=1, max_size=25)


def _arrays(cases):
    score, positive, weight = (np.array(column) for column in zip(*cases, strict=True))
    return score / 6, positive.astype(bool), weight.astype(float)


def _with_both_classes(cases):
    _, positive, weight = _arrays(cases)
    return weight[positive].sum() > 0 and weight[~positive].sum() > 0


@given(CASES.filter(_with_both_classes))
def test_areas_are_those_of_scikit_learn_with_the_same_weights(cases):
    score, positive, weight = _arrays(cases)
    expected = roc_auc_score(positive, score, sample_weight=weight)
    assert area_under_roc(score, positive, weight[None])[0] == pytest.approx(expected, abs=1e-12)
    expected = average_precision_score(positive, score, sample_weight=weight)
    assert average_precision(score, positive, weight[None])[0] == pytest.approx(expected, abs=1e-12)


@given(CASES.filter(_with_both_classes), st.sampled_from([0.5, 0.8, 0.9, 1.0]))
def test_sensitivity_is_the_best_point_of_scikit_learns_curve_that_is_specific_enough(cases, specificity):
    score, positive, weight = _arrays(cases)
    false_rate, true_rate, _ = roc_curve(positive, score, sample_weight=weight, drop_intermediate=False)
    expected = true_rate[false_rate <= 1 - specificity + 1e-9].max()
    found = sensitivity_at_specificity(score, positive, weight[None], specificity=specificity)
    assert found[0] == pytest.approx(expected, abs=1e-9)


@given(st.lists(st.tuples(st.integers(0, 2), st.integers(0, 2), st.integers(0, 3)), min_size=1, max_size=25))
def test_balanced_accuracy_is_that_of_scikit_learn_over_the_classes_that_occur(cases):
    predicted, truth, weight = (np.array(column) for column in zip(*cases, strict=True))
    found = balanced_accuracy(predicted, truth, weight[None].astype(float), num_classes=3)[0]
    if weight.sum() == 0:
        assert np.isnan(found)
        return
    drawn = np.repeat(np.arange(len(truth)), weight)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # of predicted classes that do not occur
        expected = balanced_accuracy_score(truth[drawn], predicted[drawn])
    assert found == pytest.approx(expected, abs=1e-12)


def test_rows_of_weights_are_cohorts_of_their_own():
    generator = np.random.default_rng(0)
    score, positive = generator.random(30), generator.random(30) < 0.4
    weights = generator.integers(0, 3, size=(8, 30)).astype(float)
    together = area_under_roc(score, positive, weights)
    assert together.tolist() == [area_under_roc(score, positive, row[None])[0] for row in weights]


def test_one_class_only_has_no_value():
    score, weight = np.array([0.1, 0.9]), np.ones((1, 2))
    for positive in (np.array([True, True]), np.array([False, False])):
        assert np.isnan(area_under_roc(score, positive, weight)[0])
        assert np.isnan(average_precision(score, positive, weight)[0])
        assert np.isnan(sensitivity_at_specificity(score, positive, weight, specificity=0.9)[0])


def test_no_cases_have_no_value_and_nan_scores_are_refused():
    nothing = np.zeros(0)
    assert np.isnan(area_under_roc(nothing, nothing.astype(bool), np.ones((3, 0)))).all()
    with pytest.raises(MedfedError, match="1 NaN"):
        average_precision(np.array([np.nan, 1.0]), np.array([True, False]), np.ones((1, 2)))
    with pytest.raises(MedfedError, match="specificity"):
        sensitivity_at_specificity(np.array([0.0]), np.array([True]), np.ones((1, 1)), specificity=90)
