"""Predictions on a site's images, case by case, as arrays that hold neither images nor whose they are.

They stay at the site: what is computed from them may leave, and only as the study says.

Legend: B images, N cases, D features of an image.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from client.data import Item
from client.features import FeatureCache
from medfed.device import mixed_precision
from medfed.metrics.class_scores import ClassScores
from medfed.metrics.outline_scores import OutlineScores
from medfed.metrics.surface import surface_distances
from medfed.models.adapted import AdaptedModel
from medfed.models.folding import ModelState
from medfed.study_sections import ClassificationConfig, SegmentationConfig
from medfed.tasks.classification import ClassificationTask
from medfed.tasks.segmentation import SegmentationTask, dice_score

CaseScores = OutlineScores | ClassScores


def case_scores(
    model: AdaptedModel,
    task: SegmentationConfig | ClassificationConfig,
    items: Sequence[Item],
    *,
    state: ModelState,
    features: FeatureCache,
    batch_size: int,
    with_distances: bool = True,
) -> CaseScores:
    """How a state of the model does on each case, without augmentation; the same numbers as training reports.

    Surface distances take time; without them they are NaN.

    Raises:
        AdapterMismatchError: if the state's adapter does not fit.
        StudyError: if one of its folds does not fit.
    """
    model.put(state)
    model.train(False)
    batches = [items[start : start + batch_size] for start in range(0, len(items), batch_size)]
    with torch.no_grad(), mixed_precision(model.device):
        if isinstance(task, SegmentationConfig):
            return _outlined(model, SegmentationTask(task), items, batches, features, with_distances)
        return _classified(model, ClassificationTask(task), items, batches, features)


def _outlined(
    model: AdaptedModel,
    task: SegmentationTask,
    items: Sequence[Item],
    batches: Sequence[Sequence[Item]],
    features: FeatureCache,
    with_distances: bool,
) -> OutlineScores:
    unit: Literal["mm", "px"] = "mm" if all(item.spacing_mm for item in items) else "px"
    columns: list[tuple[NDArray[Any], ...]] = []
    embeddings: list[Tensor] = []
    for batch in batches:
        target = task.collate([item.annotation for item in batch], model.device)
        embedding = model.embed(features.batch(batch, model))
        embeddings.append(_without_positions(embedding))
        predicted_NHW = model.backbone.decode(embedding, target.box_N4, target.owner_N) > 0
        dice_N = dice_score(predicted_NHW, target.mask_NHW)
        for index, item in enumerate(batch):
            own = target.owner_N == index
            spacing = item.spacing_mm if unit == "mm" and item.spacing_mm else (1.0, 1.0)
            unknown_N = np.full(int(own.sum()), np.nan)
            distances = (unknown_N, unknown_N)
            if with_distances:
                distances = surface_distances(predicted_NHW[own], target.mask_NHW[own], spacing=spacing)
            columns.append((target.class_N[own].cpu().numpy(), dice_N[own].double().cpu().numpy(), *distances))
    rows_of_item = [len(class_N) for class_N, *_ in columns]
    class_N, dice_N64, hd95_N, average_N = (
        np.concatenate(parts) if parts else np.zeros(0) for parts in zip(*columns, strict=True)
    )
    return OutlineScores(
        classes=task.classes,
        unit=unit,
        num_patients=len({item.patient_id for item in items}),
        patient_N=np.repeat(_numbers(items), rows_of_item),
        class_N=class_N.astype(np.int64),
        dice_N=dice_N64,
        hd95_N=hd95_N,
        surface_distance_N=average_N,
        attributes=_attributes(items, rows_of_item),
        embedding_BD=_joined(embeddings),
    )


def _classified(
    model: AdaptedModel,
    task: ClassificationTask,
    items: Sequence[Item],
    batches: Sequence[Sequence[Item]],
    features: FeatureCache,
) -> ClassScores:
    logits: dict[str, list[Tensor]] = {name: [] for name in task.targets}
    embeddings: list[Tensor] = []
    for batch in batches:
        embedding = model.embed(features.batch(batch, model))
        embeddings.append(_without_positions(embedding))
        of_target = model.backbone.classify(embedding)
        for name in task.targets:
            logits[name].append(of_target[name].double().cpu())
    return ClassScores(
        num_classes={name: len(classes) for name, classes in task.targets.items()},
        num_patients=len({item.patient_id for item in items}),
        patient_N=_numbers(items),
        logits={name: torch.cat(parts).numpy() for name, parts in logits.items()},
        truth={name: np.array([item.annotation[name] for item in items], dtype=np.int64) for name in task.targets},
        attributes=_attributes(items, [1] * len(items)),
        embedding_BD=_joined(embeddings),
    )


def _numbers(items: Sequence[Item]) -> NDArray[np.int64]:
    """Number of each image's patient, in the order in which patients come first."""
    number: dict[str, int] = {}
    return np.array([number.setdefault(item.patient_id, len(number)) for item in items], dtype=np.int64)


def _attributes(items: Sequence[Item], rows_of_item: Sequence[int]) -> dict[str, tuple[str, ...]]:
    names = sorted({name for item in items for name in item.attributes})

    def groups(name: str) -> Iterator[str]:
        for item, rows in zip(items, rows_of_item, strict=True):
            yield from [item.attributes.get(name, "")] * rows

    return {name: tuple(groups(name)) for name in names}


def _joined(embeddings: Sequence[Tensor]) -> NDArray[np.float64]:
    return np.asarray(torch.cat(list(embeddings)).double().cpu().numpy())


def _without_positions(embedding: Any) -> Tensor:
    """An embedding (B, D, height, width) averaged over positions; one of (B, D) as it is."""
    first: Tensor = embedding[0] if isinstance(embedding, (tuple, list)) else embedding
    return first.flatten(2).mean(dim=2) if first.dim() > 2 else first
