"""What the report says of forgetting: only changes that their intervals tell from zero, and which side was trained."""

import pytest

from server.evaluation import Flips, Forgetting, Measured, Skill, UntrainedStructure
from server.report_forgetting import forgetting_view

CHANGES = {
    "worse": Measured(value=-0.05, low=-0.09, high=-0.01),
    "better": Measured(value=0.05, low=0.01, high=0.09),
    "unclear": Measured(value=0.02, low=-0.02, high=0.05),
    "alone": Measured(value=-0.3),
}


def forgetting(*names: str, other_side: tuple[str, ...] = ()) -> Forgetting:
    measured = Measured(value=0.8)
    skill = Skill(before=measured, after=measured, change=CHANGES["unclear"])
    return Forgetting(
        patients=4,
        flips=Flips(cases=9, lost=2, gained=3),
        structures={
            name: UntrainedStructure(
                before=measured,
                after=measured,
                change=CHANGES[name.split("-")[0]],
                cases=3,
                other_side=name in other_side,
            )
            for name in names
        },
        other_sides=skill if other_side else None,
        neither_side=skill,
    )


@pytest.mark.parametrize(
    ("names", "told"),
    [
        (("unclear", "alone"), "For no structure is the change told from chance. "),
        (
            ("worse", "unclear"),
            "It outlines worse worse than the backbone as it was published did, by more than resampling the patients "
            "explains; for the other 1 the change is not told from chance. ",
        ),
        (
            ("better-a", "better-b"),
            "It outlines better-a and better-b better than the backbone as it was published did, by more than "
            "resampling the patients explains. ",
        ),
        (
            ("worse", "better"),
            "It outlines worse worse than the backbone as it was published did; it outlines better better, by more "
            "than resampling the patients explains. ",
        ),
    ],
)
def test_only_what_the_interval_tells_from_zero_is_claimed(names: tuple[str, ...], told: str) -> None:
    view = forgetting_view(forgetting(*names))
    assert view is not None
    assert view.sentence == (f"{told}Of 9 outlines 2 are clearly worse (Dice lower by over 0.05) and 3 clearly better.")


def test_mirror_images_of_trained_structures_stand_apart() -> None:
    view = forgetting_view(forgetting("better-a", "worse", "better-b", other_side=("better-a", "better-b")))
    assert view is not None
    assert [(row.label, row.kind, row.cases) for row in view.rows] == [
        ("worse", "trained on neither side", 3),
        ("better-a", "other side of a trained one", 3),
        ("better-b", "other side of a trained one", 3),
        ("mean", "other side of a trained one", None),
    ]


def test_nothing_is_shown_of_nothing() -> None:
    assert forgetting_view(forgetting()) is None
