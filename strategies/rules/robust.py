"""Flower's robust aggregations: a few sites that send anything at all do not move the result far.

The functions are Flower's own, on the change of every tensor, A and B alike as in FedIT; weights of sites are ignored,
since a site could lie about its size. How many malicious sites are withstood follows from how many replied: as many
as each method's theorem allows. With fewer than three replies there is no majority, and the median is taken, which
then is the mean.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping
from typing import ClassVar

import torch
from flwr.common import NDArrays
from flwr.server.strategy.aggregate import (
    aggregate_bulyan,
    aggregate_krum,
    aggregate_median,
    aggregate_trimmed_avg,
)

from medfed.errors import StudyError
from strategies.strategy import IndividualRule, Setting, State, Tree
from strategies.subspace import Subspace

Changes = list[tuple[NDArrays, int]]
"""As Flower's functions take them: arrays of a site, and its number of examples, always 1."""

TRIMMED = 0.2
"""Share of values that is cut off at each end; the default of Flower's ``FedTrimmedAvg``."""


class RobustRule(IndividualRule):
    """Everything trains; what the sites' changes come to is Flower's to say.

    Attributes:
        least_sites: of which one may be malicious.

    Raises:
        StudyError: for a study of fewer sites.
    """

    exact = False
    least_sites: ClassVar[int]

    def __init__(self, setting: Setting) -> None:
        super().__init__(setting)
        if setting.num_sites < self.least_sites:
            raise StudyError(
                f"Expected at least {self.least_sites} sites for strategy {self.name!r}, which withstands no malicious "
                f"one among fewer, got {setting.num_sites}; use another strategy."
            )

    def trainable(self, round_number: int) -> Subspace:
        """All tensors."""
        return Subspace.everything(self.manifest)

    @abstractmethod
    def robust(self, changes: Changes) -> NDArrays:
        """The change to make, from those of at least three sites."""

    def merge(self, round_number: int, state: State, deltas: Mapping[str, Tree], weights: Mapping[str, float]) -> State:
        """The state moved by the robust change."""
        names = list(next(iter(deltas.values())))
        changes: Changes = [([delta[name].numpy() for name in names], 1) for delta in deltas.values()]
        arrays = aggregate_median(changes) if len(changes) < 3 else self.robust(changes)
        change = {name: torch.as_tensor(array, dtype=torch.float32) for name, array in zip(names, arrays, strict=True)}
        return self.post(round_number, state, change)


class Krum(RobustRule):
    """The change of the one site that is closest to its neighbours (Blanchard et al. 2017): 2 f + 3 sites."""

    name = "krum"
    least_sites = 5

    def robust(self, changes: Changes) -> NDArrays:
        """One site's change."""
        return aggregate_krum(changes, _krum_malicious(len(changes)), to_keep=0)


class MultiKrum(RobustRule):
    """The mean of the n - f - 2 sites that are closest to their neighbours (Blanchard et al. 2017): 2 f + 3 sites."""

    name = "multi-krum"
    least_sites = 5

    def robust(self, changes: Changes) -> NDArrays:
        """Several sites' mean change."""
        malicious = _krum_malicious(len(changes))
        return aggregate_krum(changes, malicious, to_keep=len(changes) - malicious - 2)


class Bulyan(RobustRule):
    """Krum's choices, averaged around their median (El Mhamdi et al. 2018): 4 f + 3 sites."""

    name = "bulyan"
    least_sites = 7

    def robust(self, changes: Changes) -> NDArrays:
        """Of each element, the mean of the values that are closest to the median."""
        return aggregate_bulyan(changes, (len(changes) - 3) // 4, aggregate_krum, to_keep=0)


class Median(RobustRule):
    """The median of every element (Yin et al. 2018): fewer than half of the sites."""

    name = "median"
    least_sites = 3

    def robust(self, changes: Changes) -> NDArrays:
        """Element by element."""
        return aggregate_median(changes)


class TrimmedMean(RobustRule):
    """The mean of every element without a fifth of the values at each end (Yin et al. 2018): a fifth of the sites."""

    name = "trimmed-mean"
    least_sites = 5

    def robust(self, changes: Changes) -> NDArrays:
        """Element by element."""
        return aggregate_trimmed_avg(changes, TRIMMED)


def _krum_malicious(num_sites: int) -> int:
    """The largest f with 2 f + 3 sites."""
    return (num_sites - 3) // 2
