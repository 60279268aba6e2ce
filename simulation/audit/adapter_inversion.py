"""Inversion of the study's own adapter: an image out of one update, searched through the frozen backbone.

The update is the gradient of what the study trains, at the released model, of one step on one image: a patient who was
drawn alone. Nothing else hides that patient, so no update of a real round is easier to invert. The attacker knows the
model, the annotation, and how images are scaled; grey images are searched as grey. From noise as in the paper, and from
the mean of the site's other images, which stands for what anybody knows of such images: a search has found something
only where it ends closer to the original than that mean is.

Legend: C channels, H height, W width, P elements, Z coordinates of what trains.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from client.data import Item
from client.features import as_three_channels
from medfed.errors import StudyError
from medfed.models.adapted import AdaptedModel
from medfed.models.folding import ModelState
from medfed.models.pixels import PixelSpec
from medfed.tasks import Task
from privacy.randomness import RandomStream
from server.audit_result import AdapterInversion, Search
from simulation.audit.gradient_matching import Found, match_gradient
from simulation.audit.inversion import Image, likeness, protections, smaller
from simulation.audit.notes import Demonstration
from strategies.subspace import Subspace

NUM_SEARCHES = 4
"""A clipped update points where the unclipped one does, and the search looks at nothing else: it is not run again."""

_NOISE_MEAN, _NOISE_STD = 0.5, 0.2  # of the start, in grey levels


@dataclass(frozen=True, eq=False)
class Pictures:
    """What is shown of an inversion, at the size at which likeness is measured.

    Attributes:
        original_HW: the image that was searched.
        mean_HW: the mean of the others.
        found: what each search ended with.
        result: in numbers.
    """

    original_HW: Image
    mean_HW: Image
    found: tuple[Image, ...]
    result: AdapterInversion


@dataclass(frozen=True, eq=False)
class Victim:
    """A model in the state that attackers know, and what of it trains.

    Attributes:
        model: of the study.
        task: its losses.
        trainable: what trains.
        state: where the gradient is taken.
    """

    model: AdaptedModel
    task: Task
    trainable: Subspace
    state: ModelState

    def gradient(self, features: Tensor, item: Item, *, differentiable: bool) -> Tensor:
        """The gradient (Z,) of one image's loss, from its features after the frozen prefix."""
        target = self.task.collate([item.annotation], self.model.device)
        (loss,) = self.task.losses(self.model, features[None], target)
        pieces = torch.autograd.grad(
            loss,
            list(self.model.trainable.values()),
            create_graph=differentiable,
            allow_unused=True,
            materialize_grads=True,
        )
        return self.trainable.coordinates(torch.cat([piece.flatten() for piece in pieces])).cpu()

    def gradient_of_levels(self, item: Item) -> Callable[[Tensor], Tensor]:
        """The gradient as a function of grey levels (C, H, W), with the item's annotation."""
        pixels, model = self.model.pixels, self.model

        def gradient_of(levels_CHW: Tensor) -> Tensor:
            image_CHW = as_three_channels(from_levels(levels_CHW, pixels)).to(model.device)
            features = model.backbone.prefix(image_CHW[None], model.num_frozen_stages)[0]
            return self.gradient(features, item, differentiable=True)

        return gradient_of


def levels_of(image_CHW: Tensor, pixels: PixelSpec) -> Tensor:
    """Grey or colour levels in [0, 1] of a preprocessed image: one channel if all are equal.

    Raises:
        StudyError: if images come as they are, so that nobody knows between what they lie.
    """
    if pixels.intensity != "percentile" or image_CHW.dim() != 3:
        raise StudyError(
            "Expected images that are scaled to [0, 1] for --inversion-steps, got a backbone that takes them as they "
            "are; use --inversion-steps 0."
        )
    mean, std = _channels(pixels, len(image_CHW))
    levels_CHW = image_CHW * std + mean
    return levels_CHW[:1] if torch.allclose(levels_CHW, levels_CHW[:1].expand_as(levels_CHW), atol=1e-4) else levels_CHW


def from_levels(levels_CHW: Tensor, pixels: PixelSpec) -> Tensor:
    """The preprocessed image of levels, in three channels."""
    mean, std = _channels(pixels, 3)
    image_CHW: Tensor = (levels_CHW.expand(3, -1, -1) - mean) / std
    return image_CHW


