"""A few training patients: nested, fixed by the seed alone, and never those held out."""

from itertools import pairwise

import torch
from hypothesis import given
from hypothesis import strategies as st

from client.data import Cohort, Item
from client.few_patients import FewPatients, training_on

IDS = st.lists(st.text(min_size=1, max_size=6), min_size=1, max_size=12)


@given(IDS, st.integers(0, 2**63 - 1), st.randoms(use_true_random=False))
def test_fewer_are_among_more_whatever_the_order(ids: list[str], seed: int, random) -> None:
    shuffled = random.sample(ids, len(ids))
    found = [FewPatients(count, seed).of(ids) for count in range(1, len(set(ids)) + 2)]
    assert found == [FewPatients(count, seed).of(shuffled * 2) for count in range(1, len(set(ids)) + 2)]
    for count, (fewer, more) in enumerate(pairwise(found), start=1):
        assert len(fewer) == count
        assert fewer <= more <= set(ids)
    assert found[-1] == set(ids)


def test_every_patient_comes_first_about_as_often_as_any_other() -> None:
    first = [next(iter(FewPatients(1, seed).of("abcd"))) for seed in range(2000)]
    assert all(abs(first.count(patient) - 500) < 4 * (2000 * 0.25 * 0.75) ** 0.5 for patient in "abcd")


def test_cohort_keeps_its_held_out_patients_and_its_order() -> None:
    def item(patient: str) -> Item:
        return Item(patient, "north", torch.zeros(1, 1, 1), None, "", "")

    cohort = Cohort("north", tuple(map(item, "cabacb")), tuple(map(item, "xy")))
    few = training_on(cohort, frozenset("cb"))
    assert "".join(one.patient_id for one in few.train) == "cbcb"
    assert few.test == cohort.test
    assert few.digest != cohort.digest
