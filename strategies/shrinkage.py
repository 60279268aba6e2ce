"""Singular-value shrinkage of a private mean change, with the size of its noise known.

The noise of differential privacy has the same known standard deviation on every coordinate that trains. Of a noisy
matrix, singular values below the Marchenko-Pastur edge are explained by noise alone, and those above are too large by
an amount that is known. Taking both out is post-processing: it costs no privacy.

The shrinker is asymptotically optimal for the Frobenius loss (Gavish and Donoho 2017, "Optimal Shrinkage of Singular
Values", equation 7) for low-rank matrices in white noise. What it assumes and nothing here checks: that the noise is
white on the matrix. It is where coordinates are orthonormal, as in :mod:`strategies.subspace`.

Legend: O rows, I columns.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from medfed.study import FEDERATED, StudyConfig
from privacy.plan import PrivacyPlan
from strategies.strategy import Tree


def shrunk(matrix_OI: Tensor, noise_std: float) -> Tensor:
    """The best guess of a low-rank matrix, from it with white noise; of the same dtype.

    ============================ =========================================
    noise_std 0                  the matrix as it is, bit for bit
    nothing above the noise      zero
    axes beyond the first two    are taken together with the columns
    fewer than two axes          as it is: there is no matrix
    ============================ =========================================

    Args:
        matrix_OI: finite.
        noise_std: of the noise on each element, >= 0.
    """
    if noise_std == 0 or matrix_OI.dim() < 2:
        return matrix_OI
    u_OK, values_K, v_KI = torch.linalg.svd(matrix_OI.flatten(1).double(), full_matrices=False)
    shorter, longer = sorted((u_OK.shape[0], v_KI.shape[1]))
    beta, unit = shorter / longer, noise_std * math.sqrt(longer)
    scaled_K = values_K / unit
    above_K = scaled_K > 1 + math.sqrt(beta)
    signal_K = torch.where(above_K, (scaled_K.square() - beta - 1).square() - 4 * beta, 0).clamp(min=0).sqrt()
    kept_K = torch.where(above_K, unit * signal_K / scaled_K.clamp(min=1), 0)
    rebuilt_OI: Tensor = (u_OK * kept_K) @ v_KI
    return rebuilt_OI.to(matrix_OI.dtype).view(matrix_OI.shape)


def shrunk_change(change: Tree, noise_std: float) -> dict[str, Tensor]:
    """Every matrix of a mean change, shrunk; vectors as they are."""
    return {name: shrunk(tensor, noise_std) for name, tensor in change.items()}


def noise_std_of_mean(study: StudyConfig, sites: Sequence[str], scope: str = FEDERATED) -> float:
    """Standard deviation of the noise on each coordinate of the weighted mean change of these sites.

    With trust ``site`` each of K noised steps of plain SGD moves a site by ``learning_rate z C / (q n)`` times
    standard noise, independently. With trust ``consortium`` the sum carries a share of every site in it. A site whose
    update was scaled down to ``update_clip_norm`` adds less noise than this says; and noise also steers later steps
    of a round, which is not counted.

    Args:
        study: resolved, with noise, plain SGD and plain local training, as shrinkage needs them.
        sites: that took part.
        scope: of the federation.
    """
    assert study.privacy is not None
    plan, rate = PrivacyPlan.of_study(study), study.training.learning_rate
    declared = {site: float(study.declared_units(site) or 0) for site in sites}
    if plan.trust == "consortium" and study.sums_securely_in(scope):
        return rate * plan.noise_std * math.sqrt(len(sites)) / (plan.sampling_rate * sum(declared.values()))
    step = rate * plan.alone.noise_std * math.sqrt(plan.steps_per_round) / plan.sampling_rate
    weights = {site: 1.0 if study.strategy.weighting == "uniform" else declared[site] for site in sites}
    return step * math.hypot(*(weights[site] / declared[site] for site in sites)) / sum(weights.values())
