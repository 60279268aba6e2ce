"""The hospital's gate: what it does not allow is refused, in plain words with the numbers."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from client.policy import SitePolicy, read_policy
from medfed.errors import PolicyError, SiteError
from medfed.study import StudyConfig


@pytest.fixture
def private(make_private_study: Callable[..., StudyConfig]) -> StudyConfig:
    return make_private_study(("north",))


def policy(*studies: StudyConfig, **changes: Any) -> SitePolicy:
    return SitePolicy.model_validate(
        {
            "approved_studies": [study.digest for study in studies],
            "minimum_patients": 3,
            "allow_unprotected": False,
            "budget": {"epsilon": 8.0, "delta": 1e-3, "unit": "patient"},
            **changes,
        }
    )


def test_an_approved_study_on_a_large_enough_cohort_may_train(private: StudyConfig) -> None:
    allowed = policy(private)
    allowed.check_study(private)
    allowed.check_cohort(num_patients=3, num_units=3, declared=3)


def test_a_study_that_was_changed_after_approval_is_refused_with_its_digest(private: StudyConfig) -> None:
    changed = private.replace(seed=6)
    with pytest.raises(
        PolicyError, match=rf"Expected one of 1 approved studies, got 'small' with digest {changed.digest}"
    ):
        policy(private).check_study(changed)


@pytest.mark.parametrize("trust", ["none", "absent"])
def test_an_unprotected_study_is_refused_unless_the_hospital_allows_it(
    make_study: Callable[..., StudyConfig], private: StudyConfig, trust: str
) -> None:
    if trust == "none":
        assert private.privacy is not None
        unprotected = private.replace(
            privacy={**private.privacy.model_dump(), "trust": "none", "noise_multiplier": None}
        )
    else:
        unprotected = make_study(("south",))
    with pytest.raises(PolicyError, match=r"which protects nobody; .* set allow_unprotected = true"):
        policy(unprotected).check_study(unprotected)
    policy(unprotected, allow_unprotected=True).check_study(unprotected)


def test_a_private_study_without_a_budget_is_refused(private: StudyConfig) -> None:
    with pytest.raises(PolicyError, match=r"Expected a \[budget\] for 'small'"):
        policy(private, budget=None).check_study(private)


def test_a_study_that_protects_another_unit_is_refused(private: StudyConfig) -> None:
    records = policy(private, budget={"epsilon": 8.0, "delta": 1e-3, "unit": "record"})
    with pytest.raises(PolicyError, match="protection of each record, got 'small', which protects each patient"):
        records.check_study(private)


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ({"num_patients": 2, "num_units": 2, "declared": 2}, "at least 3 training patients, got 2"),
        ({"num_patients": 3, "num_units": 3, "declared": 4}, "declared_patients of at most 3, .* got 4"),
    ],
)
def test_a_cohort_that_is_too_small_for_what_is_promised_is_refused(
    private: StudyConfig, sizes: dict[str, int], message: str
) -> None:
    with pytest.raises(PolicyError, match=message):
        policy(private).check_cohort(**sizes)


def test_a_policy_is_read_from_toml(private: StudyConfig, tmp_path: Path) -> None:
    path = tmp_path / "policy.toml"
    path.write_text(
        f'approved_studies = ["{private.digest}"]\nminimum_patients = 3\nallow_unprotected = false\n'
        '[budget]\nepsilon = 8.0\ndelta = 1e-3\nunit = "patient"\n'
    )
    assert read_policy(path) == policy(private)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "minimum_patients: Field required"),
        ("approved_studies = []\nminimum_patients = 3\nallow_unprotected = false\nepsilon = 8\n", "epsilon: Extra"),
        ('approved_studies = ["abc"]\nminimum_patients = 3\nallow_unprotected = false\n', "approved_studies.0"),
        ("minimum_patients = ", "a readable policy in TOML"),
        (None, "a readable policy in TOML"),
    ],
)
def test_a_policy_that_is_not_one_is_refused_and_nothing_trains(tmp_path: Path, text: str | None, message: str) -> None:
    path = tmp_path / "policy.toml"
    if text is not None:
        path.write_text(text)
    with pytest.raises(SiteError, match=message):
        read_policy(path)
