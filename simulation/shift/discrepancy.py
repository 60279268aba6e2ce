"""How far two hospitals are apart: the maximum mean discrepancy of their patients, with a test of whether it is chance.

Gretton et al. 2012 (JMLR 13, "A kernel two-sample test"): the unbiased estimate of MMD^2 (their lemma 6, equation 3)
with a Gaussian kernel whose width is the median distance of the pooled sample. What is compared are vectors, one for
each patient; under the null hypothesis patients of two sites are exchangeable, so the permutation test has its level
exactly, for any number of patients.

Dimension key: N, M = patients of two sites; D = features; T = N + M.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

_Vectors = npt.NDArray[np.float64]

NUM_PERMUTATIONS = 999  # p-values down to 0.001


@dataclass(frozen=True)
class Discrepancy:
    """How far two samples are apart.

    Attributes:
        mmd_squared: unbiased estimate of MMD^2; about 0 for samples of one distribution, also below; at most 2.
        p_value: probability of one at least this large if both came from one distribution.
        num_first: patients of the first site.
        num_second: and of the second.
    """

    mmd_squared: float
    p_value: float
    num_first: int
    num_second: int


def discrepancy(
    first_ND: _Vectors,
    second_MD: _Vectors,
    generator: np.random.Generator,
    *,
    num_permutations: int = NUM_PERMUTATIONS,
) -> Discrepancy:
    """The maximum mean discrepancy of two samples, with a permutation test.

    Each feature is scaled by its standard deviation over both samples, so that none counts for its unit.

    =================================  =======================================
    input                              output
    =================================  =======================================
    all vectors equal                  MMD^2 0, p 1
    fewer than two patients in one     ValueError
    NaN or infinity                    ValueError
    =================================  =======================================

    Args:
        first_ND: one row for each patient.
        second_MD: of the other site.
        generator: of the permutations.
        num_permutations: with B of them the smallest p-value is 1 / (B + 1).

    Raises:
        ValueError: for input without an answer.
    """
    num_first, num_second = len(first_ND), len(second_MD)
    if min(num_first, num_second) < 2:
        raise ValueError(f"Expected two patients or more at each site, got {num_first} and {num_second}.")
    pooled_TD = np.concatenate([first_ND, second_MD]).astype(np.float64)
    if not np.isfinite(pooled_TD).all():
        raise ValueError("Expected finite features, got NaN or infinity.")
    kernel_TT = _kernel(pooled_TD)
    in_first_T = np.arange(num_first + num_second) < num_first
    observed = _mmd_squared(kernel_TT, in_first_T[None])[0]
    shuffled_BT = generator.permuted(np.tile(in_first_T, (num_permutations, 1)), axis=1)
    # A permutation that gives the observed split again must count, whatever the order of its sums.
    as_large = _mmd_squared(kernel_TT, shuffled_BT) >= observed - 1e-12
    return Discrepancy(
        mmd_squared=float(observed),
        p_value=float((1 + as_large.sum()) / (num_permutations + 1)),
        num_first=num_first,
        num_second=num_second,
    )


def median_width(points_TD: _Vectors) -> float:
    """The median distance between two different points, by which the kernel is scaled; 0 if most are equal."""
    first, second = np.triu_indices(len(points_TD), k=1)
    return float(np.median(np.linalg.norm(points_TD[first] - points_TD[second], axis=1)))


def scaled(points_TD: _Vectors) -> _Vectors:
    """The points with every feature of standard deviation 1; a constant one is 0."""
    centred_TD = points_TD - points_TD.mean(axis=0)
    deviation_D = centred_TD.std(axis=0)
    constant_D = deviation_D <= 1e-9 * np.abs(points_TD).max(axis=0, initial=0.0)
    scaled_TD: _Vectors = np.where(constant_D, 0.0, centred_TD / np.where(constant_D, 1.0, deviation_D))
    return scaled_TD


def _kernel(pooled_TD: _Vectors) -> _Vectors:
    """Gaussian kernel of the scaled points."""
    points_TD = scaled(pooled_TD)
    width = median_width(points_TD) or 1.0
    squares_T = (points_TD**2).sum(axis=1)
    distances_TT = np.maximum(squares_T[:, None] + squares_T[None, :] - 2 * points_TD @ points_TD.T, 0.0)
    kernel_TT: _Vectors = np.exp(-distances_TT / (2 * width**2))
    return kernel_TT


def _mmd_squared(kernel_TT: _Vectors, in_first_BT: npt.NDArray[np.bool_]) -> _Vectors:
    """Unbiased MMD^2 of every split of the pooled sample."""
    first_BT = in_first_BT.astype(np.float64)
    second_BT = 1.0 - first_BT
    num_first, num_second = float(first_BT[0].sum()), float(second_BT[0].sum())
    diagonal_T = np.diag(kernel_TT)
    to_first_BT, to_second_BT = first_BT @ kernel_TT, second_BT @ kernel_TT
    within_first_B = (to_first_BT * first_BT).sum(axis=1) - first_BT @ diagonal_T
    within_second_B = (to_second_BT * second_BT).sum(axis=1) - second_BT @ diagonal_T
    between_B = (to_first_BT * second_BT).sum(axis=1)
    estimate_B: _Vectors = (
        within_first_B / (num_first * (num_first - 1))
        + within_second_B / (num_second * (num_second - 1))
        - 2 * between_B / (num_first * num_second)
    )
    return estimate_B
