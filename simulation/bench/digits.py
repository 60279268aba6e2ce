"""Eight made-up hospitals with handwritten digits, and a small network whose per-record gradients have a closed form.

The drawings are the 1,797 of ``sklearn.datasets.load_digits`` (8 x 8 pixels), which ship with scikit-learn. By
drawing, not by copy, they are divided into a public part, on which the network starts, a training part and a test
part. A record is one random warp of a training drawing in the style of its hospital (rotation, contrast, blur,
noise); labels are divided by Dirichlet(0.5). The training part has fewer drawings than the federation has records,
so that a drawing returns, warped anew, in 4 to 5 of them (9 where a site has 1,000): the unit of privacy here is the
record, not the drawing.

Legend: K sites, N records of a site, B records at a time, C classes, I inputs and O outputs of a layer.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import torch
from numpy.typing import NDArray
from sklearn.datasets import load_digits
from torch import Tensor
from torch.nn import functional

NUM_SITES = 8
RECORDS_PER_SITE = 500
NUM_CLASSES = 10
PUBLIC, TRAIN = 500, 900  # drawings; the other 397 are for tests
DIRICHLET = 0.5
LAYERS = (64, 32, 32, NUM_CLASSES)


@dataclass(frozen=True)
class Federation:
    """The hospitals' records, and where training begins.

    Attributes:
        x_KNI, y_KN: training records.
        test_x_KNI, test_y_N: all test drawings in the style of each hospital.
        share_KC: share of each class among a hospital's training records.
        start: the network after training on the public drawings: one matrix [O, I + 1] a layer, bias last.
    """

    x_KNI: Tensor
    y_KN: Tensor
    test_x_KNI: Tensor
    test_y_N: Tensor
    share_KC: Tensor
    start: tuple[Tensor, ...]


def federation(seed: int, *, num_records: int = RECORDS_PER_SITE) -> Federation:
    """The federation of a seed: split, styles, records and start.

    Args:
        seed: of everything that is drawn.
        num_records: of each hospital.
    """
    generator = np.random.default_rng([2026, seed])
    digits = load_digits()
    order = generator.permutation(len(digits.target))
    images = torch.from_numpy(digits.images[order] / 16.0)
    labels = torch.from_numpy(digits.target[order].astype(np.int64))
    test = slice(PUBLIC + TRAIN, None)
    styles = [_Style.of(generator) for _ in range(NUM_SITES)]
    shares = generator.dirichlet([DIRICHLET] * NUM_CLASSES, NUM_SITES)
    xs, ys = [], []
    for style, share in zip(styles, shares, strict=True):
        chosen = _drawings(labels[PUBLIC : PUBLIC + TRAIN].numpy(), share, num_records, generator) + PUBLIC
        xs.append(style.records(images[chosen], generator))
        ys.append(labels[chosen])
    y_KN = torch.stack(ys)
    start = _trained(images[:PUBLIC].reshape(PUBLIC, -1), labels[:PUBLIC], seed)
    return Federation(
        x_KNI=torch.stack(xs),
        y_KN=y_KN,
        test_x_KNI=torch.stack([style.records(images[test], generator) for style in styles]),
        test_y_N=labels[test],
        share_KC=functional.one_hot(y_KN, NUM_CLASSES).double().mean(1),
        start=start,
    )


@dataclass(frozen=True)
class _Style:
    """How a hospital's scanner draws: a turn, a contrast, a blur and noise of its own."""

    turn: float  # radians
    gain: float
    blur: float
    noise: float

    @classmethod
    def of(cls, generator: np.random.Generator) -> _Style:
        return cls(
            turn=math.radians(30 + generator.uniform(-20, 20)),
            gain=generator.uniform(0.6, 1.0),
            blur=generator.uniform(0.0, 0.3),
            noise=generator.uniform(0.02, 0.1),
        )

    def records(self, images_NHW: Tensor, generator: np.random.Generator) -> Tensor:
        """A random warp of each image, flat."""
        n = len(images_NHW)
        turn_N = self.turn + generator.normal(0, math.radians(8), n)
        zoom_N = generator.uniform(0.9, 1.15, n)
        shift_N2 = generator.normal(0, 0.08, (n, 2))
        cos_N, sin_N = np.cos(turn_N) * zoom_N, np.sin(turn_N) * zoom_N
        affine = np.stack([cos_N, -sin_N, shift_N2[:, 0], sin_N, cos_N, shift_N2[:, 1]], 1).reshape(n, 2, 3)
        grid = functional.affine_grid(torch.from_numpy(affine), [n, 1, 8, 8], align_corners=False)
        warped = functional.grid_sample(images_NHW[:, None], grid, align_corners=False)
        kernel = torch.tensor([self.blur / 2, 1 - self.blur, self.blur / 2], dtype=torch.float64)
        warped = functional.conv2d(warped, (kernel[:, None] * kernel)[None, None], padding=1)[:, 0]
        warped = self.gain * warped
        noisy = warped + torch.from_numpy(generator.normal(0, self.noise, warped.shape))
        return noisy.reshape(n, -1)


