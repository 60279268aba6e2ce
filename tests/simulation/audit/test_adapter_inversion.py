"""Searching an image behind a gradient: found where it can be found, and measured against what is known anyway."""

import pytest
import torch
from torch import Tensor

from medfed.errors import StudyError
from medfed.models.pixels import PixelSpec
from simulation.audit.adapter_inversion import from_levels, levels_of
from simulation.audit.gradient_matching import match_gradient, total_variation

SIDE = 12
IMAGENET = PixelSpec(image_size=SIDE, mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225))


def image() -> Tensor:
    """A square on a ground of another grey."""
    levels = torch.full((1, SIDE, SIDE), 0.2)
    levels[:, 3:9, 4:10] = 0.9
    return levels


def first_layer(levels_CHW: Tensor) -> Tensor:
    """Gradient of a small network's first layer, which sees the pixels."""
    generator = torch.Generator().manual_seed(0)
    weight = (torch.randn(16, SIDE * SIDE, generator=generator) / SIDE).requires_grad_()
    bias = torch.zeros(16, requires_grad=True)
    head = torch.randn(2, 16, generator=generator)
    logits = head @ torch.tanh(weight @ levels_CHW.flatten() + bias)
    loss = torch.nn.functional.cross_entropy(logits[None], torch.tensor([1]))
    pieces = torch.autograd.grad(loss, [weight, bias], create_graph=True)
    return torch.cat([piece.flatten() for piece in pieces])


def noise() -> Tensor:
    return (0.5 + 0.2 * torch.randn(1, SIDE, SIDE, generator=torch.Generator().manual_seed(1))).clamp(0, 1)


def error(found_CHW: Tensor) -> float:
    return float((found_CHW - image()).square().mean().sqrt())


def test_search_finds_the_image_where_the_layer_sees_the_pixels() -> None:
    steps = []
    found = match_gradient(
        first_layer, first_layer(image()).detach(), start_CHW=noise(), steps=150, done=lambda: steps.append(1)
    )
    assert len(steps) == 150
    assert found.cosine > 0.99
    assert error(found.image_CHW) < 0.1 < error(noise())


def test_length_of_the_update_does_not_matter_and_noise_does() -> None:
    update = first_layer(image()).detach().double()
    plain, shorter = (
        match_gradient(first_layer, update * length, start_CHW=noise(), steps=150).image_CHW for length in (1, 1e-3)
    )
    torch.testing.assert_close(plain, shorter, atol=0.02, rtol=0)
    drowned = update + 10 * update.norm() * torch.randn(len(update), generator=torch.Generator().manual_seed(2))
    assert error(match_gradient(first_layer, drowned, start_CHW=noise(), steps=150).image_CHW) > 0.2


def test_no_step_is_the_start_and_its_match() -> None:
    found = match_gradient(first_layer, first_layer(image()).detach(), start_CHW=image(), steps=0)
    assert torch.equal(found.image_CHW, image())
    assert found.cosine == pytest.approx(1.0)


def test_variation_is_of_neighbours() -> None:
    assert float(total_variation(torch.ones(3, 4, 4))) == 0
    stripes = torch.tensor([0.0, 1.0]).repeat(4, 2)[None]
    assert float(total_variation(stripes)) == 1


def test_levels_and_images_are_each_others_inverse() -> None:
    levels = torch.rand(1, SIDE, SIDE)
    prepared = from_levels(levels, IMAGENET)
    assert prepared.shape == (3, SIDE, SIDE)
    torch.testing.assert_close(levels_of(prepared, IMAGENET), levels)
    colours = torch.rand(3, SIDE, SIDE)
    torch.testing.assert_close(levels_of(from_levels(colours, IMAGENET), IMAGENET), colours)
    torch.testing.assert_close(levels_of(levels, PixelSpec(image_size=SIDE)), levels)


def test_images_of_unknown_scale_are_refused() -> None:
    with pytest.raises(StudyError, match="--inversion-steps 0"):
        levels_of(torch.rand(1, SIDE, SIDE), PixelSpec(image_size=None, intensity="raw"))
