import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from medfed.metrics.class_scores import ClassScores
from medfed.metrics.mergeable import SCORE_BINS, CountLayout
from medfed.metrics.outline_scores import OutlineScores
from medfed.study_sections import ClassificationConfig, SegmentationConfig

CLASSES = CountLayout(
    ClassificationConfig(kind="classification", targets={"present": ("no", "yes"), "side": ("none", "left", "right")})
)
OUTLINES = CountLayout(SegmentationConfig(kind="segmentation", classes=("near", "far")))


def class_scores(seed, *, patients=40, images_each=1, scale=2.0):
    generator = np.random.default_rng(seed)
    cases = patients * images_each
    truth = {"present": generator.integers(0, 2, cases), "side": generator.integers(0, 3, cases)}
    logits = {
        name: generator.normal(scale=scale, size=(cases, k)) + 1.5 * np.eye(k)[truth[name]]
        for name, k in (("present", 2), ("side", 3))
    }
    return ClassScores(
        num_classes={"present": 2, "side": 3},
        num_patients=patients,
        patient_N=np.repeat(np.arange(patients), images_each),
        logits=logits,
        truth=truth,
        attributes={},
        embedding_BD=np.zeros((0, 1)),
    )


def outline_scores(seed, *, patients=12, cases=50):
    generator = np.random.default_rng(seed)
    return OutlineScores(
        classes=("near", "far"),
        unit="px",
        num_patients=patients,
        patient_N=generator.integers(0, patients, cases),
        class_N=generator.integers(0, 2, cases),
        dice_N=generator.random(cases),
        hd95_N=np.full(cases, np.nan),
        surface_distance_N=np.full(cases, np.nan),
        attributes={},
        embedding_BD=np.zeros((0, 1)),
    )


def rounded_to_bins(scores):
    """The same cases with each probability in the middle of its bin: all that a histogram knows of it."""
    probability = scores.probabilities("present")[:, 1]
    return (np.minimum((probability * SCORE_BINS).astype(int), SCORE_BINS - 1) + 0.5) / SCORE_BINS


def test_metrics_of_counts_are_those_of_the_cases():
    scores = class_scores(0)
    found = CLASSES.metrics(CLASSES.contributions(scores).sum(axis=0))
    of_cases = {name: value[0] for name, value in scores.metrics(np.ones((1, 40))).items()}
    assert found["balanced-accuracy/side"] == pytest.approx(of_cases["balanced-accuracy/side"])
    assert found["ece/present"] == pytest.approx(of_cases["ece/present"], abs=1e-9)
    assert found["ece"] == pytest.approx(of_cases["ece"], abs=1e-9)
    from sklearn.metrics import roc_auc_score

    assert found["auroc/present"] == pytest.approx(roc_auc_score(scores.truth["present"], rounded_to_bins(scores)))
    assert found["auroc/present"] == pytest.approx(of_cases["auroc/present"], abs=0.03)
    assert set(found) <= CLASSES.names


def test_dice_of_counts_is_the_mean_over_patients():
    scores = outline_scores(1)
    found = OUTLINES.metrics(OUTLINES.contributions(scores).sum(axis=0))
    means = []
    for index in range(2):
        by_patient = [
            scores.dice_N[(scores.patient_N == u) & (scores.class_N == index)].mean()
            for u in range(12)
            if ((scores.patient_N == u) & (scores.class_N == index)).any()
        ]
        means.append(np.mean(by_patient))
    assert [found["dice/near"], found["dice/far"]] == pytest.approx(means)
    assert found["dice"] == pytest.approx(np.mean(means))
    assert set(found) == OUTLINES.names


@given(st.integers(0, 10**6), st.integers(1, 4), st.floats(0.01, 1e4))
def test_no_patient_adds_more_than_the_bound(seed, images_each, scale):
    added = CLASSES.contributions(class_scores(seed, patients=5, images_each=images_each, scale=scale))
    assert added.shape == (5, CLASSES.num_elements)
    assert np.linalg.norm(added, axis=1).max() <= CLASSES.l2_bound
    added = OUTLINES.contributions(outline_scores(seed, patients=5, cases=3 * images_each))
    assert np.linalg.norm(added, axis=1).max() <= OUTLINES.l2_bound


