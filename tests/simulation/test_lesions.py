"""Inserted lesions: known mask, right side, right size, nothing else touched."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from medfed.errors import DataError
from simulation.lesions import DIAMETER_MM, insert_lesion, lesion_targets, sample_lesion
from simulation.warp import SlicePlane, WarpedSlice


def white_slice() -> WarpedSlice:
    """A disc of white matter, 150 mm across, in an axial slice."""
    plane = SlicePlane("axial", 26.0, 256)
    points = plane.pixel_centres()
    brain = (points - points.mean(dim=(0, 1)))[..., :2].norm(dim=-1) < 75
    return WarpedSlice(
        image_HW=torch.where(brain, 0.8, 0.0),
        labels_HW=torch.zeros(256, 256, dtype=torch.int64),
        white_matter_HW=brain.float(),
        atlas_x_HW=points[..., 0],
        plane=plane,
    )


@settings(derandomize=True, max_examples=25, deadline=None)
@given(seed=st.integers(0, 2**32 - 1))
def test_mask_has_the_size_and_the_side_that_the_targets_say(seed: int) -> None:
    warped = white_slice()
    lesion = sample_lesion(np.random.default_rng(seed))
    image_HW, mask_HW = insert_lesion(warped, lesion)
    diameter_mm = 2 * math.sqrt(int(mask_HW.sum()) * warped.plane.pixel_mm**2 / math.pi)
    smallest, largest = DIAMETER_MM[lesion.size]
    assert 0.85 * smallest <= diameter_mm <= 1.15 * largest
    x_mm = warped.atlas_x_HW[mask_HW]
    assert bool((x_mm < 0).all()) if lesion.targets["lesion_side"] == 1 else bool((x_mm > 0).all())
    darker = image_HW[mask_HW] < warped.image_HW[mask_HW]
    assert bool(darker.all()) if lesion.contrast < 1 else not bool(darker.any())


def test_pixels_far_from_the_lesion_are_untouched() -> None:
    warped = white_slice()
    image_HW, mask_HW = insert_lesion(warped, sample_lesion(np.random.default_rng(1)))
    rows, columns = torch.nonzero(mask_HW).float().mean(dim=0)
    grid = torch.meshgrid(torch.arange(256.0), torch.arange(256.0), indexing="ij")
    far = torch.hypot(grid[0] - rows, grid[1] - columns) * warped.plane.pixel_mm > 40
    torch.testing.assert_close(image_HW[far], warped.image_HW[far])


def test_size_classes_do_not_overlap_and_all_classes_occur() -> None:
    assert DIAMETER_MM["small"][1] < DIAMETER_MM["large"][0]
    lesions = [sample_lesion(np.random.default_rng(seed)) for seed in range(60)]
    assert {(lesion.side, lesion.size, lesion.contrast < 1) for lesion in lesions} == {
        (side, size, dark) for side in ("left", "right") for size in ("small", "large") for dark in (True, False)
    }


def test_targets_of_no_lesion_are_all_zero() -> None:
    assert lesion_targets(None) == {"lesion_present": 0, "lesion_side": 0, "lesion_size": 0}


def test_same_lesion_in_the_next_slice_stays_in_place() -> None:
    lesion = sample_lesion(np.random.default_rng(2))
    warped = white_slice()
    shifted = replace(warped, white_matter_HW=warped.white_matter_HW.roll(2, dims=0))
    centres = [torch.nonzero(insert_lesion(s, lesion)[1]).float().mean(dim=0) for s in (warped, shifted)]
    assert float((centres[0] - centres[1]).norm()) < 5


def test_slice_without_white_matter_is_refused() -> None:
    warped = white_slice()
    empty = replace(warped, white_matter_HW=torch.zeros_like(warped.white_matter_HW))
    with pytest.raises(DataError, match="choose another slice"):
        insert_lesion(empty, sample_lesion(np.random.default_rng(0)))
