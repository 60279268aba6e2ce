"""Whether a classifier looks where the expert outlined a lesion, over the held-out images of all sites."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from client.data import Item, read_expert_mask
from client.saliency_maps import saliency_map
from client.site import Site
from medfed.metrics.saliency import mass_in_mask, pointing_hit
from medfed.models.adapted import AdaptedModel
from medfed.models.folding import ModelState
from medfed.study import StudyConfig
from medfed.study_sections import ClassificationConfig
from server.evaluation import EvaluatedColumn, Saliency

MAX_IMAGES_PER_SITE = 6
"""Images with an outlined lesion that are explained at each site: the first ones of its manifest."""


def saliency_of(
    study: StudyConfig,
    sites: Sequence[Site],
    model: AdaptedModel,
    state_of: Callable[[EvaluatedColumn, Site], ModelState | None],
) -> Saliency | None:
    """Pointing game and mass in mask of the study's first target; None without outlines or patch tokens."""
    if not isinstance(study.task, ClassificationConfig):
        return None
    target = next(iter(study.task.targets))
    outlined: list[tuple[Site, Item, np.ndarray]] = []
    for site in sites:
        found = ((item, read_expert_mask(item)) for item in site.cohort(study, model.pixels).test)
        kept = [(site, item, mask_HW) for item, mask_HW in found if mask_HW is not None and mask_HW.any()]
        outlined += kept[:MAX_IMAGES_PER_SITE]
    pointing: dict[EvaluatedColumn, float] = {}
    mass: dict[EvaluatedColumn, float] = {}
    columns: tuple[EvaluatedColumn, ...] = ("zero_shot", "federated")
    for column in columns:
        hits, shares = [], []
        for site, item, mask_HW in outlined:
            if (state := state_of(column, site)) is None:
                break
            model.put(state)
            model.train(False)
            if (saliency_HW := saliency_map(model, item, target, site.features)) is None:
                break
            hits.append(pointing_hit(saliency_HW, mask_HW))
            shares.append(mass_in_mask(saliency_HW, mask_HW))
        if len(hits) == len(outlined) and np.isfinite(hits).any() and np.isfinite(shares).any():
            pointing[column], mass[column] = float(np.nanmean(hits)), float(np.nanmean(shares))
    if not pointing:
        return None
    return Saliency(
        target=target,
        images=len(outlined),
        mask_share=float(np.mean([mask_HW.mean() for _, _, mask_HW in outlined])),
        pointing=pointing,
        mass=mass,
    )