def test_bounds_are_reached_so_that_no_noise_is_wasted():
    sure = ClassScores(
        num_classes={"present": 2, "side": 3},
        num_patients=1,
        patient_N=np.zeros(1, dtype=np.int64),
        logits={"present": np.array([[0.0, 50.0]]), "side": np.array([[50.0, 0.0, 0.0]])},
        truth={"present": np.array([1]), "side": np.array([0])},
        attributes={},
        embedding_BD=np.zeros((0, 1)),
    )
    assert np.linalg.norm(CLASSES.contributions(sure)[0]) == pytest.approx(CLASSES.l2_bound)
    perfect = OutlineScores(
        ("near", "far"),
        "px",
        1,
        np.zeros(2, int),
        np.arange(2),
        np.ones(2),
        np.zeros(2),
        np.zeros(2),
        {},
        np.zeros((0, 1)),
    )
    assert np.linalg.norm(OUTLINES.contributions(perfect)[0]) == pytest.approx(OUTLINES.l2_bound)


@given(st.integers(0, 10**6))
def test_what_a_patient_adds_depends_on_that_patient_alone(seed):
    scores = class_scores(seed, patients=6, images_each=2)
    others = scores.patient_N != 3
    without = ClassScores(
        num_classes=scores.num_classes,
        num_patients=5,
        patient_N=np.unique(scores.patient_N[others], return_inverse=True)[1],
        logits={name: value[others] for name, value in scores.logits.items()},
        truth={name: value[others] for name, value in scores.truth.items()},
        attributes={},
        embedding_BD=np.zeros((0, 1)),
    )
    difference = CLASSES.contributions(scores).sum(axis=0) - CLASSES.contributions(without).sum(axis=0)
    assert np.linalg.norm(difference) <= CLASSES.l2_bound + 1e-9


def test_counts_of_two_sites_add_up_to_those_of_both():
    one, other = class_scores(1, patients=7), class_scores(2, patients=9)
    both = ClassScores(
        num_classes=one.num_classes,
        num_patients=16,
        patient_N=np.arange(16),
        logits={name: np.concatenate([one.logits[name], other.logits[name]]) for name in one.logits},
        truth={name: np.concatenate([one.truth[name], other.truth[name]]) for name in one.truth},
        attributes={},
        embedding_BD=np.zeros((0, 1)),
    )
    summed = CLASSES.contributions(one).sum(axis=0) + CLASSES.contributions(other).sum(axis=0)
    assert CLASSES.metrics(summed) == pytest.approx(CLASSES.metrics(CLASSES.contributions(both).sum(axis=0)))


@given(st.integers(0, 10**6), st.floats(0.1, 100.0))
def test_noised_counts_mean_numbers_between_0_and_1_or_nothing(seed, noise_std):
    noise = np.random.default_rng(seed).normal(scale=noise_std, size=CLASSES.num_elements)
    found = CLASSES.metrics(CLASSES.contributions(class_scores(0)).sum(axis=0) + noise)
    assert all(0.0 <= value <= 1.0 for value in found.values())


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_patient_whose_scores_are_not_finite_adds_zeros_and_changes_no_other(value):
    whole = CLASSES.contributions(class_scores(0, patients=6, images_each=2))
    scores = class_scores(0, patients=6, images_each=2)
    scores.logits["side"][3, 1] = value
    added = CLASSES.contributions(scores)
    assert not added[1].any()
    assert np.array_equal(np.delete(added, 1, axis=0), np.delete(whole, 1, axis=0))


def test_no_counts_mean_nothing():
    assert CLASSES.metrics(np.zeros(CLASSES.num_elements)) == {}
    assert OUTLINES.metrics(np.zeros(OUTLINES.num_elements)) == {}
