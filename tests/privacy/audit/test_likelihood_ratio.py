"""The likelihood-ratio attack: densities as defined, as strong as theory says, blind where there is nothing to see."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import norm, rankdata

from privacy.audit.likelihood_ratio import at_the_shadows_level, each_in_turn, log_likelihood_ratios, scaled


def game(
    *, shadows: int, patients: int, shift: float, seed: int, hardness: float = 3.0
) -> tuple[np.ndarray, np.ndarray]:
    """Scores of shadows on patients of different hardness; having seen one adds ``shift`` standard deviations."""
    generator = np.random.default_rng(seed)
    included = generator.random((shadows, patients)) < 0.5
    hard = generator.normal(0, hardness, size=patients)
    return hard + generator.normal(size=included.shape) + shift * included, included


def area(scores: np.ndarray, included: np.ndarray) -> float:
    ranks = rankdata(scores.ravel())[included.ravel()]
    members, others = int(included.sum()), int((~included).sum())
    return float((ranks.sum() - members * (members + 1) / 2) / (members * others))


@given(st.floats(1e-9, 500.0))
def test_scaled_losses_are_log_odds(loss: float) -> None:
    probability = np.exp(-np.longdouble(loss))
    expected = float(np.log(probability) - np.log1p(-probability)) if loss > 1e-6 else -np.log(loss)
    assert scaled(np.array([loss]))[0] == pytest.approx(expected, rel=1e-5, abs=1e-9)


def test_scaled_losses_at_the_edges() -> None:
    found = scaled(np.array([0.0, np.log(2.0), 1e300, np.inf]))
    assert found[0] == pytest.approx(27.63, abs=0.01)
    assert found[1] == pytest.approx(0.0)
    assert found[2] == -1e300
    assert found[3] == -np.inf
    for broken in (-1e-3, np.nan):
        with pytest.raises(ValueError, match="losses >= 0"):
            scaled(np.array([broken]))


def test_ratios_are_those_of_the_densities() -> None:
    shadow, included = game(shadows=12, patients=5, shift=1.0, seed=0)
    scores = np.random.default_rng(1).normal(size=5)
    found = log_likelihood_ratios(scores, shadow, included)

    def density(patient: int, chosen: np.ndarray) -> float:
        deviations = [
            shadow[k, n] - shadow[chosen[:, n], n].mean() for n in range(5) for k in range(12) if chosen[k, n]
        ]
        variance = sum(d**2 for d in deviations) / (len(deviations) - 5)
        own = shadow[chosen[:, patient], patient]
        return float(norm.logpdf(scores[patient], own.mean(), np.sqrt(variance * (1 + 1 / len(own)))))

    expected = [density(patient, included) - density(patient, ~included) for patient in range(5)]
    np.testing.assert_allclose(found, expected, rtol=1e-9)


def test_attack_is_as_good_as_the_best_one_and_better_than_the_plain_score() -> None:
    """With many shadows nothing beats Phi(shift / sqrt 2); the plain score drowns in how hard patients are."""
    shadow, included = game(shadows=64, patients=200, shift=1.5, seed=2)
    best = float(norm.cdf(1.5 / np.sqrt(2)))
    assert area(each_in_turn(shadow, included), included) == pytest.approx(best, abs=0.02)
    assert area(shadow, included) < 0.65


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("shadows", [8, 16])
def test_attack_on_nothing_is_a_guess(shadows: int, seed: int) -> None:
    """Few shadows must not tilt it: what one coin says of the others would show here."""
    shadow, included = game(shadows=shadows, patients=800, shift=0.0, seed=seed)
    assert area(each_in_turn(shadow, included), included) == pytest.approx(0.5, abs=0.025)


def test_complementary_halves_would_tilt_it() -> None:
    """Why the halves are drawn independently; the test above can fail."""
    shadow, included = game(shadows=8, patients=800, shift=0.0, seed=0)
    included[4:] = ~included[:4]
    assert abs(area(each_in_turn(shadow, included), included) - 0.5) > 0.025


def test_patient_whom_every_shadow_had_says_nothing() -> None:
    shadow, included = game(shadows=8, patients=6, shift=1.0, seed=3)
    included[:, 0], included[:, 1] = True, False
    found = log_likelihood_ratios(shadow[0], shadow, included)
    assert (found[:2] == 0).all()
    assert (found[2:] != 0).all()


def test_level_of_all_patients_does_not_matter() -> None:
    shadow, _ = game(shadows=16, patients=50, shift=1.0, seed=4)
    scores = shadow[0]
    plain, moved = (at_the_shadows_level(scores + move, shadow[1:]) for move in (0.0, 7.5))
    np.testing.assert_allclose(plain, moved)
    np.testing.assert_array_equal(np.argsort(plain), np.argsort(scores))


def test_infinite_scores_are_very_large_ones() -> None:
    shadow, included = game(shadows=8, patients=4, shift=1.0, seed=5)
    shadow[0, 0] = -np.inf
    assert np.isfinite(log_likelihood_ratios(np.array([0.0, np.inf, 0.0, 0.0]), shadow, included)).all()


@pytest.mark.parametrize(
    ("scores", "shadow", "included"),
    [
        (np.zeros(3), np.zeros((4, 2)), np.zeros((4, 2), dtype=bool)),
        (np.zeros(2), np.zeros((4, 2)), np.zeros((3, 2), dtype=bool)),
        (np.array([np.nan, 0.0]), np.zeros((4, 2)), np.eye(4, 2, dtype=bool)),
        (np.zeros(2), np.zeros((1, 2)), np.ones((1, 2), dtype=bool)),
    ],
)
def test_what_does_not_fit_is_refused(scores: np.ndarray, shadow: np.ndarray, included: np.ndarray) -> None:
    with pytest.raises(ValueError, match="Expected"):
        log_likelihood_ratios(scores, shadow, included)
