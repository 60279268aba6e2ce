"""Membership inference: areas and hits beside their definitions."""

import numpy as np
import pytest

from privacy.audit.game import clopper_pearson
from simulation.audit.membership import membership, membership_in_turn


def test_area_is_the_share_of_pairs_in_the_right_order() -> None:
    generator = np.random.default_rng(0)
    members, others = generator.normal(0.7, 1, size=40), generator.normal(size=30)
    found = membership("loss", members, others, generator=np.random.default_rng(1))
    pairs = [(m > o) + 0.5 * (m == o) for m in members for o in others]
    assert found.auroc == pytest.approx(np.mean(pairs))
    assert found.low < found.auroc < found.high
    assert (found.num_members, found.num_others) == (40, 30)


def test_hits_are_members_beyond_the_allowed_false_alarms() -> None:
    others = np.arange(1000.0)
    members = np.array([995.5, 989.5, 999.5, 500.0])
    at_one_percent, at_a_thousandth = membership("loss", members, others, generator=np.random.default_rng(1)).hits
    assert (at_one_percent.share, at_a_thousandth.share) == (0.75, 0.25)  # above 989, above 998
    assert (at_one_percent.low, at_one_percent.high) == clopper_pearson(3, 4, confidence=0.95)


def test_few_others_allow_no_false_alarm() -> None:
    found = membership("loss", np.array([1.0, 3.0]), np.array([2.0, 0.0]), generator=np.random.default_rng(1))
    assert [hit.share for hit in found.hits] == [0.5, 0.5]


def test_scores_that_say_nothing_give_an_interval_around_one_half() -> None:
    generator = np.random.default_rng(3)
    found = membership("calibrated", generator.normal(size=200), generator.normal(size=200), generator=generator)
    assert found.low < 0.5 < found.high
    assert found.high - found.low < 0.15


def test_models_in_turn_are_pooled_and_their_interval_is_that_of_patients() -> None:
    """Ten models whose scores are one score again and again say no more than one: the interval must not shrink."""
    generator = np.random.default_rng(4)
    included = np.tile(generator.random(60) < 0.5, (10, 1))
    scores = np.tile(generator.normal(size=60), (10, 1)) + 0.5 * included
    one = membership("loss", scores[0][included[0]], scores[0][~included[0]], generator=np.random.default_rng(1))
    ten = membership_in_turn("loss", scores, included, generator=np.random.default_rng(1))
    assert ten.auroc == pytest.approx(one.auroc)
    assert ten.high - ten.low == pytest.approx(one.high - one.low, rel=0.15)
    assert ten.num_members == 10 * one.num_members
    for hit, alone in zip(ten.hits, one.hits, strict=True):
        assert hit.high - hit.low > 0.6 * (alone.high - alone.low)


def test_interval_of_models_in_turn_holds_where_nothing_is_to_be_seen() -> None:
    misses = 0
    for seed in range(8):
        generator = np.random.default_rng(seed)
        included = generator.random((8, 30)) < 0.5
        found = membership_in_turn("loss", generator.normal(size=(8, 30)), included, generator=generator)
        misses += not found.low < 0.5 < found.high
    assert misses <= 1
