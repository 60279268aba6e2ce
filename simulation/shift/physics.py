"""Scanner physics: one pure function for each family of a profile, in the order in which physics applies them.

Contrast, coil sensitivity, blur, resolution, k-space artefacts, noise; the window comes last, when an image is stored.
Each function takes an image, its family and a generator, draws its strength from the family's range, and gives back an
image of the same shape. At a strength that changes nothing it returns the image itself. None moves anatomy, so
annotations stay valid. The transforms are MONAI's; ghosting and motion, which MONAI lacks, are those of the scanner
profiles.

Dimension key: 1 = channel, H = rows, W = columns.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
from torch import Tensor

from medfed.shift_profile import (
    BiasFieldShift,
    ContrastShift,
    GhostingShift,
    GibbsShift,
    MotionShift,
    NoiseShift,
    PointSpreadShift,
    ResolutionShift,
    ShiftProfile,
    SpikesShift,
    WindowShift,
)
from simulation.scanner import Ghosting, MonaiStep, Motion
from simulation.shift.draws import Draws

# A spike lies this far from the middle of k-space, as a fraction of the image: nearer ones look like a bias field.
_NEAREST_SPIKE = 0.05


def degrade(image_1HW: Tensor, profile: ShiftProfile, draws: Draws) -> Tensor:
    """The image after every family of scanner physics that the profile has, but the window.

    Args:
        image_1HW: float32, at least 0; healthy tissue is in [0, 1].
        profile: resolved; other families are passed over.
        draws: the generator of each family.

    Returns:
        float32, same shape; the image itself if no family is there.
    """
    families = profile.families
    for name, apply in PHYSICS.items():
        if name in families:
            image_1HW = apply(image_1HW, families[name], draws(name))
    return image_1HW


def contrast(image_1HW: Tensor, shift: ContrastShift, generator: np.random.Generator) -> Tensor:
    """Grey levels through a power and, if asked for, a random monotone map (RandAdjustContrast, RandHistogramShift)."""
    gamma = float(generator.uniform(*shift.gamma))
    if gamma != 1.0:
        image_1HW = MonaiStep("RandAdjustContrast", {"gamma": (gamma, gamma)})(image_1HW, generator)
    if shift.histogram_points is not None:
        image_1HW = MonaiStep("RandHistogramShift", {"num_control_points": shift.histogram_points})(
            image_1HW, generator
        )
    return image_1HW


def bias_field(image_1HW: Tensor, shift: BiasFieldShift, generator: np.random.Generator) -> Tensor:
    """Times the exponential of a random polynomial (RandBiasField)."""
    strength = float(generator.uniform(*shift.strength))
    if strength == 0.0:
        return image_1HW
    field = MonaiStep("RandBiasField", {"degree": shift.degree, "coeff_range": (-strength, strength)})
    return field(image_1HW, generator)


def point_spread(image_1HW: Tensor, shift: PointSpreadShift, generator: np.random.Generator) -> Tensor:
    """Blurred by a Gaussian (RandGaussianSmooth)."""
    sigma_px = float(generator.uniform(*shift.sigma_px))
    if sigma_px == 0.0:
        return image_1HW
    sigma = (sigma_px, sigma_px)
    return MonaiStep("RandGaussianSmooth", {"sigma_x": sigma, "sigma_y": sigma})(image_1HW, generator)


def resolution(image_1HW: Tensor, shift: ResolutionShift, generator: np.random.Generator) -> Tensor:
    """Averaged over larger pixels and interpolated back (RandSimulateLowResolution)."""
    zoom = float(generator.uniform(*shift.zoom))
    if zoom == 1.0:
        return image_1HW
    settings = {"zoom_range": (zoom, zoom), "downsample_mode": "area", "upsample_mode": "bicubic"}
    # Bicubic interpolation overshoots; a magnitude is not negative.
    return MonaiStep("RandSimulateLowResolution", settings)(image_1HW, generator).clamp(min=0.0)


def ghosting(image_1HW: Tensor, shift: GhostingShift, generator: np.random.Generator) -> Tensor:
    """With displaced copies; see :class:`simulation.scanner.Ghosting`."""
    intensity = float(generator.uniform(*shift.intensity))
    if intensity == 0.0:
        return image_1HW
    return Ghosting(shift.num_ghosts, (intensity, intensity))(image_1HW, generator)


def motion(image_1HW: Tensor, shift: MotionShift, generator: np.random.Generator) -> Tensor:
    """As a moving patient gives it; see :class:`simulation.scanner.Motion`."""
    max_shift_px = float(generator.uniform(*shift.max_shift_px))
    if max_shift_px == 0.0:
        return image_1HW
    return Motion(max_shift_px, shift.num_movements, shift.still_fraction)(image_1HW, generator)


def gibbs(image_1HW: Tensor, shift: GibbsShift, generator: np.random.Generator) -> Tensor:
    """Without the outer part of k-space (GibbsNoise)."""
    alpha = float(generator.uniform(*shift.alpha))
    if alpha == 0.0:
        return image_1HW
    return _monai("GibbsNoise", image_1HW, alpha=alpha).abs()


def spikes(image_1HW: Tensor, shift: SpikesShift, generator: np.random.Generator) -> Tensor:
    """With stripes of one random direction and width (KSpaceSpikeNoise)."""
    amplitude = float(generator.uniform(*shift.amplitude))
    mean = float(image_1HW.mean())
    if amplitude == 0.0 or mean <= 0.0:
        return image_1HW
    height, width = image_1HW.shape[1:]
    angle, distance = generator.uniform(0.0, math.pi), generator.uniform(_NEAREST_SPIKE, 0.4)
    row = height // 2 + round(distance * height * math.sin(angle))
    column = width // 2 + round(distance * width * math.cos(angle))
    # MONAI's transform of k-space is unscaled: its zero frequency is the sum over all pixels.
    log_intensity = math.log(amplitude * mean * height * width)
    return _monai("KSpaceSpikeNoise", image_1HW, loc=(row, column), k_intensity=log_intensity).clamp(min=0.0)


def noise(image_1HW: Tensor, shift: NoiseShift, generator: np.random.Generator) -> Tensor:
    """With noise (RandRicianNoise, RandGaussianNoise)."""
    sd = float(generator.uniform(*shift.sd))
    if sd == 0.0:
        return image_1HW
    name = "RandRicianNoise" if shift.kind == "rician" else "RandGaussianNoise"
    return MonaiStep(name, {"sample_std": False, "std": sd})(image_1HW, generator).clamp(min=0.0)


def window(image_HW: Tensor, shift: WindowShift, generator: np.random.Generator) -> Tensor:
    """As it is stored: grey levels outside of the window are cut off (ScaleIntensityRange)."""
    low, high = float(generator.uniform(*shift.low)), float(generator.uniform(*shift.high))
    if (low, high) == (0.0, 1.0):
        return image_HW
    return _monai("ScaleIntensityRange", image_HW, a_min=low, a_max=high, b_min=0.0, b_max=1.0, clip=True)


Physics = Callable[[Tensor, Any, np.random.Generator], Tensor]

PHYSICS: dict[str, Physics] = {
    "contrast": contrast,
    "bias_field": bias_field,
    "point_spread": point_spread,
    "resolution": resolution,
    "ghosting": ghosting,
    "motion": motion,
    "gibbs": gibbs,
    "spikes": spikes,
    "noise": noise,
}
"""The families that act before an image is stored, in order."""


def _monai(name: str, image: Tensor, **settings: Any) -> Tensor:
    """The image after a transform of MONAI that draws nothing."""
    import monai.transforms  # takes seconds to import, and only scanning needs it
    import torch

    transformed = getattr(monai.transforms, name)(**settings)(image)
    return torch.as_tensor(np.asarray(transformed), dtype=torch.float32)