def _channels(pixels: PixelSpec, num_channels: int) -> tuple[Tensor, Tensor]:
    mean, std = (torch.tensor(values)[:num_channels].view(-1, 1, 1) for values in (pixels.mean, pixels.std))
    return mean, std


def invert_adapter(
    victim: Victim,
    items: tuple[Item, ...],
    *,
    shown: Demonstration,
    steps: int,
    stream: RandomStream,
    seed: int,
    done: Callable[[], None] = lambda: None,
) -> Pictures:
    """Searches the first image from its update: unprotected, clipped, clipped and noised, masked.

    Args:
        victim: whose update it is.
        items: training images of the site, at least two.
        shown: clip norm and noise.
        steps: of each search, >= 1.
        stream: of the noise.
        seed: of the start.
        done: called after each step of :data:`NUM_SEARCHES` searches.

    Raises:
        StudyError: for images of unknown scale, or fewer than two.
    """
    if len(items) < 2:
        raise StudyError(f"Expected two training images at the site for --inversion-steps, got {len(items)}.")
    model, pixels = victim.model, victim.model.pixels
    levels = [levels_of(item.image_CHW, pixels) for item in items]
    mean_CHW = torch.stack([other.mean(dim=0, keepdim=True) for other in levels[1:]]).mean(dim=0)
    mean_CHW = mean_CHW.expand_as(levels[0]).contiguous()
    generator = torch.Generator().manual_seed(seed)
    noise_CHW = (_NOISE_MEAN + _NOISE_STD * torch.randn(levels[0].shape, generator=generator)).clamp(0.0, 1.0)

    model.put(victim.state)
    model.train(False)
    gradient_of = victim.gradient_of_levels(items[0])
    # Of the image itself and not of its levels: what the site would send.
    features = model.encode(as_three_channels(items[0].image_CHW)[None].to(model.device))[0]
    gradient_Z = victim.gradient(features, items[0], differentiable=False).float()
    updates = dict(
        protections(gradient_Z, clip_norm=shown.clip_norm, noise_multiplier=shown.noise_multiplier, stream=stream)
    )

    def search(update_Z: Tensor, start_CHW: Tensor) -> Found:
        return match_gradient(gradient_of, update_Z, start_CHW=start_CHW, steps=steps, done=done)

    plain = search(updates["off"], noise_CHW)
    from_mean = search(updates["off"], mean_CHW)
    ended: list[tuple[str, str, Found]] = [
        ("off", "noise", plain),
        ("off", "mean image", from_mean),
        ("clipped", "noise", plain),
        ("clipped and noised", "noise", search(updates["clipped and noised"], noise_CHW)),
        ("masked", "noise", search(updates["masked"], noise_CHW)),
    ]
    small = [smaller(one.mean(dim=0).numpy()) for one in levels]
    mean_HW = smaller(mean_CHW.mean(dim=0).numpy())
    found = tuple(smaller(one.image_CHW.mean(dim=0).numpy()) for _, _, one in ended)
    mean_psnr_db, mean_ssim = likeness(small[0], mean_HW)
    result = AdapterInversion(
        steps=steps,
        num_values=len(gradient_Z),
        num_pixels=noise_CHW.numel(),
        num_images=len(items),
        mean_psnr_db=mean_psnr_db,
        mean_ssim=mean_ssim,
        searches=tuple(
            _search(protection, start, one.cosine, small, image_HW)
            for (protection, start, one), image_HW in zip(ended, found, strict=True)
        ),
    )
    return Pictures(small[0], mean_HW, found, result)


def _search(protection: str, start: str, cosine: float, images: list[Image], found_HW: Image) -> Search:
    """How close the found image is to the first one, and to how many others it is closer."""
    psnr_db, ssim = likeness(images[0], found_HW)
    closer = sum(likeness(other, found_HW)[1] > ssim for other in images[1:])
    return Search.model_validate(
        {
            "protection": protection,
            "start": start,
            "cosine": float(np.clip(cosine, -1.0, 1.0)),
            "psnr_db": psnr_db,
            "ssim": ssim,
            "rank": 1 + closer,
        }
    )
