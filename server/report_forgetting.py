"""What a report says of structures that a study does not train: a sentence and a table."""

from __future__ import annotations

from dataclasses import dataclass

from server.evaluation import Forgetting, Skill
from server.listed import listed

_NEITHER, _OTHER = "trained on neither side", "other side of a trained one"


@dataclass(frozen=True)
class ForgettingRow:
    """One structure, or the mean of several.

    Attributes:
        label: its name.
        kind: what of it is trained.
        cases: held-out images with it; None for a mean.
        skill: before, after and change.
    """

    label: str
    kind: str
    cases: int | None
    skill: Skill


@dataclass(frozen=True)
class ForgettingView:
    """What the report shows.

    Attributes:
        sentence: the answer in words, no more than its intervals allow.
        rows: structures trained on neither side, then mirror images of trained ones; a mean where there are several.
    """

    sentence: str
    rows: tuple[ForgettingRow, ...]


def forgetting_view(forgetting: Forgetting) -> ForgettingView | None:
    """What the report shows; None if no structure occurs."""
    if not forgetting.structures:
        return None
    rows: list[ForgettingRow] = []
    groups = ((False, _NEITHER, forgetting.neither_side), (True, _OTHER, forgetting.other_sides))
    for other_side, kind, mean in groups:
        members = [
            ForgettingRow(name, kind, found.cases, found)
            for name, found in forgetting.structures.items()
            if found.other_side == other_side
        ]
        rows += members
        if len(members) > 1 and mean is not None:
            rows.append(ForgettingRow("mean", kind, None, mean))
    return ForgettingView(_sentence(forgetting), tuple(rows))


def _sentence(forgetting: Forgetting) -> str:
    lost = [name for name, found in forgetting.structures.items() if _is_told(found) and found.change.value < 0]
    gained = [name for name, found in forgetting.structures.items() if _is_told(found) and found.change.value > 0]
    parts = []
    if lost:
        parts.append(f"It outlines {listed(lost)} worse than the backbone as it was published did")
    if gained:
        parts.append(f"{'it outlines' if lost else 'It outlines'} {listed(gained)} better"
                     f"{'' if lost else ' than the backbone as it was published did'}")  # fmt: skip
    if parts:
        parts[-1] += ", by more than resampling the patients explains"
    rest = len(forgetting.structures) - len(lost) - len(gained)
    if rest and parts:
        parts.append(f"for the other {rest} the change is not told from chance")
    elif rest:
        parts.append("For no structure is the change told from chance")
    flips = forgetting.flips
    return (
        f"{'; '.join(parts)}. Of {flips.cases} outlines {flips.lost} are clearly worse (Dice lower by over 0.05) and "
        f"{flips.gained} clearly better."
    )


def _is_told(skill: Skill) -> bool:
    return skill.change.is_told_from_zero
