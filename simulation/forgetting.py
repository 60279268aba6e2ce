"""What training took from structures that it never showed: Dice before and after, over all sites' held-out patients.

Legend: R rows of weights (the cohort and its resamples), U patients of all sites, N cases (structures of images).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from medfed.metrics.outline_scores import OutlineScores
from medfed.metrics.resampling import Values, Weights, mean_of_defined, weighted_mean
from server.evaluation import Flips, Forgetting, Skill, UntrainedStructure
from simulation.measured import measured

CLEARLY = 0.05
"""Difference in Dice from which a case counts as lost or gained: about what two experts differ by."""


@dataclass(frozen=True)
class BeforeAndAfter:
    """The same cases of one site, before and after training, and the weights of its patients.

    Attributes:
        before: under the backbone as it was published.
        after: under the federated arm.
        weight_RU: multiplicities of the site's patients.
    """

    before: OutlineScores
    after: OutlineScores
    weight_RU: Weights


def flips_of(before: OutlineScores, after: OutlineScores) -> Flips:
    """How many cases changed clearly; both hold the same cases."""
    change_N = after.dice_N - before.dice_N
    return Flips(cases=len(change_N), lost=int((change_N < -CLEARLY).sum()), gained=int((change_N > CLEARLY).sum()))


def forgetting_of(sites: Sequence[BeforeAndAfter], other_sides: Iterable[str]) -> Forgetting:
    """Skill on every structure that occurs, and its mean over those whose mirror image is trained and those others.

    Patients are resampled within their sites; a mean over structures weighs each the same, however often it occurs.

    Args:
        sites: in any order; of the same structures.
        other_sides: the structures whose mirror image is trained.
    """
    mirrored = frozenset(other_sides)
    found: dict[str, UntrainedStructure] = {}
    values: dict[str, tuple[Values, Values]] = {}
    for index, name in enumerate(sites[0].before.classes):
        is_it = [site.before.class_N == index for site in sites]
        cases = sum(int(is_N.sum()) for is_N in is_it)
        if not cases:
            continue
        weight_RN = np.concatenate(
            [site.weight_RU[:, site.before.patient_N[is_N]] for site, is_N in zip(sites, is_it, strict=True)], axis=1
        )
        dice = [[getattr(site, when).dice_N[is_N] for site, is_N in zip(sites, is_it, strict=True)]
                for when in ("before", "after")]  # fmt: skip
        before_R, after_R = (weighted_mean(np.concatenate(parts), weight_RN) for parts in dice)
        values[name] = (before_R, after_R)
        found[name] = UntrainedStructure(**dict(_skill(before_R, after_R)), cases=cases, other_side=name in mirrored)
    flips = [flips_of(site.before, site.after) for site in sites]
    return Forgetting(
        patients=sum(site.before.num_patients for site in sites),
        flips=Flips(**{part: sum(getattr(of, part) for of in flips) for part in ("cases", "lost", "gained")}),
        structures=found,
        other_sides=_mean_skill({name: both for name, both in values.items() if name in mirrored}),
        neither_side=_mean_skill({name: both for name, both in values.items() if name not in mirrored}),
    )


def _mean_skill(values: Mapping[str, tuple[Values, Values]]) -> Skill | None:
    if not values:
        return None
    before_R, after_R = (mean_of_defined(np.array(parts)) for parts in zip(*values.values(), strict=True))
    return _skill(before_R, after_R)


def _skill(before_R: Values, after_R: Values) -> Skill:
    before, after, change = (measured(value_R) for value_R in (before_R, after_R, after_R - before_R))
    assert before is not None  # a structure is here because a case of it is
    assert after is not None
    assert change is not None
    return Skill(before=before, after=after, change=change)