def _drawings(
    labels: NDArray[np.int64], share: NDArray[np.float64], count: int, generator: np.random.Generator
) -> Tensor:
    """Indices of ``count`` drawings whose labels follow ``share``, repeats allowed."""
    weight = share[labels] / np.bincount(labels, minlength=NUM_CLASSES)[labels]
    return torch.from_numpy(generator.choice(len(labels), count, p=weight / weight.sum()))


def _trained(x_NI: Tensor, y_N: Tensor, seed: int) -> tuple[Tensor, ...]:
    """The public start: full-batch Adam on drawings as they are."""
    generator = torch.Generator().manual_seed(seed)
    layers = [
        torch.cat([torch.randn(o, i, generator=generator, dtype=torch.float64) / math.sqrt(i), torch.zeros(o, 1)], 1)
        for i, o in pairwise(LAYERS)
    ]
    for layer in layers:
        layer.requires_grad_()
    optimizer = torch.optim.Adam(layers, lr=0.01)
    for _ in range(60):
        optimizer.zero_grad()
        functional.cross_entropy(activations(x_NI, layers)[-1], y_N).backward()  # type: ignore[no-untyped-call]
        optimizer.step()
    return tuple(layer.detach() for layer in layers)


def activations(x_BI: Tensor, layers: Sequence[Tensor]) -> list[Tensor]:
    """Input of each layer with a constant 1 behind it, and the logits; leading axes of x and layers broadcast."""
    inputs = []
    for index, layer in enumerate(layers):
        hidden = x_BI if index == 0 else torch.relu(x_BI)
        hidden = torch.cat([hidden, torch.ones_like(hidden[..., :1])], -1)
        inputs.append(hidden)
        x_BI = hidden @ layer.mT
    return [*inputs, x_BI]


def gradient_factors(x_BI: Tensor, y_B: Tensor, layers: Sequence[Tensor]) -> list[tuple[Tensor, Tensor]]:
    """For each layer (u, v): the gradient of a record's cross-entropy in the layer is the outer product of its rows.

    Leading axes of x, y and layers broadcast: [K, B, I] with layers [K, O, I + 1] is one network a site.
    """
    *inputs, logits = activations(x_BI, layers)
    error = torch.softmax(logits, -1)
    error.scatter_add_(-1, y_B[..., None], torch.full_like(error[..., :1], -1.0))
    factors: list[tuple[Tensor, Tensor]] = []
    for index in reversed(range(len(layers))):
        factors.append((error, inputs[index]))
        error = (error @ layers[index])[..., :-1] * (inputs[index][..., :-1] > 0)
    return factors[::-1]


def accuracy(layers: Sequence[Tensor], data: Federation) -> Tensor:
    """Share of right answers, [K, C]: by style of hospital and class."""
    right_KN = activations(data.test_x_KNI, layers)[-1].argmax(-1) == data.test_y_N
    of_class_NC = functional.one_hot(data.test_y_N, NUM_CLASSES).double()
    return (right_KN.double() @ of_class_NC) / of_class_NC.sum(0)
