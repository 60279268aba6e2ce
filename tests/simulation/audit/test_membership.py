"""Membership inference: areas and hits beside their definitions."""

import numpy as np
import pytest

from privacy.audit.game import clopper_pearson
from simulation.audit.membership import membership


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
