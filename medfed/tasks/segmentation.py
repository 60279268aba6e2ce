"""Promptable segmentation: a box for each structure in, a mask for each box out.

The prompt is the bounding box of the reference mask, as in MedSAM's protocol (Ma et al. 2024): metrics say
how well a structure is outlined once somebody has pointed at it.

Legend: B images of a batch, N boxes of all its images, H height, W width.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from medfed.models.adapted import AdaptedModel
from medfed.study_sections import SegmentationConfig
from medfed.tasks.task import Task

MIN_STRUCTURE_AREA_PX = 16
"""Smaller structures are neither prompted nor scored: their box is mostly border."""


@dataclass(frozen=True)
class SegmentationAnnotation:
    """The structures of one image.

    Attributes:
        class_M: class index of each structure present.
        box_M4: its bounding box, pixels, x0 y0 x1 y1, both ends inside the structure.
        mask_MHW: its reference mask, bool.
    """

    class_M: Tensor
    box_M4: Tensor
    mask_MHW: Tensor


@dataclass(frozen=True)
class SegmentationTarget:
    """The structures of a batch.

    Attributes:
        class_N: class index of each box.
        box_N4: bounding boxes.
        mask_NHW: reference masks, float32 0 or 1.
        owner_N: index of the image that each box belongs to.
        num_images: B.
    """

    class_N: Tensor
    box_N4: Tensor
    mask_NHW: Tensor
    owner_N: Tensor
    num_images: int


def annotate(label_HW: np.ndarray, num_classes: int) -> SegmentationAnnotation:
    """The structures of a label map, in class order; value ``i + 1`` is class ``i``, 0 is background."""
    classes, boxes, masks = [], [], []
    for index in range(num_classes):
        mask_HW = label_HW == index + 1
        if int(mask_HW.sum()) < MIN_STRUCTURE_AREA_PX:
            continue
        rows, columns = np.flatnonzero(mask_HW.any(axis=1)), np.flatnonzero(mask_HW.any(axis=0))
        classes.append(index)
        boxes.append([columns[0], rows[0], columns[-1], rows[-1]])
        masks.append(mask_HW)
    shape = (len(masks), *label_HW.shape)
    return SegmentationAnnotation(
        class_M=torch.tensor(classes, dtype=torch.int64),
        box_M4=torch.tensor(np.array(boxes, dtype=np.float32).reshape(-1, 4)),
        mask_MHW=torch.from_numpy(np.array(masks, dtype=bool).reshape(shape)),
    )


class SegmentationTask(Task):
    """Dice plus binary cross-entropy, averaged over the boxes of each image.

    The backbone must offer ``decode(embedding, box_N4, owner_N) -> logits_NHW``.
    """

    primary = "dice"

    def __init__(self, config: SegmentationConfig) -> None:
        self.classes = config.classes

    @property
    def parts(self) -> tuple[str, ...]:
        """The structures."""
        return self.classes

    def collate(self, annotations: Sequence[SegmentationAnnotation], device: torch.device) -> SegmentationTarget:
        """Boxes of all images in one list, with their owners."""
        counts = torch.tensor([len(a.class_M) for a in annotations])
        owner_N = torch.repeat_interleave(torch.arange(len(annotations)), counts)
        return SegmentationTarget(
            class_N=torch.cat([a.class_M for a in annotations]).to(device),
            box_N4=torch.cat([a.box_M4 for a in annotations]).to(device),
            mask_NHW=torch.cat([a.mask_MHW for a in annotations]).to(device, torch.float32),
            owner_N=owner_N.to(device),
            num_images=len(annotations),
        )

    def logits(self, model: AdaptedModel, features: Tensor, target: SegmentationTarget) -> Tensor:
        """Mask logits of every box, shape (N, H, W)."""
        logits_NHW: Tensor = model.backbone.decode(model.embed(features), target.box_N4, target.owner_N)
        return logits_NHW

    def losses(self, model: AdaptedModel, features: Tensor, target: SegmentationTarget) -> Tensor:
        """Per image, the mean over its boxes of Dice loss + cross-entropy; 0 for an image without boxes."""
        logits_NHW = self.logits(model, features, target).float()
        loss_N = dice_loss(logits_NHW, target.mask_NHW) + cross_entropy_loss(logits_NHW, target.mask_NHW)
        total_B = loss_N.new_zeros(target.num_images).index_add(0, target.owner_N, loss_N)
        count_B = torch.bincount(target.owner_N, minlength=target.num_images).clamp(min=1)
        return total_B / count_B

    def stack(self, annotations: Sequence[SegmentationAnnotation], device: torch.device) -> dict[str, Tensor]:
        """Structures image by image, as many places (M) for each as the fullest image needs.

        Returns:
            ``box_BM4`` float32, ``mask_BMHW`` bool, ``present_BM`` bool; what is not present has the image's
            corners as its box and an empty mask.
        """
        places = max((len(a.class_M) for a in annotations), default=0)
        height, width = annotations[0].mask_MHW.shape[1:] if annotations else (0, 0)
        box_BM4 = torch.tensor([0.0, 0.0, width - 1, height - 1]).repeat(len(annotations), places, 1)
        mask_BMHW = torch.zeros(len(annotations), places, height, width, dtype=torch.bool)
        present_BM = torch.zeros(len(annotations), places, dtype=torch.bool)
        for index, annotation in enumerate(annotations):
            found = len(annotation.class_M)
            box_BM4[index, :found] = annotation.box_M4
            mask_BMHW[index, :found] = annotation.mask_MHW
            present_BM[index, :found] = True
        stacked = {"box_BM4": box_BM4, "mask_BMHW": mask_BMHW, "present_BM": present_BM}
        return {name: value.to(device) for name, value in stacked.items()}

    def stacked_losses(self, model: AdaptedModel, features: Tensor, stacked: Mapping[str, Tensor]) -> Tensor:
        """As :meth:`losses`; places without a structure are computed and do not count."""
        present_BM = stacked["present_BM"]
        num_images, places = present_BM.shape
        target = SegmentationTarget(
            class_N=torch.zeros(num_images * places, dtype=torch.int64, device=features.device),
            box_N4=stacked["box_BM4"].flatten(0, 1),
            mask_NHW=stacked["mask_BMHW"].flatten(0, 1).to(torch.float32),
            owner_N=torch.arange(num_images, device=features.device).repeat_interleave(places),
            num_images=num_images,
        )
        logits_NHW = self.logits(model, features, target).float()
        loss_N = dice_loss(logits_NHW, target.mask_NHW) + cross_entropy_loss(logits_NHW, target.mask_NHW)
        total_B = (loss_N.reshape(num_images, places) * present_BM).sum(dim=1)
        return total_B / present_BM.sum(dim=1).clamp(min=1)

    def made_up(self, num_images: int, like: SegmentationAnnotation, generator: torch.Generator) -> dict[str, Tensor]:
        """Two structures in each image: random boxes, random masks."""
        height, width = like.mask_MHW.shape[1:]
        size = torch.tensor([width - 1, height - 1, width - 1, height - 1])
        corner_BM2, extent_BM2 = torch.rand(2, num_images, 2, 2, generator=generator).mul(0.5).unbind()
        return {
            "box_BM4": torch.cat([corner_BM2, corner_BM2 + extent_BM2], dim=-1) * size,
            "mask_BMHW": torch.rand(num_images, 2, height, width, generator=generator) < 0.5,
            "present_BM": torch.ones(num_images, 2, dtype=torch.bool),
        }

    def evaluate(self, model: AdaptedModel, batches: Iterable[tuple[Tensor, SegmentationTarget]]) -> dict[str, float]:
        """Mean Dice over the images that hold a structure, for each structure, and the mean of those."""
        sums, counts = np.zeros(len(self.classes)), np.zeros(len(self.classes), dtype=int)
        with torch.no_grad():
            for features, target in batches:
                predicted_NHW = self.logits(model, features, target) > 0
                dice_N = dice_score(predicted_NHW, target.mask_NHW)
                for index, dice in zip(target.class_N.tolist(), dice_N.tolist(), strict=True):
                    sums[index] += dice
                    counts[index] += 1
        metrics = {
            f"dice/{name}": float(sums[index] / counts[index])
            for index, name in enumerate(self.classes)
            if counts[index]
        }
        return {"dice": float(np.mean(list(metrics.values()))), **metrics} if metrics else {}


def dice_loss(logits_NHW: Tensor, mask_NHW: Tensor) -> Tensor:
    """Soft Dice loss of each mask, shape (N,), as in MONAI's ``DiceLoss(sigmoid=True, reduction="none")``."""
    from monai.losses import DiceLoss

    if not len(logits_NHW):
        return logits_NHW.new_zeros(0)
    loss: Tensor = DiceLoss(sigmoid=True, reduction="none")(logits_NHW[:, None], mask_NHW[:, None])
    return loss.flatten()


def cross_entropy_loss(logits_NHW: Tensor, mask_NHW: Tensor) -> Tensor:
    """Binary cross-entropy of each mask, averaged over its pixels, shape (N,)."""
    loss_NHW = torch.nn.functional.binary_cross_entropy_with_logits(logits_NHW, mask_NHW, reduction="none")
    return loss_NHW.mean(dim=(1, 2))


def dice_score(predicted_NHW: Tensor, mask_NHW: Tensor) -> Tensor:
    """Dice overlap of each pair of binary masks, shape (N,), in [0, 1] (MONAI's ``compute_dice``)."""
    from monai.metrics import compute_dice

    if not len(mask_NHW):
        return mask_NHW.new_zeros(0)
    score: Tensor = compute_dice(predicted_NHW[:, None].float(), mask_NHW[:, None])
    return score.flatten()
