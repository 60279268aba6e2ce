import math

import numpy as np
import pytest

from medfed.metrics.saliency import mass_in_mask, pointing_hit

MASK = np.zeros((4, 5), dtype=bool)
MASK[1:3, 1:3] = True


def test_map_that_is_the_mask_points_at_it_with_all_its_mass():
    assert pointing_hit(MASK.astype(float), MASK) == 1.0
    assert mass_in_mask(MASK.astype(float), MASK) == 1.0
    assert pointing_hit(1.0 - MASK, MASK) == 0.0
    assert mass_in_mask(1.0 - MASK, MASK) == 0.0


def test_flat_map_scores_as_chance_does():
    flat = np.ones(MASK.shape)
    assert pointing_hit(flat, MASK) == pytest.approx(MASK.mean())
    assert mass_in_mask(flat, MASK) == pytest.approx(MASK.mean())


def test_negative_saliency_has_no_mass():
    saliency = np.where(MASK, 1.0, -10.0)
    saliency[0, 0] = 4.0
    assert mass_in_mask(saliency, MASK) == pytest.approx(0.5)


def test_empty_masks_and_maps_that_say_nothing_have_no_value():
    empty = np.zeros_like(MASK)
    assert math.isnan(pointing_hit(np.ones(MASK.shape), empty))
    assert math.isnan(mass_in_mask(np.ones(MASK.shape), empty))
    assert math.isnan(mass_in_mask(-np.ones(MASK.shape), MASK))
    assert math.isnan(pointing_hit(np.full(MASK.shape, np.nan), MASK))
    assert math.isnan(mass_in_mask(np.full(MASK.shape, np.nan), MASK))
