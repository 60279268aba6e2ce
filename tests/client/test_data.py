"""Cohorts: what breaks a rule is refused as a whole, in one line."""

from collections.abc import Callable
from pathlib import Path

import nibabel
import numpy as np
import pydicom
import pytest
import torch
from PIL import Image
from pydicom.dataset import FileDataset, FileMetaDataset
from pydicom.uid import ExplicitVRLittleEndian

from client.data import load_cohort, preprocess, read_expert_mask, refuse_shared_patients
from medfed.errors import DataError
from medfed.models.pixels import PixelSpec
from medfed.study_sections import ClassificationConfig, SegmentationConfig

TASK = SegmentationConfig(kind="segmentation", classes=("near", "far"))
PIXELS = PixelSpec(image_size=64)
MakeCohort = Callable[..., Path]


def change(manifest: Path, old: str, new: str) -> Path:
    text = manifest.read_text()
    assert old in text
    manifest.write_text(text.replace(old, new, 1))
    return manifest


def test_cohort_holds_every_image_in_manifest_order(make_cohort: MakeCohort) -> None:
    cohort = load_cohort("north", [make_cohort()], TASK, PIXELS)
    assert [item.patient_id for item in cohort.items] == [f"north-{n}" for n in range(5)]
    assert (len(cohort.train), len(cohort.test)) == (3, 2)
    first = cohort.train[0]
    assert first.image_CHW.shape == (1, 64, 64)
    assert (float(first.image_CHW.min()), float(first.image_CHW.max())) == (0.0, 1.0)
    assert first.annotation.class_M.tolist() == [0, 1]
    assert first.annotation.mask_MHW.sum(dim=(1, 2)).tolist() == [144, 224]
    x0, y0, x1, y1 = first.annotation.box_M4[0].int().tolist()
    assert bool(first.annotation.mask_MHW[0, y0 : y1 + 1, x0 : x1 + 1].all())


@pytest.mark.parametrize(
    ("old", "new", "expected"),
    [
        ("north-1,", ",", "row 3: expected a value in 'patient_id'"),
        ("north-4,test", "north-0,test", "patient 'north-0' in train and test"),
        (",train,", ",validation,", "split 'train' or 'test', got 'validation'"),
        ("image2.nii.gz", "image9.nii.gz", r"row 4: expected a file at .*image9.nii.gz"),
        ("patient_id,", "patient,", "column 'patient_id'"),
        ("label1.nii.gz", "image1.nii.gz", r"row 3: expected labels 0..2 in .*image1"),
    ],
)
def test_broken_row_is_refused_with_its_number(make_cohort: MakeCohort, old: str, new: str, expected: str) -> None:
    manifest = change(make_cohort(), old, new)
    with pytest.raises(DataError, match=expected) as caught:
        load_cohort("north", [manifest], TASK, PIXELS)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(("train", "test", "missing"), [(2, 0, "test"), (0, 2, "train")])
def test_site_without_one_of_the_splits_is_refused(
    make_cohort: MakeCohort, train: int, test: int, missing: str
) -> None:
    with pytest.raises(DataError, match=f"split = '{missing}', got none"):
        load_cohort("north", [make_cohort(train=train, test=test)], TASK, PIXELS)


def test_empty_manifest_is_refused(tmp_path: Path) -> None:
    manifest = tmp_path / "manifest.csv"
    manifest.write_text("image,label,patient_id,split\n")
    with pytest.raises(DataError, match="empty manifest"):
        load_cohort("north", [manifest], TASK, PIXELS)


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_voxel_that_is_not_finite_is_refused_with_its_file(make_cohort: MakeCohort, bad: float) -> None:
    manifest = make_cohort()
    image = np.ones((64, 64), dtype=np.float32)
    image[3, 4] = bad
    nibabel.save(nibabel.Nifti1Image(image, np.eye(4)), manifest.parent / "image1.nii.gz")
    with pytest.raises(DataError, match=r"row 3: .*image1.nii.gz: expected finite voxels, got 1"):
        load_cohort("north", [manifest], TASK, PIXELS)


def test_label_outside_the_classes_is_refused(make_cohort: MakeCohort) -> None:
    manifest = make_cohort()
    one_class = SegmentationConfig(kind="segmentation", classes=("near",))
    with pytest.raises(DataError, match=r"labels 0..1 in .*label0.nii.gz, got 2"):
        load_cohort("north", [manifest], one_class, PIXELS)


