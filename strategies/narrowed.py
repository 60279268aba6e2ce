"""Sites of a smaller rank: the part of a round's subspace that such a site trains.

A site of rank k in an adapter of rank r trains the first k of r columns of B, and of rows of A, of whatever a round
trains of them; it computes with all of the adapter. Its change is zero elsewhere and travels under everybody's
manifest: so a mean over sites is the mean of their models wherever a rule is linear, and no rule need know. Of rules
that are not, the mean is not that of the sites' models: they are refused.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

from torch import Tensor

from medfed.adapter_manifest import TensorSpec
from medfed.errors import StudyError
from medfed.study import StudyConfig
from strategies.federation import Strategy
from strategies.lora import is_a, is_b
from strategies.strategy import Phase, Rule
from strategies.subspace import Core, Part, Slice, Subspace, Whole


@dataclass(frozen=True, eq=False)
class FirstColumns(Part):
    """The first columns of a core: R in the first columns of B = F R.

    Attributes:
        core: of all columns.
        count: how many of them.
    """

    core: Core
    count: int

    def shape(self, spec: TensorSpec) -> tuple[int, ...]:
        """The core's with fewer columns."""
        return (self.core.shape(spec)[0], self.count)

    def coordinates(self, tensor: Tensor) -> Tensor:
        """F^T times the first columns."""
        return self.core.coordinates(tensor[..., : self.count])

    def put(self, tensor: Tensor, coordinates: Tensor) -> None:
        """Replaces the first columns."""
        self.core.put(tensor[..., : self.count], coordinates)


def trainable_of(rule: Rule, phase: Phase, site: str) -> Subspace:
    """What a site trains in a phase: all of it, unless the study gives the site a smaller rank."""
    rank = rule.setting.rank_of.get(site)
    return phase.trainable if rank is None else narrowed(phase.trainable, rank)


@lru_cache(maxsize=256)
def narrowed(subspace: Subspace, rank: int) -> Subspace:
    """The subspace with the first ``rank`` of the adapter's ranks in each LoRA pair; heads stay whole.

    Where only a slice of the ranks trains, its first part in proportion.

    Raises:
        StudyError: if that is no whole number of columns or rows.
    """
    full = subspace.adapter.rank
    if full is None or rank >= full:
        return subspace
    parts = {name: _first(part, name, rank, full) for name, part in subspace.parts.items()}
    return Subspace(subspace.adapter, parts)


def _first(part: Part, name: str, rank: int, full: int) -> Part:
    if not (is_a(name) or is_b(name)):
        return part
    axis = 0 if is_a(name) else 1
    match part:
        case Whole():
            return Slice(axis, 0, rank)
        case Slice() if part.axis == axis:
            kept, rest = divmod((part.stop - part.start) * rank, full)
            if rest or not kept:
                raise StudyError(
                    f"Expected a site's rank of which {part.stop - part.start} / {full} is a whole number, as that "
                    f"share of an adapter's ranks trains on each side, got {rank}; use an even one."
                )
            return Slice(axis, part.start, part.start + kept)
        case Core():
            return FirstColumns(part, rank)
        case _:
            raise StudyError(f"Expected a part of {name} that can be narrowed to rank {rank}, got {part}.")


def check_ranks(study: StudyConfig, strategy: Strategy) -> None:
    """Refuse sites of smaller rank where the result would not be the mean of their models.

    Raises:
        StudyError: names the rule, or the part of the study, that does not go with them.
    """
    ranks = strategy.rule.setting.rank_of
    if not ranks:
        return
    if not strategy.rule.takes_ranks:
        raise StudyError(
            f"Expected sites of one rank for strategy {strategy.rule.name!r}, which would not give the mean of the "
            "sites' models otherwise, got a site with 'rank'; remove it, or use 'twin-fresh' or 'ffa-lora'."
        )
    if strategy.local.pulls:
        raise StudyError(
            f"Expected sites of one rank for {strategy.local.name!r}, which pulls along all that trains, got a site "
            "with 'rank'; remove one of them."
        )
    if study.strategy.shrinkage:
        raise StudyError(
            "Expected sites of one rank for strategy.shrinkage, which needs noise of one size in all of an update, "
            "got a site with 'rank'; remove one of them."
        )
    for phase in strategy.phases:
        for site in ranks:
            trainable_of(strategy.rule, phase, site)
