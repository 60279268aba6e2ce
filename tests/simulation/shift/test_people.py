"""Labels, demographics, presets and quantities: seeded, at the rates they say, and refused where they mean nothing."""

from __future__ import annotations

from collections import Counter
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from medfed.errors import StudyError
from medfed.quantity import spread
from medfed.shift_presets import PRESETS, resolved
from medfed.shift_profile import AnnotatorShift, DemographicShift, LabelShift, MissingShift, QuantityShift, ShiftProfile
from simulation.lesions import sample_lesion
from simulation.shift.demographics import Person, draw_person, embody
from simulation.shift.draws import Drawn
from simulation.shift.labels import LESION_TYPES, draw_lesion, lesion_proportions, prevalence_of
from simulation.shift.patient import ShiftedPatient
from simulation.warp import PatientWarp, SlicePlane, sample_patient_warp

SITE = Drawn(3, ("north",))


def patient(number: int = 0, *, is_held_out: bool = False, **families: Any) -> ShiftedPatient:
    return ShiftedPatient(ShiftProfile(**families), SITE, SITE.of(number), is_held_out)


def within(count: int, total: int, probability: float) -> bool:
    """Within four standard deviations of a binomial count."""
    return abs(count - total * probability) <= 4 * np.sqrt(total * probability * (1 - probability)) + 1e-9


@pytest.mark.parametrize(("finding", "source", "share"), [("effusion", "chexpert", 0.386), ("edema", "nih", 0.021)])
def test_prevalence_is_that_of_the_table(finding: str, source: str, share: float) -> None:
    assert prevalence_of(finding, source) == pytest.approx(share)
    with pytest.raises(ValueError, match="Expected a finding of"):
        prevalence_of(finding, "mimic")


@pytest.mark.parametrize("share", [0.386, 0.031])
def test_patients_who_draw_have_lesions_at_the_prevalence(share: float) -> None:
    shift = LabelShift(concentration=1e6)
    found = [patient(number, labels=shift).lesion(None, share) for number in range(600)]
    assert within(sum(lesion is not None for lesion in found), 600, share)


@settings(max_examples=40)
@given(st.floats(0.01, 0.99), st.floats(0.05, 50), st.integers(0, 10**6))
def test_proportions_sum_to_one_and_follow_the_seed(prevalence: float, alpha: float, seed: int) -> None:
    shift, site = LabelShift(concentration=alpha), Drawn(seed, ("north",))
    proportions = lesion_proportions(prevalence, shift, (), site)
    assert proportions.sum() == pytest.approx(1.0)
    assert (proportions >= 0).all()
    assert np.array_equal(proportions, lesion_proportions(prevalence, shift, (), site))


def test_large_concentration_gives_the_common_proportions_and_a_small_one_does_not() -> None:
    common = lesion_proportions(0.6, None, (), SITE)
    np.testing.assert_allclose(common, [0.4, 0.15, 0.15, 0.15, 0.15])
    near = lesion_proportions(0.6, LabelShift(concentration=1e5), (), SITE)
    far = [lesion_proportions(0.6, LabelShift(concentration=0.2), (), Drawn(seed, ())) for seed in range(20)]
    np.testing.assert_allclose(near, common, atol=0.02)
    assert np.mean([np.abs(one - common).sum() for one in far]) > 0.8


def test_classes_that_never_come_never_come_and_prevalence_stays() -> None:
    missing = MissingShift(classes=("left",))
    found = [patient(number, missing=missing).lesion(None, 0.5) for number in range(400)]
    lesions = [lesion for lesion in found if lesion is not None]
    assert {lesion.side for lesion in lesions} == {"right"}
    assert {lesion.size for lesion in lesions} == {"small", "large"}
    assert within(len(lesions), 400, 0.5)
    with pytest.raises(ValueError, match="name fewer classes"):
        lesion_proportions(0.5, None, ("left", "right"), SITE)


def test_drawn_lesion_is_of_the_type_that_was_drawn() -> None:
    for index, kind in enumerate(LESION_TYPES):
        lesion = draw_lesion(np.eye(len(LESION_TYPES))[index], np.random.default_rng(index))
        assert (None if lesion is None else (lesion.side, lesion.size)) == kind


def test_hospital_without_a_label_shift_leaves_the_usual_lesion() -> None:
    lesion = sample_lesion(np.random.default_rng(0))
    assert patient().lesion(lesion, 0.5) is lesion
    assert patient().lesion(None, 0.5) is None


def test_overlooked_and_unlabelled_lesions_count_as_absent_at_their_rates_in_training_alone() -> None:
    lesion, mask = sample_lesion(np.random.default_rng(0)), np.ones((4, 4), dtype=np.uint8)
    for families in ({"missing": MissingShift(labels=0.3)}, {"annotator": AnnotatorShift(misses=0.3)}):
        absent = 0
        for number in range(300):
            targets, outline = patient(number, **families).finding(lesion, mask, index=0)
            absent += targets["lesion_present"] == 0
            assert outline.any() == bool(targets["lesion_present"])
            held_out, _ = patient(number, is_held_out=True, **families).finding(lesion, mask, index=0)
            assert held_out["lesion_present"] == 1
        assert within(absent, 300, 0.3)


