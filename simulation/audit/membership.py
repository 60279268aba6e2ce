"""Membership inference on a released adapter: which patients were in the training, told from their losses.

A score is higher for who seems to have been in. ``loss``: minus the loss (Yeom et al. 2018,
https://arxiv.org/abs/1709.01604). ``calibrated``: how far the loss fell from that of the model before training, which
takes out how hard an image is (Watson et al. 2022, https://arxiv.org/abs/2111.08440). ``likelihood-ratio``: see
:mod:`simulation.audit.shadows`. Few false alarms matter more than the average (Carlini et al. 2022,
https://arxiv.org/abs/2112.03570).

Legend: K shadows, N patients.
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
_IMAGES_AT_A_TIME = 8


def losses_by_patient(
    model: AdaptedModel, task: Task, items: Sequence[Item], *, state: ModelState, features: FeatureCache
) -> dict[str, float]:
    """Each patient's mean loss over its images, in order of first appearance, without augmentation."""
    model.put(state)
    model.train(False)
    losses: dict[str, list[float]] = {}
    with torch.no_grad():
        for start in range(0, len(items), _IMAGES_AT_A_TIME):
            batch = items[start : start + _IMAGES_AT_A_TIME]
            target = task.collate([item.annotation for item in batch], model.device)
            losses_B = task.losses(model, features.batch(batch, model), target).tolist()
            for item, loss in zip(batch, losses_B, strict=True):
                losses.setdefault(item.patient_id, []).append(loss)
    return {patient: float(np.mean(values)) for patient, values in losses.items()}


def membership(
    attack: str, members: NDArray[np.float64], others: NDArray[np.float64], *, generator: np.random.Generator
) -> Membership:
    """How well a score tells members from others.

    Args:
        attack: as in :class:`~server.audit_result.Membership`.
        members: score of each patient who trained.
        others: score of each who did not.
        generator: draws the bootstrap.
    """
    areas = [
        _area(generator.choice(members, len(members)), generator.choice(others, len(others))) for _ in range(_RESAMPLES)
    ]
    return _summary(attack, members, others, areas, independent=len(members))


def membership_in_turn(
    attack: str, scores_KN: NDArray[np.float64], included_KN: NDArray[np.bool_], *, generator: np.random.Generator
) -> Membership:
    """The same of K models that each had another half of the same N patients, all pairs together.

    Models and patients are drawn anew by the bootstrap, both, as scores of one patient, or of one model, go together
    (the "pigeonhole" of Owen 2007, https://arxiv.org/abs/0712.1111, which errs towards wide intervals). For intervals
    of hits the N patients count and not the K N scores, as if all scores of a patient were alike.

    Args:
        attack: as above.
        scores_KN: of each patient, by what each model makes of it.
        included_KN: who trained which model.
        generator: draws the bootstrap.
    """
    models, patients = scores_KN.shape
    areas = []
    for _ in range(_RESAMPLES):
        drawn = np.ix_(generator.integers(models, size=models), generator.integers(patients, size=patients))
        members, others = scores_KN[drawn][included_KN[drawn]], scores_KN[drawn][~included_KN[drawn]]
        if len(members) and len(others):
            areas.append(_area(members, others))
    return _summary(attack, scores_KN[included_KN], scores_KN[~included_KN], areas, independent=patients)


def _summary(
    attack: str, members: NDArray[np.float64], others: NDArray[np.float64], areas: list[float], *, independent: int
) -> Membership:
    """The numbers of one attack; ``independent`` is how many members the intervals of hits count."""
    low, high = np.quantile(areas, [(1 - _INTERVAL) / 2, (1 + _INTERVAL) / 2])
    return Membership.model_validate(
        {
            "attack": attack,
            "num_members": len(members),
            "num_others": len(others),
            "auroc": _area(members, others),
            "low": float(low),
            "high": float(high),
            "hits": tuple(_hits(members, others, rate, independent) for rate in FALSE_ALARM_RATES),
        }
    )


def _area(members: NDArray[np.float64], others: NDArray[np.float64]) -> float:
    """The share of pairs of a member and another in the right order, ties as a half (Mann and Whitney 1947)."""
    from scipy.stats import rankdata

    ranks = rankdata(np.concatenate([members, others]))[: len(members)]
    return float((ranks.sum() / len(members) - (len(members) + 1) / 2) / len(others))


def _hits(members: NDArray[np.float64], others: NDArray[np.float64], rate: float, independent: int) -> Hits:
    """Members above the threshold that the allowed number of others exceeds; with few others that is none of them."""
    allowed = int(rate * len(others))
    threshold = np.sort(others)[::-1][allowed]
    share = float((members > threshold).mean())
    low, high = clopper_pearson(round(share * independent), independent, confidence=_INTERVAL)
    return Hits(false_alarm_rate=rate, share=share, low=low, high=high)