def test_unreadable_file_is_refused(make_cohort: MakeCohort) -> None:
    manifest = make_cohort()
    (manifest.parent / "image0.nii.gz").write_bytes(b"not an image")
    with pytest.raises(DataError, match="readable image"):
        load_cohort("north", [manifest], TASK, PIXELS)


def test_volume_is_refused_as_not_a_2d_image(make_cohort: MakeCohort) -> None:
    manifest = make_cohort()
    nibabel.save(nibabel.Nifti1Image(np.ones((8, 9, 10), np.float32), np.eye(4)), manifest.parent / "image0.nii.gz")
    with pytest.raises(DataError, match=r"2-D image, got shape \[8, 9, 10\]"):
        load_cohort("north", [manifest], TASK, PIXELS)


def test_patient_at_two_sites_is_refused(make_cohort: MakeCohort) -> None:
    north = load_cohort("north", [make_cohort("north")], TASK, PIXELS)
    manifest = change(make_cohort("south"), "south-4", "north-4")
    south = load_cohort("south", [manifest], TASK, PIXELS)
    with pytest.raises(DataError, match="'north-4' at 'north' and 'south'"):
        refuse_shared_patients({"north": north, "south": south})


def test_classification_reads_class_indices(make_cohort: MakeCohort) -> None:
    task = ClassificationConfig(kind="classification", targets={"side": ("left", "right")})
    manifest = make_cohort()
    cohort = load_cohort("north", [manifest], task, PIXELS)
    assert [item.annotation for item in cohort.train] == [{"side": 0}, {"side": 1}, {"side": 0}]
    with pytest.raises(DataError, match=r"'side' in 0..1, got '2'"):
        load_cohort("north", [change(manifest, "train,1", "train,2")], task, PIXELS)


def test_label_is_resized_with_the_image(make_cohort: MakeCohort) -> None:
    cohort = load_cohort("north", [make_cohort()], TASK, PixelSpec(image_size=128))
    item = cohort.train[0]
    assert item.image_CHW.shape == (1, 128, 128)
    assert item.annotation.mask_MHW.sum(dim=(1, 2)).tolist() == [4 * 144, 4 * 224]


def test_label_map_of_another_size_is_refused_before_anything_is_resized(make_cohort: MakeCohort) -> None:
    manifest = make_cohort()
    nibabel.save(nibabel.Nifti1Image(np.zeros((200, 40)), np.eye(4)), manifest.parent / "label0.nii.gz")
    with pytest.raises(DataError, match=r"image's size \[64, 64\], got \[200, 40\]"):
        load_cohort("north", [manifest], TASK, PIXELS)


def test_label_map_in_a_format_with_other_axes_is_refused(make_cohort: MakeCohort) -> None:
    manifest = make_cohort()
    Image.fromarray(np.zeros((64, 64), np.uint8)).save(manifest.parent / "label0.png")
    with pytest.raises(DataError, match="both as NIfTI or neither"):
        load_cohort("north", [change(manifest, "label0.nii.gz", "label0.png")], TASK, PIXELS)


def test_digest_of_a_cohort_changes_with_its_data(make_cohort: MakeCohort) -> None:
    manifest = make_cohort()
    before = load_cohort("north", [manifest], TASK, PIXELS).digest
    assert load_cohort("north", [manifest], TASK, PIXELS).digest == before
    change(manifest, "north-0,train", "north-0,test")
    assert load_cohort("north", [manifest], TASK, PIXELS).digest != before


