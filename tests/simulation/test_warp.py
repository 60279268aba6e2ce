"""Synthetic patients: diffeomorphic, and labels that move with the image."""

from __future__ import annotations

from types import MappingProxyType

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from simulation.anatomy import Anatomy
from simulation.warp import (
    PatientWarp,
    SlicePlane,
    align_slice,
    integrate_velocity,
    sample_patient_warp,
    warp_slice,
)

GRID_3DHW = (3, 31, 39, 33)
CENTRE_XYZ_MM = np.array([10.0, -20.0, 8.0])
RADIUS_MM = 25.0


def ball_anatomy() -> Anatomy:
    """A bright ball with label 1 in an empty head, on a grid of 2 mm."""
    z, y, x = np.meshgrid(np.arange(-80, 81, 2), np.arange(-120, 81, 2), np.arange(-90, 91, 2), indexing="ij")
    ball = np.hypot(np.hypot(x - CENTRE_XYZ_MM[0], y - CENTRE_XYZ_MM[1]), z - CENTRE_XYZ_MM[2]) <= RADIUS_MM
    return Anatomy(
        t1_DHW=ball.astype(np.float32),
        labels_DHW=ball.astype(np.int16),
        white_matter_DHW=ball.astype(np.float32),
        names=MappingProxyType({1: "ball"}),
        origin_xyz_mm=(-90.0, -120.0, -80.0),
        voxel_mm=2.0,
        licences=(),
    )


def identity() -> PatientWarp:
    return PatientWarp(np.eye(3, 4), torch.zeros(GRID_3DHW))


@settings(derandomize=True, max_examples=8, deadline=None)
@given(seed=st.integers(0, 2**32 - 1))
def test_jacobian_determinant_is_positive_everywhere(seed: int) -> None:
    determinant = sample_patient_warp(np.random.default_rng(seed)).jacobian_determinant()
    assert determinant.shape == (8, 30, 38, 32)
    assert float(determinant.min()) > 0.0
    assert float(determinant.max()) < 10.0


def test_jacobian_determinant_agrees_with_the_derivative_of_a_known_map() -> None:
    shear = torch.zeros(GRID_3DHW)
    shear[0] = 0.5 * torch.arange(31).float().view(31, 1, 1) * 6.0  # x moves by half of z: volume stays
    shear[1] = 0.2 * torch.arange(39).float().view(1, 39, 1) * 6.0  # y grows by a fifth
    warp = PatientWarp(np.diag([2.0, 1.0, 1.0, 1.0])[:3], shear)
    torch.testing.assert_close(warp.jacobian_determinant(), torch.full((8, 30, 38, 32), 2.4), rtol=1e-4, atol=0)


def test_a_fold_is_seen_by_the_jacobian_determinant() -> None:
    folded = torch.zeros(GRID_3DHW)
    folded[2, 15, 20, 20] = 9.0  # one node jumps over its neighbour, 6 mm away
    assert float(PatientWarp(np.eye(3, 4), folded).jacobian_determinant().min()) < 0.0


def test_flow_of_opposite_velocities_undoes_itself() -> None:
    nodes = torch.linspace(-1, 1, 39).view(1, 1, 39, 1)
    velocity = (10 * torch.exp(-4 * nodes**2)).expand(GRID_3DHW).clone()
    there = PatientWarp(np.eye(3, 4), integrate_velocity(velocity))
    back = PatientWarp(np.eye(3, 4), integrate_velocity(-velocity))
    points = torch.tensor([[0.0, -20.0, 0.0], [10.0, 5.0, 20.0], [-30.0, -60.0, 10.0]])
    assert float((there.to_atlas(points) - points).norm(dim=-1).max()) > 5.0
    torch.testing.assert_close(back.to_atlas(there.to_atlas(points)), points, atol=0.5, rtol=0)


def test_zero_velocity_is_the_identity() -> None:
    assert float(integrate_velocity(torch.zeros(GRID_3DHW)).abs().max()) == 0.0
    points = SlicePlane("coronal", -10.0, 64).pixel_centres()
    torch.testing.assert_close(identity().to_atlas(points), points)


@pytest.mark.parametrize("seed", [1, 2, 3])
def test_warped_label_of_a_ball_is_the_ball_at_the_mapped_points(seed: int) -> None:
    """Oracle: membership of each mapped point in the ball, without any resampling."""
    warp = sample_patient_warp(np.random.default_rng(seed))
    plane = align_slice(warp, SlicePlane("axial", float(CENTRE_XYZ_MM[2]), 128))
    warped = warp_slice(ball_anatomy(), warp, plane)
    distance_mm = (warp.to_atlas(plane.pixel_centres()) - torch.tensor(CENTRE_XYZ_MM).float()).norm(dim=-1)
    inside = warped.labels_HW == 1
    assert bool(inside[distance_mm < RADIUS_MM - 2].all())
    assert not bool(inside[distance_mm > RADIUS_MM + 2].any())
    assert float(warped.image_HW[inside].min()) >= 0.1  # image and labels move through one map
    assert float(warped.image_HW[~inside].max()) <= 0.9


@pytest.mark.parametrize("plane", [SlicePlane("axial", 8.0, 128), SlicePlane("coronal", -20.0, 128)])
def test_slices_show_the_patients_left_on_the_right(plane: SlicePlane) -> None:
    warped = warp_slice(ball_anatomy(), identity(), plane)
    columns = torch.nonzero(warped.labels_HW)[:, 1].float()
    assert float(columns.mean()) < 63.5  # the ball is on the patient's right
    assert float(warped.atlas_x_HW[:, 0].min()) > 0 > float(warped.atlas_x_HW[:, -1].max())


def test_affine_of_a_slice_maps_indices_to_pixel_centres() -> None:
    plane = SlicePlane("coronal", -12.0, 100)
    torch.testing.assert_close(
        plane.pixel_centres()[7, 31], torch.from_numpy((plane.affine() @ [7, 31, 0, 1])[:3]).float()
    )


def test_aligned_slice_shows_the_atlas_position() -> None:
    warp = sample_patient_warp(np.random.default_rng(5))
    aligned = align_slice(warp, SlicePlane("coronal", -12.0, 64))
    points = aligned.pixel_centres()
    central = (points - points.mean(dim=(0, 1))).norm(dim=-1) < 35
    assert float(warp.to_atlas(points)[central][:, 1].mean()) == pytest.approx(-12.0, abs=0.2)


def test_a_patient_is_decided_by_the_generator() -> None:
    first, again, other = (sample_patient_warp(np.random.default_rng(seed)) for seed in (3, 3, 4))
    assert torch.equal(first.displacement_3DHW, again.displacement_3DHW)
    assert np.array_equal(first.matrix_34, again.matrix_34)
    assert not torch.equal(first.displacement_3DHW, other.displacement_3DHW)
