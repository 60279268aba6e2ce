"""A synthetic patient: a random smooth diffeomorphic and affine warp of one anatomy, cut along a plane.

The warp is the flow of a stationary velocity field, integrated by scaling and squaring (Arsigny, Commowick,
Pennec and Ayache, MICCAI 2006), after a small affine map. Image and labels are read through one and the same
map, so that masks stay exact. Only the pixels of the slice are resampled, which makes a patient a matter of
milliseconds.

Dimension key: D = z, H = y, W = x of a volume (see ``anatomy``); a slice is H rows by W columns. A point is
(x, y, z) in mm.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt
import torch
from scipy import ndimage
from torch import Tensor
from torch.nn.functional import grid_sample

from simulation.anatomy import Anatomy, Plane

# The field is held on a coarse grid over the head, in MNI mm, with room for the affine map at its border.
_GRID_SPACING_MM = 6.0
_GRID_ORIGIN_XYZ_MM = (-96.0, -132.0, -84.0)
_GRID_SHAPE_DHW = (31, 39, 33)
BRAIN_CENTRE_XYZ_MM = (0.0, -17.0, 8.0)

# (width of the Gaussian, root mean square velocity per axis), both in mm: overall shape, then folds and
# ventricles. Adults differ from the template by displacements of this order (a few mm, locally up to 10 mm).
_VELOCITY_SCALES_MM = ((26.0, 2.6), (10.0, 1.2))
_ROTATION_SD_DEGREES = 3.0
_SCALE_SD = 0.035
_TRANSLATION_SD_MM = 2.0
_LARGEST_DRAW_SD = 2.0  # affine parameters beyond this many standard deviations are cut to it
_SQUARINGS = 5
SMALLEST_JACOBIAN = 0.15

_DEEP_GREY_RADIUS_MM = 35.0
_ALIGNMENT_STEPS = 3

# Edge of the square that holds every warped head: the brain is 180 mm long, 145 mm wide and 150 mm high.
_FIELD_OF_VIEW_MM = {"axial": 212.0, "coronal": 172.0}


@dataclass(frozen=True)
class SlicePlane:
    """A square of pixels in patient space, shown as radiologists do: the patient's left on the right.

    Attributes:
        plane: ``"axial"``: row 0 is anterior; ``"coronal"``: row 0 is superior. Column 0 is the right side.
        position_mm: z of an axial slice, y of a coronal one.
        image_size: pixels along each edge.
    """

    plane: Plane
    position_mm: float
    image_size: int

    @property
    def pixel_mm(self) -> float:
        """Edge of a pixel in mm."""
        return _FIELD_OF_VIEW_MM[self.plane] / self.image_size

    def affine(self) -> npt.NDArray[np.float64]:
        """Map of (row, column, 0, 1) to (x, y, z, 1) in mm; float64 4 x 4, as a NIfTI header wants it."""
        half_mm = self.pixel_mm * (self.image_size - 1) / 2
        matrix = np.zeros((4, 4))
        matrix[0, 1] = -self.pixel_mm
        matrix[0, 3] = BRAIN_CENTRE_XYZ_MM[0] + half_mm
        down, through = (1, 2) if self.plane == "axial" else (2, 1)
        matrix[down, 0] = -self.pixel_mm
        matrix[down, 3] = BRAIN_CENTRE_XYZ_MM[down] + half_mm
        matrix[through, 2] = self.pixel_mm
        matrix[through, 3] = self.position_mm
        matrix[3, 3] = 1.0
        return matrix

    def pixel_centres(self) -> Tensor:
        """Patient-space position of every pixel centre in mm; float32 [H, W, 3]."""
        matrix = torch.from_numpy(self.affine()[:3]).float()
        steps = torch.arange(self.image_size, dtype=torch.float32).unsqueeze(-1)
        return (steps * matrix[:, 0]).unsqueeze(1) + (steps * matrix[:, 1] + matrix[:, 3])


@dataclass(frozen=True)
class PatientWarp:
    """The map from a patient's space to the atlas: an affine map, then a diffeomorphism.

    Attributes:
        matrix_34: affine part in mm; float64.
        displacement_3DHW: displacement of the second part in mm (x, y, z first), on the coarse grid; float32.
    """

    matrix_34: npt.NDArray[np.float64]
    displacement_3DHW: Tensor

    def to_atlas(self, points_mm: Tensor) -> Tensor:
        """Atlas positions of patient positions.

        Args:
            points_mm: float32, any shape that ends in 3.

        Returns:
            Positions in mm, same shape.
        """
        matrix = torch.from_numpy(self.matrix_34).float()
        aligned = points_mm @ matrix[:, :3].T + matrix[:, 3]
        return aligned + _displacement_at(self.displacement_3DHW, aligned)

    def jacobian_determinant(self) -> Tensor:
        """Determinant of the map at every corner of every cell of the grid; float32 [8, D-1, H-1, W-1].

        The displacement is trilinear inside a cell, so a one-sided difference along an edge is its exact
        derivative at the corner. All positive means that no tissue is folded or lost at any of them; inside a
        cell positivity follows in practice, not by proof.
        """
        corners = [_corner_determinant(self.displacement_3DHW, corner) for corner in range(8)]
        return torch.stack(corners) * float(np.linalg.det(self.matrix_34[:, :3]))


@dataclass(frozen=True)
class WarpedSlice:
    """What one slice of a patient shows before any scanner touches it.

    Attributes:
        image_HW: float32 in [0, 1].
        labels_HW: int64, labels of the anatomy.
        white_matter_HW: float32 in [0, 1], probability of white matter.
        atlas_x_HW: MNI x in mm of the tissue in each pixel: negative is the patient's left, whatever the warp.
        plane: where the slice lies.
    """

    image_HW: Tensor
    labels_HW: Tensor
    white_matter_HW: Tensor
    atlas_x_HW: Tensor
    plane: SlicePlane


def sample_patient_warp(generator: np.random.Generator) -> PatientWarp:
    """A random patient.

    Should the discrete flow fold (a draw far in the tail), its velocity is reduced by a fifth until it does not.

    Args:
        generator: the only source of randomness.

    Returns:
        A warp whose Jacobian determinant is positive at every corner of its grid.
    """
    matrix_34 = _sample_affine(generator)
    velocity_3DHW = _sample_velocity(generator)
    while True:
        warp = PatientWarp(matrix_34, integrate_velocity(velocity_3DHW))
        if float(warp.jacobian_determinant().min()) > SMALLEST_JACOBIAN:
            return warp
        velocity_3DHW = velocity_3DHW * 0.8


def integrate_velocity(velocity_3DHW: Tensor) -> Tensor:
    """Displacement of the flow of a stationary velocity field at time one, by scaling and squaring.

    Args:
        velocity_3DHW: mm per unit time, (x, y, z) first, on the coarse grid; float32.

    Returns:
        Displacement in mm, same shape. Zero velocity gives zero displacement.
    """
    nodes_DHW3 = grid_points_mm()
    displacement_3DHW: Tensor = velocity_3DHW / 2**_SQUARINGS
    for _ in range(_SQUARINGS):
        moved_DHW3 = nodes_DHW3 + displacement_3DHW.movedim(0, -1)
        onward_DHW3 = _displacement_at(displacement_3DHW, moved_DHW3)
        displacement_3DHW = displacement_3DHW + onward_DHW3.movedim(-1, 0)
    return displacement_3DHW


def align_slice(warp: PatientWarp, plane: SlicePlane) -> SlicePlane:
    """The patient's slice that shows the same anatomy as a given slice of the atlas.

    Stands for the technician who places slices by landmarks. Aligned on average over the deep grey matter
    (within 35 mm of the centre), to about 0.1 mm; elsewhere the patient's anatomy goes its own way.

    Args:
        warp: the patient.
        plane: its ``position_mm`` is an MNI coordinate.

    Returns:
        The same plane, moved along its normal to the patient's coordinate.
    """
    axis = 2 if plane.plane == "axial" else 1
    points_HW3 = plane.pixel_centres()
    central_HW = (points_HW3 - points_HW3.mean(dim=(0, 1))).norm(dim=-1) < _DEEP_GREY_RADIUS_MM
    points_N3 = points_HW3[central_HW]
    for _ in range(_ALIGNMENT_STEPS):
        points_N3[:, axis] -= warp.to_atlas(points_N3)[:, axis].mean() - plane.position_mm
    return replace(plane, position_mm=float(points_N3[0, axis]))


def warp_slice(anatomy: Anatomy, warp: PatientWarp, plane: SlicePlane) -> WarpedSlice:
    """One slice of a patient: the image by linear interpolation, labels by nearest, through the same map.

    Args:
        anatomy: the brain that is warped.
        warp: the patient.
        plane: the slice to cut in the patient's space.

    Returns:
        Image, labels, white matter and side of every pixel; outside of the anatomy all are 0.
    """
    atlas_HW3 = warp.to_atlas(plane.pixel_centres())

    index_HW3 = ((atlas_HW3 - torch.tensor(anatomy.origin_xyz_mm)) / anatomy.voxel_mm).numpy()[..., ::-1]

    def read(volume_DHW: npt.NDArray[np.float32]) -> Tensor:
        # Reads the volume in place; grid_sample would need a copy of all its 9 million voxels.
        values_HW: Tensor = torch.from_numpy(
            ndimage.map_coordinates(volume_DHW, np.moveaxis(index_HW3, -1, 0), order=1)
        )
        return values_HW

    return WarpedSlice(
        image_HW=read(anatomy.t1_DHW),
        labels_HW=torch.from_numpy(_nearest(anatomy.labels_DHW, index_HW3)).long(),
        white_matter_HW=read(anatomy.white_matter_DHW),
        atlas_x_HW=atlas_HW3[..., 0],
        plane=plane,
    )


def _nearest(volume_DHW: npt.NDArray[np.int16], index_HW3: npt.NDArray[np.float32]) -> npt.NDArray[np.int16]:
    """Value of the voxel nearest to each position; 0 outside of the volume."""
    nearest_HW3 = np.floor(index_HW3 + 0.5).astype(np.int64)
    last = np.array(volume_DHW.shape) - 1
    inside_HW = ((nearest_HW3 >= 0) & (nearest_HW3 <= last)).all(axis=-1)
    depth, height, width = np.moveaxis(np.clip(nearest_HW3, 0, last), -1, 0)
    return np.where(inside_HW, volume_DHW[depth, height, width], np.int16(0))


def _displacement_at(displacement_3DHW: Tensor, points_mm: Tensor) -> Tensor:
    """Trilinear displacement at positions in mm, of the same shape; constant beyond the grid."""
    last_xyz = torch.tensor(_GRID_SHAPE_DHW[::-1]) - 1
    index_xyz = (points_mm - torch.tensor(_GRID_ORIGIN_XYZ_MM)) / _GRID_SPACING_MM
    normalised_111N3 = (2 * index_xyz / last_xyz - 1).reshape(1, 1, 1, -1, 3)
    values_1311N = grid_sample(
        displacement_3DHW.unsqueeze(0), normalised_111N3, padding_mode="border", align_corners=True
    )
    return values_1311N[0, :, 0, 0].T.reshape(points_mm.shape)


def grid_points_mm() -> Tensor:
    """Positions of the nodes of the coarse grid; float32 [D, H, W, 3]."""
    axes_xyz = [
        origin + _GRID_SPACING_MM * torch.arange(size)
        for origin, size in zip(_GRID_ORIGIN_XYZ_MM, reversed(_GRID_SHAPE_DHW), strict=True)
    ]
    z_DHW, y_DHW, x_DHW = torch.meshgrid(*reversed(axes_xyz), indexing="ij")
    return torch.stack([x_DHW, y_DHW, z_DHW], dim=-1)


def _sample_velocity(generator: np.random.Generator) -> Tensor:
    velocity_3DHW = np.zeros((3, *_GRID_SHAPE_DHW))
    for width_mm, rms_mm in _VELOCITY_SCALES_MM:
        widths = (0.0, *[width_mm / _GRID_SPACING_MM] * 3)
        smooth_3DHW = ndimage.gaussian_filter(generator.standard_normal((3, *_GRID_SHAPE_DHW)), widths)
        velocity_3DHW += smooth_3DHW * (rms_mm / np.sqrt(np.mean(smooth_3DHW**2)))
    return torch.from_numpy(velocity_3DHW).float()


def _sample_affine(generator: np.random.Generator) -> npt.NDArray[np.float64]:
    rotation, log_scale, translation = np.clip(generator.standard_normal((3, 3)), -_LARGEST_DRAW_SD, _LARGEST_DRAW_SD)
    linear = np.diag(np.exp(_SCALE_SD * log_scale))
    for axis, angle in enumerate(np.deg2rad(_ROTATION_SD_DEGREES) * rotation):
        first, second = (axis + 1) % 3, (axis + 2) % 3
        turn = np.eye(3)
        turn[[first, second], [first, second]] = np.cos(angle)
        turn[first, second], turn[second, first] = -np.sin(angle), np.sin(angle)
        linear = turn @ linear
    centre = np.array(BRAIN_CENTRE_XYZ_MM)
    offset = centre + _TRANSLATION_SD_MM * translation - linear @ centre
    return np.column_stack([linear, offset])


def _corner_determinant(displacement_3DHW: Tensor, corner: int) -> Tensor:
    # The three bits of ``corner`` say, for z, y and x, at which end of the cell the derivatives are taken.
    ends = [(corner >> bit) & 1 for bit in (2, 1, 0)]
    derivatives = []
    for derivative_axis in (2, 1, 0):  # with respect to x, y, z
        derivative_3DHW = displacement_3DHW.diff(dim=derivative_axis + 1) / _GRID_SPACING_MM
        derivative_3DHW[2 - derivative_axis] += 1.0
        for axis, end in enumerate(ends):
            if axis != derivative_axis:
                derivative_3DHW = derivative_3DHW.narrow(axis + 1, end, displacement_3DHW.shape[axis + 1] - 1)
        derivatives.append(derivative_3DHW)
    (xx, yx, zx), (xy, yy, zy), (xz, yz, zz) = derivatives
    # Written out: half a million calls of a general determinant take seconds.
    determinant_DHW: Tensor = xx * (yy * zz - zy * yz) - yx * (xy * zz - zy * xz) + zx * (xy * yz - yy * xz)
    return determinant_DHW