def test_png_nifti_and_dicom_of_one_picture_are_one_image(tmp_path: Path) -> None:
    """Rows stay rows and columns stay columns in every format."""
    picture = np.arange(48 * 48, dtype=np.uint8).reshape(48, 48)
    Image.fromarray(picture).save(tmp_path / "a.png")
    nibabel.save(nibabel.Nifti1Image(picture.astype(np.float32), np.eye(4)), tmp_path / "a.nii.gz")
    meta = FileMetaDataset()
    meta.TransferSyntaxUID = ExplicitVRLittleEndian
    meta.MediaStorageSOPClassUID = pydicom.uid.SecondaryCaptureImageStorage
    meta.MediaStorageSOPInstanceUID = "1.2.3"
    scan = FileDataset(str(tmp_path / "a.dcm"), {}, file_meta=meta, preamble=bytes(128))
    scan.SOPClassUID, scan.SOPInstanceUID = meta.MediaStorageSOPClassUID, "1.2.3"
    scan.Rows, scan.Columns, scan.SamplesPerPixel = 48, 48, 1
    scan.PhotometricInterpretation, scan.PixelRepresentation = "MONOCHROME2", 0
    scan.BitsAllocated, scan.BitsStored, scan.HighBit = 8, 8, 7
    scan.ImageOrientationPatient, scan.ImagePositionPatient = [1, 0, 0, 0, 1, 0], [0, 0, 0]
    scan.PixelSpacing = [1, 1]
    scan.PixelData = picture.tobytes()
    scan.save_as(tmp_path / "a.dcm", enforce_file_format=True)
    np.save(tmp_path / "a.npy", picture)
    names = ("a.png", "a.nii.gz", "a.dcm", "a.npy")
    rows = [f"{name},{name},p{index},{'train' if index else 'test'},0" for index, name in enumerate(names)]
    (tmp_path / "m.csv").write_text("\n".join(["image,label,patient_id,split,side", *rows]))
    task = ClassificationConfig(kind="classification", targets={"side": ("left", "right")})
    images = [item.image_CHW for item in load_cohort("n", [tmp_path / "m.csv"], task, PixelSpec(48)).items]
    for image in images:
        torch.testing.assert_close(image, images[0])
    assert images[0][0, 24, 1] > images[0][0, 24, 0]


def test_preprocessing_gives_the_normalised_three_channels_a_model_expects() -> None:
    pixels = PixelSpec(image_size=32, mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.25))
    image_CHW = preprocess(np.random.default_rng(0).random((32, 32), dtype=np.float32), pixels, where="here")
    assert image_CHW.shape == (3, 32, 32)
    assert (float(image_CHW[0].min()), float(image_CHW[0].max())) == (-1.0, 1.0)
    assert float(image_CHW[2].max()) == 2.0
    assert pixels.digest != PixelSpec(image_size=32).digest


def test_groups_outlines_and_spacing_are_read_where_the_manifest_has_them(tmp_path: Path) -> None:
    task = ClassificationConfig(kind="classification", targets={"present": ("no", "yes")})
    mask = np.zeros((20, 10), dtype=np.uint8)
    mask[4:8, 2:4] = 200
    for name, unit in (("a", "mm"), ("b", "unknown")):
        image = nibabel.Nifti1Image(np.random.default_rng(0).normal(size=(20, 10)).astype(np.float32), np.eye(4))
        image.header.set_xyzt_units(unit)
        image.header.set_zooms((0.5, 2.0))
        nibabel.save(image, tmp_path / f"{name}.nii.gz")
    nibabel.save(nibabel.Nifti1Image(mask, np.eye(4)), tmp_path / "mask.nii.gz")
    (tmp_path / "manifest.csv").write_text(
        "image,patient_id,split,present,lesion_mask,attribute_sex,attribute_age\n"
        "a.nii.gz,1,train,1,mask.nii.gz,f, \n"
        "b.nii.gz,2,test,0,,m,old\n"
    )
    cohort = load_cohort("north", [tmp_path / "manifest.csv"], task, PixelSpec(image_size=40))
    (first,), (second,) = cohort.train, cohort.test
    assert first.attributes == {"sex": "f"}
    assert second.attributes == {"sex": "m", "age": "old"}
    assert first.spacing_mm == (0.25, 0.5)  # 20 x 10 pixels of 0.5 x 2.0 mm became 40 x 40
    assert second.spacing_mm is None
    outline = read_expert_mask(first)
    assert outline is not None
    assert outline.shape == (40, 40)
    assert np.array_equal(outline, np.kron(mask > 0, np.ones((2, 4), dtype=bool)))
    assert read_expert_mask(second) is None
    (tmp_path / "mask.nii.gz").unlink()
    with pytest.raises(DataError, match="lesion_mask"):
        load_cohort("north", [tmp_path / "manifest.csv"], task, PixelSpec(image_size=40))
