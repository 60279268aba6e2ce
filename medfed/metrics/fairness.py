"""How differently a classifier treats groups of patients: demographic parity and equalised odds.

Differences, not ratios, between the most and the least favoured group, as in Hardt, Price and Srebro 2016
(https://arxiv.org/abs/1610.02413). Groups are told apart by an attribute of the patients; a parity of predictions is
no aim where the disease itself is more common in one group, so both are shown and neither is optimised.

Legend: N cases.
"""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

MIN_GROUP = 5
"""Cases below which a rate is not compared: with fewer it moves by more than 0.2 for one of them."""


def demographic_parity_difference(predicted_N: NDArray[np.bool_], group_N: NDArray[np.int64]) -> float:
    """Largest difference between groups in how often they are predicted positive; in [0, 1], 0 is equal.

    NaN if fewer than two groups have :data:`MIN_GROUP` cases.
    """
    return _spread([float(predicted_N[group_N == group].mean()) for group in _large(group_N)])


def equalised_odds_difference(
    predicted_N: NDArray[np.bool_], truth_N: NDArray[np.bool_], group_N: NDArray[np.int64]
) -> float:
    """The larger of the differences between groups in true and in false positive rate; in [0, 1], 0 is equal.

    A rate is compared between the groups with :data:`MIN_GROUP` cases of that true class; NaN if neither can be.
    """
    spreads = []
    for of_class_N in (truth_N, ~truth_N):
        rates = [float(predicted_N[of_class_N & (group_N == group)].mean()) for group in _large(group_N[of_class_N])]
        spreads.append(_spread(rates))
    defined = [spread for spread in spreads if not math.isnan(spread)]
    return max(defined) if defined else math.nan


def _large(group_N: NDArray[np.int64]) -> list[int]:
    groups, counts = np.unique(group_N, return_counts=True)
    return [int(group) for group, count in zip(groups, counts, strict=True) if count >= MIN_GROUP]


def _spread(rates: list[float]) -> float:
    return max(rates) - min(rates) if len(rates) > 1 else math.nan