def test_missing_structures_and_patients_are_not_outlined() -> None:
    label = np.array([[0, 1], [2, 3]], dtype=np.uint8)
    names = ("thalamus", "putamen", "caudate")
    without = patient(missing=MissingShift(classes=("putamen",))).structures(label, names, index=0)
    assert without.tolist() == [[0, 1], [0, 3]]
    empty = [patient(n, missing=MissingShift(labels=0.4)).structures(label, names, index=0).any() for n in range(300)]
    assert within(empty.count(False), 300, 0.4)
    # A patient is unlabelled in all images or in none.
    for number in range(20):
        one = patient(number, missing=MissingShift(labels=0.5))
        assert len({bool(one.structures(label, names, index=index).any()) for index in range(4)}) == 1


def test_people_come_in_the_mix_of_the_site() -> None:
    mix = DemographicShift(female=0.3, age_groups=(0.1, 0.3, 0.6))
    people = [draw_person(mix, SITE.of(number)("demographics")) for number in range(800)]
    assert within(sum(one.sex == "female" for one in people), 800, 0.3)
    ages = Counter(one.age_group for one in people)
    for group, share in (("under-40", 0.1), ("40-64", 0.3), ("65-plus", 0.6)):
        assert within(ages[group], 800, share)


def brain_volume(warp: PatientWarp) -> float:
    """Of the patient, relative to the template's: one over the determinant of the affine part."""
    return 1.0 / float(np.linalg.det(warp.matrix_34[:, :3]))


def test_mens_brains_are_eleven_per_cent_larger_and_old_ones_smaller() -> None:
    warp = sample_patient_warp(np.random.default_rng(0))
    young = {sex: brain_volume(embody(warp, Person(sex, "under-40"))) for sex in ("female", "male")}
    assert young["male"] / young["female"] == pytest.approx(1.11)
    assert np.sqrt(young["male"] * young["female"]) == pytest.approx(brain_volume(warp))
    old = brain_volume(embody(warp, Person("male", "65-plus")))
    assert 0.92 < old / young["male"] < 0.96


def test_centre_of_the_head_stays_where_it_is_and_nothing_folds() -> None:
    for seed in range(3):
        warp = sample_patient_warp(np.random.default_rng(seed))
        for sex in ("female", "male"):
            for age in ("under-40", "40-64", "65-plus"):
                assert float(embody(warp, Person(sex, age)).jacobian_determinant().min()) > 0


def test_ventricles_of_old_people_are_wider() -> None:
    """Pixels of an axial slice that come from the ventricles' middle, 10 mm around it in the atlas."""
    warp = sample_patient_warp(np.random.default_rng(1))
    points = SlicePlane("axial", 16.0, 128).pixel_centres()
    areas = []
    for age in ("under-40", "40-64", "65-plus"):
        atlas = embody(warp, Person("male", age)).to_atlas(points)
        areas.append(int(((atlas - atlas.new_tensor([0.0, -12.0, 16.0])).norm(dim=-1) < 12).sum()))
    assert areas[0] < areas[1] < areas[2]
    assert areas[2] > 1.2 * areas[0]


@pytest.mark.parametrize("name", PRESETS)
def test_preset_is_listed_under_its_name_and_stands_alone(name: str) -> None:
    preset = PRESETS[name]
    assert preset.name == name
    assert preset.description
    assert not preset.profile.presets
    assert resolved(ShiftProfile(presets=(name,))) == preset.profile


def test_presets_combine_and_what_is_written_out_wins() -> None:
    profile = ShiftProfile.model_validate(
        {"presets": ["low-field", "hasty-annotator"], "noise": {"sd": [0.0, 0.0]}}
    )  # fmt: skip
    both = resolved(profile)
    assert set(both.families) == {"contrast", "point_spread", "noise", "annotator"}
    assert both.noise is not None
    assert both.noise.sd == (0.0, 0.0)
    with pytest.raises(ValueError, match="Expected a preset of"):
        resolved(ShiftProfile(presets=("low-feild",)))


@settings(max_examples=50)
@given(st.integers(1, 12), st.integers(1, 5), st.integers(0, 300), st.floats(0.05, 50), st.integers(0, 10**6))
def test_patients_are_spread_to_the_total_and_no_site_gets_less_than_the_least(
    num_sites: int, least: int, more: int, alpha: float, seed: int
) -> None:
    total = num_sites * least + more
    counts = spread(QuantityShift(total_train_patients=total, concentration=alpha, least=least), num_sites, seed)
    assert sum(counts) == total
    assert min(counts) >= least
    assert counts == spread(
        QuantityShift(total_train_patients=total, concentration=alpha, least=least), num_sites, seed
    )


def test_fewer_patients_than_the_least_of_each_are_refused() -> None:
    with pytest.raises(StudyError, match="lower least"):
        spread(QuantityShift(total_train_patients=5, concentration=1.0, least=2), 3, 0)
