"""Image classification with one head per target.

Legend: B images of a batch, C classes of a target.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

from medfed.models.adapted import AdaptedModel
from medfed.study_sections import ClassificationConfig
from medfed.tasks.task import Task


class ClassificationTask(Task):
    """Cross-entropy summed over targets; balanced accuracy.

    An annotation is a mapping from target name to class index. The backbone must offer
    ``classify(embedding) -> {target: logits_BC}``.
    """

    primary = "balanced-accuracy"

    def __init__(self, config: ClassificationConfig) -> None:
        self.targets = config.targets

    @property
    def parts(self) -> tuple[str, ...]:
        """The targets."""
        return tuple(self.targets)

    def collate(self, annotations: Sequence[Mapping[str, int]], device: torch.device) -> dict[str, Tensor]:
        """Class indices of each target, shape (B,)."""
        classes = {name: np.array([a[name] for a in annotations], dtype=np.int64) for name in self.targets}
        return {name: torch.from_numpy(indices).to(device) for name, indices in classes.items()}

    def losses(self, model: AdaptedModel, features: Tensor, target: Mapping[str, Tensor]) -> Tensor:
        """Per image, the sum over targets of the cross-entropy."""
        logits = model.backbone.classify(model.embed(features))
        per_target = [
            torch.nn.functional.cross_entropy(logits[name].float(), target[name], reduction="none")
            for name in self.targets
        ]
        return per_target[0] if len(per_target) == 1 else torch.stack(per_target).sum(dim=0)

    def stack(self, annotations: Sequence[Mapping[str, int]], device: torch.device) -> dict[str, Tensor]:
        """As :meth:`collate`: class indices are one per image already."""
        return self.collate(annotations, device)

    def stacked_losses(self, model: AdaptedModel, features: Tensor, stacked: Mapping[str, Tensor]) -> Tensor:
        """As :meth:`losses`."""
        return self.losses(model, features, stacked)

    def made_up(self, num_images: int, like: Mapping[str, int], generator: torch.Generator) -> dict[str, Tensor]:
        """Random classes."""
        return {name: torch.randint(len(self.targets[name]), (num_images,), generator=generator) for name in like}

    def evaluate(self, model: AdaptedModel, batches: Iterable[tuple[Tensor, Mapping[str, Tensor]]]) -> dict[str, float]:
        """Balanced accuracy of each target (mean recall over the classes that occur), and their mean."""
        predicted: dict[str, list[int]] = {name: [] for name in self.targets}
        truth: dict[str, list[int]] = {name: [] for name in self.targets}
        with torch.no_grad():
            for features, target in batches:
                logits = model.backbone.classify(model.embed(features))
                for name in self.targets:
                    predicted[name] += logits[name].argmax(dim=1).tolist()
                    truth[name] += target[name].tolist()
        metrics = {
            f"balanced-accuracy/{name}": balanced_accuracy(predicted[name], truth[name])
            for name in self.targets
            if truth[name]
        }
        return {"balanced-accuracy": float(np.mean(list(metrics.values()))), **metrics} if metrics else {}


def balanced_accuracy(predicted: Sequence[int], truth: Sequence[int]) -> float:
    """Mean recall over the classes that occur in ``truth``; chance is 1 / number of those classes."""
    from sklearn.metrics import recall_score

    classes = sorted(set(truth))
    return float(np.mean(recall_score(truth, predicted, labels=classes, average=None, zero_division=0)))
