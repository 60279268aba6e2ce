"""Gradient inversion: an image out of one update, with and without protection.

The victim is a small network whose first layer is fully connected, trained on one image: row i of that layer's gradient
is the image times the gradient of bias i, so an unprotected update *is* the image (Phong et al. 2017, section 3,
https://eprint.iacr.org/2017/715). No attack can do better than exact, which is the point: what protection does to it
is seen undiluted. Adapters deep inside a frozen backbone give away features rather than pixels: those are attacked in
:mod:`simulation.audit.adapter_inversion`.

Clipping, noise and masks are the product's own code. Legend: H height, W width, U hidden units, P elements.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat
from numpy.typing import NDArray
from torch import Tensor

from privacy.clipping import ClippedSum
from privacy.noise import add_gaussian
from privacy.randomness import RandomStream
from privacy.secure_aggregation.encoding import FixedPoint
from privacy.secure_aggregation.masks import add_pair_masks
from server.audit_result import Inversion, Protection

SIDE_PX = 64
UNITS = 16
EXACT_DB = 120.0
"""A PSNR from which on the difference is the rounding of float32; none larger is reported."""

Image = NDArray[np.float32]


@dataclass(frozen=True, eq=False)
class Reconstruction:
    """What an attacker made of one update.

    Attributes:
        result: protection and likeness.
        image_HW: grey levels in [0, 1].
    """

    result: Inversion
    image_HW: Image


def invert(
    image_HW: Image, *, clip_norm: float, noise_multiplier: float, stream: RandomStream, seed: int
) -> tuple[Image, list[Reconstruction]]:
    """The image at :data:`SIDE_PX`, and its reconstructions from an unprotected, clipped, noised and masked update.

    Args:
        image_HW: grey levels in [0, 1].
        clip_norm: C.
        noise_multiplier: z, > 0.
        stream: of the noise.
        seed: of the victim's weights, which an attacker knows.
    """
    victim = torch.Generator().manual_seed(seed)
    shown = torch.from_numpy(smaller(image_HW))
    updates = protections(
        _gradient(shown, victim), clip_norm=clip_norm, noise_multiplier=noise_multiplier, stream=stream
    )
    original: Image = shown.numpy()
    found = []
    for protection, update_P in updates:
        image = _reconstructed(update_P)
        psnr_db, ssim = likeness(original, image)
        found.append(Reconstruction(Inversion(protection=protection, psnr_db=psnr_db, ssim=ssim), image))
    return original, found


def smaller(image_HW: Image) -> Image:
    """The image at :data:`SIDE_PX`, each pixel the mean of an area."""
    whole = torch.from_numpy(np.ascontiguousarray(image_HW))[None, None]
    shown: Image = torch.nn.functional.interpolate(whole, (SIDE_PX, SIDE_PX), mode="area")[0, 0].numpy()
    return shown


def protections(
    gradient_P: Tensor, *, clip_norm: float, noise_multiplier: float, stream: RandomStream
) -> list[tuple[Protection, Tensor]]:
    """A patient's gradient as an attacker sees it: as it is, clipped, clipped and noised, clipped and masked; float64.

    Args:
        gradient_P: float32.
        clip_norm: C.
        noise_multiplier: z, > 0.
        stream: of the noise.
    """
    total = ClippedSum(len(gradient_P), clip_norm=clip_norm, device="cpu")
    total.add(gradient_P[None], [0], [1.0])
    clipped_P = total.close().sum_P
    return [
        ("off", gradient_P.double()),
        ("clipped", clipped_P),
        ("clipped and noised", add_gaussian(clipped_P, noise_std=noise_multiplier * clip_norm, stream=stream)),
        ("masked", _masked(clipped_P, clip_norm=clip_norm)),
    ]


def _gradient(image_HW: Tensor, generator: torch.Generator) -> Tensor:
    """Of the first layer's weights (U, H W) and biases (U,), flat, float32: cross-entropy of one of two classes."""
    pixels = image_HW.numel()
    weight_UP = (torch.randn(UNITS, pixels, generator=generator) / pixels**0.5).requires_grad_()
    bias_U = torch.zeros(UNITS, requires_grad=True)
    head_2U = torch.randn(2, UNITS, generator=generator) / UNITS**0.5
    logits = head_2U @ torch.tanh(weight_UP @ image_HW.flatten() + bias_U)
    loss = torch.nn.functional.cross_entropy(logits[None], torch.tensor([1]))
    gradients = torch.autograd.grad(loss, [weight_UP, bias_U])
    return torch.cat([gradient.flatten() for gradient in gradients])


def _reconstructed(update_P: Tensor) -> Image:
    """Least squares over the rows: sum_i b_i W_i / sum_i b_i^2, cut to grey levels."""
    weight_UP = update_P[: UNITS * SIDE_PX**2].reshape(UNITS, -1)
    bias_U = update_P[UNITS * SIDE_PX**2 :]
    image = (bias_U @ weight_UP / bias_U.square().sum()).clamp(0.0, 1.0)
    levels: Image = image.reshape(SIDE_PX, SIDE_PX).float().numpy()
    return levels


def _masked(update_P: Tensor, *, clip_norm: float) -> Tensor:
    """What the server sees of one of two sites: the update in fixed point under their pair mask, as signed numbers."""
    sites = ("one", "other")
    keys = {site: X25519PrivateKey.generate() for site in sites}
    encoding = FixedPoint(clip_norm=clip_norm, num_summands=2)
    ring = encoding.encode(update_P)
    add_pair_masks(
        ring,
        "one",
        keys["one"].private_bytes_raw(),
        {"other": keys["other"].public_key().public_bytes(Encoding.Raw, PublicFormat.Raw)},
        sites=sites,
        others=("other",),
        round_id=b"inversion",
    )
    return torch.from_numpy(ring.view(np.int32).astype(np.float64))


def likeness(original_HW: Image, image_HW: Image) -> tuple[float, float]:
    """PSNR in dB, at most :data:`EXACT_DB`, and SSIM (Wang et al. 2004, from MONAI), of grey levels in [0, 1]."""
    from monai.metrics.regression import SSIMMetric

    error = float(np.mean((original_HW.astype(np.float64) - image_HW) ** 2))
    psnr_db = EXACT_DB if error == 0 else min(EXACT_DB, -10 * float(np.log10(error)))
    pair = [torch.from_numpy(np.ascontiguousarray(one))[None, None] for one in (original_HW, image_HW)]
    ssim = float(SSIMMetric(spatial_dims=2, data_range=1.0)(*pair).mean())
    return psnr_db, ssim
