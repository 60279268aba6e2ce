"""Membership inference on a released adapter: which patients were in the training, told from their losses.

A score is higher for who seems to have been in. ``loss``: minus the loss (Yeom et al. 2018,
https://arxiv.org/abs/1709.01604). ``calibrated``: how far the loss fell from that of the model before training, which
takes out how hard an image is (Watson et al. 2022, https://arxiv.org/abs/2111.08440). Few false alarms matter more than
the average (Carlini et al. 2022, https://arxiv.org/abs/2112.03570).
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray

from client.data import Item
from client.features import FeatureCache
from medfed.models.adapted import AdaptedModel
from medfed.models.folding import ModelState
from medfed.tasks import Task
from privacy.audit.game import clopper_pearson
from server.audit_result import Hits, Membership

FALSE_ALARM_RATES = (0.01, 0.001)
_INTERVAL = 0.95
_RESAMPLES = 1000


def losses_by_patient(
    model: AdaptedModel, task: Task, items: Sequence[Item], *, state: ModelState, features: FeatureCache
) -> dict[str, float]:
    """Each patient's mean loss over its images, in order of first appearance, without augmentation."""
    model.put(state)
    model.train(False)
    losses: dict[str, list[float]] = {}
    with torch.no_grad():
        for item in items:
            target = task.collate([item.annotation], model.device)
            loss = float(task.losses(model, features.batch([item], model), target)[0])
            losses.setdefault(item.patient_id, []).append(loss)
    return {patient: float(np.mean(values)) for patient, values in losses.items()}


def membership(
    attack: str, members: NDArray[np.float64], others: NDArray[np.float64], *, generator: np.random.Generator
) -> Membership:
    """How well a score tells members from others.

    Args:
        attack: ``loss`` or ``calibrated``.
        members: score of each training patient.
        others: score of each held-out patient.
        generator: draws the bootstrap.
    """
    areas = [
        _area(generator.choice(members, len(members)), generator.choice(others, len(others))) for _ in range(_RESAMPLES)
    ]
    low, high = np.quantile(areas, [(1 - _INTERVAL) / 2, (1 + _INTERVAL) / 2])
    hits = tuple(_hits(members, others, rate) for rate in FALSE_ALARM_RATES)
    return Membership.model_validate(
        {
            "attack": attack,
            "num_members": len(members),
            "num_others": len(others),
            "auroc": _area(members, others),
            "low": float(low),
            "high": float(high),
            "hits": hits,
        }
    )


def _area(members: NDArray[np.float64], others: NDArray[np.float64]) -> float:
    """The share of pairs of a member and another in the right order, ties as a half (Mann and Whitney 1947)."""
    from scipy.stats import rankdata

    ranks = rankdata(np.concatenate([members, others]))[: len(members)]
    return float((ranks.sum() / len(members) - (len(members) + 1) / 2) / len(others))


def _hits(members: NDArray[np.float64], others: NDArray[np.float64], rate: float) -> Hits:
    """Members above the threshold that the allowed number of others exceeds; with few others that is none of them."""
    allowed = int(rate * len(others))
    threshold = np.sort(others)[::-1][allowed]
    found = int((members > threshold).sum())
    low, high = clopper_pearson(found, len(members), confidence=_INTERVAL)
    return Hits(false_alarm_rate=rate, share=found / len(members), low=low, high=high)
