from pathlib import Path

import nibabel
import numpy as np
import pytest
from PIL import Image
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.uid import ExplicitVRLittleEndian

from client.spacing import pixel_spacing_mm


def _nifti(path: Path, zooms: tuple[float, ...], unit: str, shape: tuple[int, ...] = (6, 8)) -> Path:
    image = nibabel.Nifti1Image(np.zeros(shape, dtype=np.uint8), np.eye(4))
    image.header.set_xyzt_units(unit)
    image.header.set_zooms(zooms)
    nibabel.save(image, path)
    return path


def test_nifti_spacing_is_that_of_rows_and_columns_in_the_unit_it_names(tmp_path: Path) -> None:
    assert pixel_spacing_mm(_nifti(tmp_path / "a.nii.gz", (0.5, 2.0), "mm")) == (0.5, 2.0)
    assert pixel_spacing_mm(_nifti(tmp_path / "b.nii", (500.0, 2000.0), "micron")) == pytest.approx((0.5, 2.0))
    assert pixel_spacing_mm(_nifti(tmp_path / "c.nii", (3.0, 0.5, 2.0), "mm", (1, 6, 8))) == (0.5, 2.0)


def test_nifti_without_a_unit_or_of_three_dimensions_has_no_spacing(tmp_path: Path) -> None:
    assert pixel_spacing_mm(_nifti(tmp_path / "a.nii", (0.5, 2.0), "unknown")) is None
    assert pixel_spacing_mm(_nifti(tmp_path / "b.nii", (1.0, 0.5, 2.0), "mm", (4, 6, 8))) is None


def test_dicom_spacing_is_its_pixel_spacing(tmp_path: Path) -> None:
    for name, spacing, expected in (("with", [0.7, 0.9], (0.7, 0.9)), ("zero", [0.0, 0.9], None), ("none", None, None)):
        dataset = Dataset()
        dataset.file_meta = FileMetaDataset()
        dataset.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
        if spacing is not None:
            dataset.PixelSpacing = spacing
        dataset.save_as(tmp_path / name, enforce_file_format=False, implicit_vr=False, little_endian=True)
        assert pixel_spacing_mm(tmp_path / name) == expected


def test_picture_formats_know_no_millimetres(tmp_path: Path) -> None:
    Image.new("L", (4, 4)).save(tmp_path / "a.png", dpi=(72, 72))
    assert pixel_spacing_mm(tmp_path / "a.png") is None
    assert pixel_spacing_mm(tmp_path / "a.npy") is None
