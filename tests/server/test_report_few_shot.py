"""What the report says of a few-shot curve, in words: no more than its numbers allow."""

import pytest

from server.evaluation import Measured
from server.few_shot import FewShot, FewShotPoint
from server.report_few_shot import few_shot_view

LABELS = {"zero_shot": "zero-shot", "local_only": "local-only", "federated": "federated", "pooled": "pooled"}
CLEAR, UNCLEAR = Measured(value=0.1, low=0.05, high=0.15), Measured(value=0.02, low=-0.02, high=0.05)


def curve(
    alone: tuple[float, ...] | None, together: tuple[float, ...], joining: Measured = CLEAR, *, largest: int = 5
) -> FewShot:
    """A curve over 1, 2, ... and all patients; the smaller site has 3."""

    def point(index: int, number: int) -> FewShotPoint:
        values = {"federated": together[index]} | ({} if alone is None else {"local_only": alone[index]})
        mean = {column: Measured(value=value, low=value - 0.01, high=value + 0.01) for column, value in values.items()}
        return FewShotPoint(
            patients=number,
            patients_at={"north": number, "south": min(number, 3)},
            mean=mean,
            sites={"north": mean},
            joining=None if alone is None else joining,
            joining_at={},
        )

    before = FewShotPoint(
        patients=0,
        patients_at={"north": 0, "south": 0},
        mean={"zero_shot": Measured(value=0.4)},
        sites={},
        joining=None,
        joining_at={},
    )
    numbers = [*range(1, len(together)), largest]
    points = [point(index, number) for index, number in enumerate(numbers)]
    return FewShot(resamples=2000, metric="dice", points=(before, *points))


def sentence(*arguments: object, **changes: object) -> str:
    return few_shot_view(curve(*arguments, **changes), LABELS, "Dice").sentence  # type: ignore[arg-type]


def test_curve_is_told_in_numbers_and_in_patients() -> None:
    assert sentence((0.5, 0.6, 0.8), (0.6, 0.7, 0.85)) == (
        "With 1 training patient at each site the federation reaches Dice 0.600 and a site alone 0.500, a difference "
        "of +0.100 (+0.050 to +0.150). With all of them they reach 0.850 and 0.800, a difference of +0.100 (+0.050 to "
        "+0.150). In the mean of sites, training alone needs 2 training patients for what the federation reaches with "
        "1 training patient of each."
    )


@pytest.mark.parametrize(
    ("alone", "together", "end"),
    [
        ((0.5, 0.55, 0.8), (0.6, 0.7, 0.85), "training alone needs all patients for what the federation reaches with"),
        ((0.5, 0.5, 0.5), (0.6, 0.7, 0.85), "training alone does not reach with all patients what the federation"),
        ((0.6004, 0.7, 0.8), (0.6, 0.7, 0.85), "training alone is as good with 1 training patient."),
    ],
)
def test_catching_up_is_told_whichever_way_it_went(
    alone: tuple[float, ...], together: tuple[float, ...], end: str
) -> None:
    assert end in sentence(alone, together)


def test_difference_within_its_interval_is_not_claimed() -> None:
    told = sentence((0.5, 0.6), (0.6, 0.7), UNCLEAR)
    assert told.count("a difference of +0.020 (-0.020 to +0.050), not told from chance.") == 2
    assert "a difference of +0.300, not told from chance." in sentence((0.5, 0.6), (0.6, 0.7), Measured(value=0.3))


def test_federation_by_itself_is_compared_with_nothing() -> None:
    view = few_shot_view(curve(None, (0.6, 0.7)), LABELS, "Dice")
    assert view.sentence == (
        "With 1 training patient at each site the federation reaches Dice 0.600; with all of them, 0.700."
    )
    assert view.headings == ("federated",)
    assert not view.has_joining


def test_table_begins_with_the_model_that_all_arms_share_and_ends_with_all_patients() -> None:
    view = few_shot_view(curve((0.5, 0.6), (0.6, 0.7)), LABELS, "Dice")
    assert view.headings == ("local-only", "federated")
    assert view.has_joining
    assert [row.label for row in view.rows] == ["0", "1", "all (3 to 5)"]
    assert view.rows[0].cells == (Measured(value=0.4), Measured(value=0.4))
    assert [row.joining for row in view.rows] == [None, CLEAR, CLEAR]
    assert few_shot_view(curve(None, (0.6, 0.7), largest=3), LABELS, "Dice").rows[-1].label == "all (3)"


def test_drawing_is_the_same_every_time_and_shows_every_point() -> None:
    svg = [few_shot_view(curve((0.5, 0.6), (0.6, 0.7)), LABELS, "Dice").svg for _ in range(2)]
    assert svg[0] == svg[1]
    for shown in (">local-only<", ">federated<", ">zero-shot<", ">all (3 to 5)<", "training patients at each site"):
        assert shown in svg[0]
    assert ">pooled<" not in svg[0]
