"""Whether an embedding has collapsed: how many directions it really uses.

Legend: N images, D features.
"""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

from medfed.errors import MedfedError


def effective_rank(feature_ND: NDArray[np.float64]) -> float:
    """Exponential of the entropy of the singular values, of features less their mean; in [1, min(N - 1, D)].

    Roy and Vetterli 2007, definition 1, on centred features: what all images share is no direction they use.
    A larger cohort can only raise it, so compare values of one cohort alone.

    ============================== ====
    all images alike, or only one  NaN
    NaN or infinity                MedfedError
    ============================== ====
    """
    if not np.isfinite(feature_ND).all():
        raise MedfedError("Expected finite features, got NaN or infinity; the model has diverged.")
    if len(feature_ND) < 2:
        return math.nan
    singular = np.linalg.svd(feature_ND - feature_ND.mean(axis=0), compute_uv=False)
    if singular[0] <= 1e-12 * max(1.0, float(np.abs(feature_ND).max())):
        return math.nan
    share = singular / singular.sum()
    share = share[share > 0]
    return math.exp(float(-(share * np.log(share)).sum()))
