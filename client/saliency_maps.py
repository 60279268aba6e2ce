"""Where in an image a classifier's decision comes from: gradient times input, at the tokens of the last blocks.

The gradient of the true class's logit with respect to each patch token times the token, summed over its width
(Shrikumar et al. 2017, https://arxiv.org/abs/1605.01713, at a layer in place of the pixels). Tokens are those that
enter the first adapted block, or the last norm if no block is adapted: what the frozen prefix computes is the same
for every adapter.

Legend: L tokens ([CLS] first), D width, H height, W width of the image.
"""

from __future__ import annotations

import math

import numpy as np
import torch
from numpy.typing import NDArray

from client.data import Item
from client.features import FeatureCache, as_three_channels
from medfed.models.adapted import AdaptedModel

_HEAD_AND_NORM = 2
"""The last stages of a token backbone, behind which nothing has a place in the image any more."""


def saliency_map(model: AdaptedModel, item: Item, target: str, features: FeatureCache) -> NDArray[np.float64] | None:
    """Saliency of the item's true class of ``target`` for the state in place, [H, W] of the preprocessed image.

    None for a backbone without patch tokens on a square grid.
    """
    cut = min(max(model.num_frozen_stages, 1), len(model.backbone.stages) - _HEAD_AND_NORM)
    if cut == model.num_frozen_stages:
        tokens = features.features_of(item, model)[None]
    else:
        with torch.no_grad():
            image = as_three_channels(item.image_CHW)[None].to(model.device)
            tokens = model.backbone.prefix(image, cut)
    if tokens.dim() != 3 or math.isqrt(tokens.shape[1] - 1) ** 2 != tokens.shape[1] - 1:
        return None
    with torch.enable_grad():
        tokens = tokens.detach().float().requires_grad_()
        logit = model.backbone.classify(model.backbone.resume(tokens, cut))[target][0, item.annotation[target]]
        (gradient,) = torch.autograd.grad(logit, tokens)
    relevance_L = (gradient * tokens).detach().sum(dim=2)[0, 1:]
    side = math.isqrt(len(relevance_L))
    size = item.image_CHW.shape[-2:]
    upsampled = torch.nn.functional.interpolate(relevance_L.reshape(1, 1, side, side), size=size, mode="nearest")
    return upsampled[0, 0].double().cpu().numpy()
