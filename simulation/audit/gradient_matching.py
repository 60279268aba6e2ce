"""An image out of a gradient by search: change the image until its gradient points where the update does.

Geiping et al. 2020, "Inverting Gradients" (https://arxiv.org/abs/2003.14053): minimise 1 - cosine between the image's
gradient and the update, and the image's total variation, by Adam on the signs of the derivatives, at a rate that falls
to a tenth after 3/8, 5/8 and 7/8 of the steps. The cosine ignores how long the update is. That a search fails proves
nothing: another start, more steps or a better prior may succeed.

Legend: C channels, H height, W width, Z coordinates of what trains.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

STEP = 0.05
"""First rate of Adam, in grey levels: with signed derivatives, how far a pixel moves at a time (theirs is 0.1, of
pixels of standard deviation 1)."""

VARIATION_WEIGHT = 0.2
"""Of the total variation, the mean absolute difference of neighbouring pixels; at it, half of the cosine distance of a
noisy image is the price of its noise."""

_FALLS = (3 / 8, 5 / 8, 7 / 8)
_TENTH = 0.1


@dataclass(frozen=True, eq=False)
class Found:
    """Where a search ended.

    Attributes:
        image_CHW: grey levels in [0, 1].
        cosine: of its gradient and the update; 1 is a perfect match.
    """

    image_CHW: Tensor
    cosine: float


def match_gradient(
    gradient_of: Callable[[Tensor], Tensor],
    update_Z: Tensor,
    *,
    start_CHW: Tensor,
    steps: int,
    done: Callable[[], None] = lambda: None,
) -> Found:
    """Searches an image whose gradient points where ``update_Z`` does.

    Args:
        gradient_of: gradient (Z,) of an image (C, H, W), differentiable.
        update_Z: what was seen, float64.
        start_CHW: grey levels in [0, 1] from which the search begins.
        steps: how many; 0 returns the start.
        done: called after each step.
    """
    image_CHW = start_CHW.clone().requires_grad_()
    adam = torch.optim.Adam([image_CHW], lr=STEP)
    rate = torch.optim.lr_scheduler.MultiStepLR(adam, [int(steps * fall) for fall in _FALLS], gamma=_TENTH)
    with sdpa_kernel(SDPBackend.MATH):  # the other kernels of attention have no second derivative
        for _ in range(steps):
            adam.zero_grad()
            distance = 1 - _cosine(gradient_of(image_CHW), update_Z)
            (distance + VARIATION_WEIGHT * total_variation(image_CHW)).backward()  # type: ignore[no-untyped-call]
            assert image_CHW.grad is not None
            image_CHW.grad.sign_()
            adam.step()
            rate.step()
            with torch.no_grad():
                image_CHW.clamp_(0.0, 1.0)
            done()
        cosine = float(_cosine(gradient_of(image_CHW), update_Z).detach())
    return Found(image_CHW.detach(), cosine)


def total_variation(image_CHW: Tensor) -> Tensor:
    """Mean absolute difference of pixels above each other, plus that of pixels beside each other."""
    return (image_CHW[:, 1:] - image_CHW[:, :-1]).abs().mean() + (
        image_CHW[:, :, 1:] - image_CHW[:, :, :-1]
    ).abs().mean()


def _cosine(one_Z: Tensor, other_Z: Tensor) -> Tensor:
    return torch.nn.functional.cosine_similarity(one_Z.double(), other_Z.double(), dim=0)
