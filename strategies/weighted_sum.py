"""The sum over sites: the only thing a sum-only strategy ever sees of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor


def weighted_sum(uploads: Mapping[str, Tensor], weights: Mapping[str, float], site_order: Sequence[str]) -> Tensor:
    """The sum of weight times upload over the sites that replied: float64, shape (P,).

    Args:
        uploads: flat vectors of equal shape (P,) by site, at least one.
        weights: public weight of each site, > 0.
        site_order: all sites in the order of the study. The sum runs in this order, in float64, so the result does
            not depend on who answered first or on how many workers there were.
    """
    total_P = torch.zeros_like(next(iter(uploads.values())), dtype=torch.float64)
    for site in (site for site in site_order if site in uploads):
        total_P.add_(uploads[site], alpha=weights[site])
    return total_P
