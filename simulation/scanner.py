"""Hospitals' scanners: named acquisition profiles that change how one and the same slice looks.

A profile is a fixed chain of degradations in the order in which physics applies them: contrast, coil
sensitivity, resolution, k-space artefacts, noise. A site keeps its profile; the strength within the profile's
range is drawn for each image from a generator that the caller passes. No step moves anatomy, so masks stay
valid. The transforms are MONAI's, except ghosting and motion, which MONAI lacks.

Dimension key: 1 = channel, H = rows, W = columns.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

import numpy as np
import torch
from torch import Tensor

Step = Callable[[Tensor, np.random.Generator], Tensor]

_WINDOW_QUANTILE = 0.9995  # brightest pixels above it saturate, as in the default window of a viewer


@dataclass(frozen=True)
class MonaiStep:
    """A MONAI random transform that always applies, seeded by the generator of the call.

    Attributes:
        transform: class name in ``monai.transforms``.
        settings: its arguments; ranges among them are drawn from by the transform itself.
        drawn: arguments that MONAI keeps fixed and that shall vary: each is drawn uniformly from its range.
    """

    transform: str
    settings: Mapping[str, Any] = field(default_factory=dict)
    drawn: Mapping[str, tuple[float, float]] = field(default_factory=dict)

    def __call__(self, image_1HW: Tensor, generator: np.random.Generator) -> Tensor:
        """The transformed image; float32, same shape."""
        import monai.transforms  # takes seconds to import, and only scanning needs it

        drawn = {name: float(generator.uniform(*bounds)) for name, bounds in self.drawn.items()}
        transform = getattr(monai.transforms, self.transform)(prob=1.0, **self.settings, **drawn)
        transform.set_random_state(seed=int(generator.integers(2**31)))
        return torch.as_tensor(np.asarray(transform(image_1HW)), dtype=torch.float32)


@dataclass(frozen=True)
class Ghosting:
    """Displaced copies along the rows: a periodic modulation of k-space lines, by pulsation or breathing.

    Model of Pérez-García et al. 2021 (TorchIO, ``RandomGhosting``).

    Attributes:
        num_ghosts: copies over the field of view; every ``num_ghosts``-th line is weakened.
        intensity: range of the fraction that such a line loses; 0 leaves the image as it is.
    """

    num_ghosts: int
    intensity: tuple[float, float]

    def __call__(self, image_1HW: Tensor, generator: np.random.Generator) -> Tensor:
        """The image with ghosts; float32, same shape."""
        spectrum = torch.fft.fft2(image_1HW)
        gain_H1 = torch.ones(image_1HW.shape[1], 1)
        gain_H1[:: self.num_ghosts] = 1.0 - float(generator.uniform(*self.intensity))
        gain_H1[0] = 1.0  # the zero frequency carries the mean brightness
        ghosted_1HW: Tensor = torch.fft.ifft2(spectrum * gain_H1).abs()
        return ghosted_1HW


@dataclass(frozen=True)
class Motion:
    """Small translations of the head while the outer lines of k-space are read.

    Model of Shaw et al. 2019 (MIDL, "MRI k-space motion artefact augmentation"), without rotation. The lines in
    the middle are read at rest: they fix where the anatomy is, so masks stay valid.

    Attributes:
        max_shift_px: each movement is uniform within this many pixels along rows and columns.
        num_movements: the outer lines fall into this many groups, each read at another position.
        still_fraction: fraction of the lines, around the middle, that is read at rest.
    """

    max_shift_px: float
    num_movements: int
    still_fraction: float

    def __call__(self, image_1HW: Tensor, generator: np.random.Generator) -> Tensor:
        """The image as the moving head gives it; float32, same shape."""
        height, width = image_1HW.shape[1:]
        frequency_H1 = torch.fft.fftfreq(height).unsqueeze(1)
        frequency_W = torch.fft.fftfreq(width)
        shifts_px = torch.from_numpy(generator.uniform(-1.0, 1.0, (self.num_movements, 2))) * self.max_shift_px
        # Lines are read in order of signed frequency; the groups split that order evenly.
        group_H = ((frequency_H1[:, 0] + 0.5) * self.num_movements).long().clamp(max=self.num_movements - 1)
        moves_H2 = shifts_px[group_H].float()
        moves_H2[frequency_H1[:, 0].abs() < self.still_fraction / 2] = 0.0
        turns_HW = frequency_H1 * moves_H2[:, :1] + frequency_W * moves_H2[:, 1:]
        phase_HW = torch.polar(torch.ones_like(turns_HW), -2 * math.pi * turns_HW)
        moved_1HW: Tensor = torch.fft.ifft2(torch.fft.fft2(image_1HW) * phase_HW).abs()
        return moved_1HW


@dataclass(frozen=True)
class ScannerProfile:
    """How the scanner of one site renders anatomy.

    Attributes:
        name: key in ``SCANNERS``.
        description: one sentence for reports.
        source: where the effect and its size are described.
        steps: degradations in order of application.
    """

    name: str
    description: str
    source: str
    steps: tuple[Step, ...]

    def acquire(self, image_HW: Tensor, generator: np.random.Generator) -> Tensor:
        """The slice as this scanner shows it.

        ========================  ==================================
        input                     output
        ========================  ==================================
        all zero                  all zero: there is nothing to scan
        NaN or infinite pixel     ValueError
        ========================  ==================================

        Args:
            image_HW: float32, at least 0; healthy tissue is in [0, 1].
            generator: the only source of randomness; equal states give equal images.

        Returns:
            Image of the same shape; float32, finite, in [0, 1].

        Raises:
            ValueError: a pixel is not finite.
        """
        if not bool(torch.isfinite(image_HW).all()):
            raise ValueError("Expected a finite image, got NaN or infinity; mend the anatomy before scanning it.")
        image_1HW = image_HW.unsqueeze(0).float()
        if not bool(image_1HW.any()):
            return image_1HW[0].clone()
        for step in self.steps:
            image_1HW = step(image_1HW, generator)
        brightest = float(torch.quantile(image_1HW, _WINDOW_QUANTILE))
        return (image_1HW[0] / max(brightest, torch.finfo(torch.float32).tiny)).clamp(0.0, 1.0)


_RICIAN = "Rician noise: Gudbjartsson and Patz 1995, Magn. Reson. Med. 34"


def _rician(lowest_sd: float, highest_sd: float) -> MonaiStep:
    return MonaiStep("RandRicianNoise", {"sample_std": False}, drawn={"std": (lowest_sd, highest_sd)})


def _blur(lowest_px: float, highest_px: float) -> MonaiStep:
    sigma = (lowest_px, highest_px)
    return MonaiStep("RandGaussianSmooth", {"sigma_x": sigma, "sigma_y": sigma})


_PROFILES = (
    ScannerProfile(
        name="reference-3t",
        description="3 T, well shimmed, coil intensity corrected: the template with a trace of noise",
        source=_RICIAN,
        steps=(_rician(0.008, 0.015),),
    ),
    ScannerProfile(
        name="bias-3t",
        description="3 T without intensity correction: brightness falls off across the head by a factor of about two",
        source="bias field 10-40 %: Sled, Zijdenbos and Evans 1998, IEEE Trans. Med. Imaging 17",
        steps=(
            MonaiStep("RandBiasField", {"degree": 3, "coeff_range": (-0.45, 0.55)}),
            _rician(0.015, 0.03),
        ),
    ),
    ScannerProfile(
        name="noisy-1p5t",
        description="fast 1.5 T protocol: smooth point spread and a signal-to-noise ratio near 12",
        source=_RICIAN,
        steps=(
            MonaiStep("RandAdjustContrast", {"gamma": (0.8, 1.0)}),
            _blur(0.7, 1.1),
            _rician(0.06, 0.10),
        ),
    ),
    ScannerProfile(
        name="legacy-lowres",
        description="old protocol with thick voxels, dark contrast and breathing ghosts",
        source="resolution: Billot et al. 2023 (SynthSeg), Med. Image Anal. 86; ghosts: TorchIO 2021",
        steps=(
            MonaiStep("RandAdjustContrast", {"gamma": (1.7, 2.3)}),
            MonaiStep(
                "RandSimulateLowResolution",
                {"zoom_range": (0.34, 0.45), "downsample_mode": "area", "upsample_mode": "bicubic"},
            ),
            Ghosting(num_ghosts=4, intensity=(0.5, 0.8)),
            _rician(0.02, 0.03),
        ),
    ),
    ScannerProfile(
        name="lowfield-0p3t",
        description="0.3 T open magnet: flat contrast, blur and strong noise",
        source="Arnold et al. 2023, J. Magn. Reson. Imaging 57 (low-field MRI: clinical promise and challenges)",
        steps=(
            MonaiStep("RandAdjustContrast", {"gamma": (0.6, 0.75)}),
            MonaiStep("RandBiasField", {"degree": 2, "coeff_range": (-0.15, 0.2)}),
            _blur(1.3, 1.8),
            _rician(0.08, 0.12),
        ),
    ),
    ScannerProfile(
        name="motion-3t",
        description="restless patients: motion in the outer k-space, truncation ripples",
        source="Shaw et al. 2019, MIDL; truncation: Morelli et al. 2011, RadioGraphics 31",
        steps=(
            Motion(max_shift_px=7.0, num_movements=6, still_fraction=0.10),
            MonaiStep("RandGibbsNoise", {"alpha": (0.35, 0.5)}),
            _rician(0.015, 0.03),
        ),
    ),
    ScannerProfile(
        name="vendor-b-3t",
        description="another vendor's sequence: tissues keep their order of brightness, not its spacing; faint spikes",
        source="histogram shift as a stand-in for sequence differences: Zhang et al. 2020, IEEE Trans. Med. Imaging 39",
        steps=(
            MonaiStep("RandAdjustContrast", {"gamma": (1.2, 1.35)}),
            MonaiStep("RandHistogramShift", {"num_control_points": (8, 11)}),
            MonaiStep("RandKSpaceSpikeNoise", {"intensity_range": (6.5, 7.8)}),
            _rician(0.015, 0.025),
        ),
    ),
)

SCANNERS: Mapping[str, ScannerProfile] = MappingProxyType({profile.name: profile for profile in _PROFILES})
