"""Image files of real scanners' formats: read as a screen would show them, or refused in one line."""

import logging
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
import pydicom
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from PIL import Image

from client.images import MAX_PIXELS, is_dicom, read_image, read_label_map
from medfed.errors import DataError

SCANS = Path(pydicom.__file__).parent / "data" / "test_files"
CT = SCANS / "CT_small.dcm"


def edited(tmp_path: Path, edit: Callable[[Any], object], source: Path = CT) -> Path:
    dataset = pydicom.dcmread(source)
    edit(dataset)
    dataset.save_as(tmp_path / "edited.dcm")
    return tmp_path / "edited.dcm"


@pytest.mark.parametrize(
    ("file", "shape", "low", "high", "spacing_mm", "orientation"),
    [
        ("CT_small.dcm", (128, 128), -896, 1167, (0.661468, 0.661468), "PL"),  # GE
        ("MR_small.dcm", (64, 64), 127, 2145, (0.3125, 0.3125), "PL"),  # Toshiba
        ("examples_overlay.dcm", (300, 484), 0, 1123, (0.72314, 0.72314), "PL"),  # Siemens
        ("examples_palette.dcm", (350, 800, 3), 0, 65280, None, None),  # Philips
        ("examples_rgb_color.dcm", (240, 320, 3), 0, 255, None, None),  # GE, ultrasound
    ],
)
def test_dicom_of_several_vendors_is_read_with_its_geometry(
    file: str, shape: tuple[int, ...], low: float, high: float, spacing_mm: tuple[float, float] | None, orientation: str
) -> None:
    picture = read_image(SCANS / file, where="row 2")
    assert (picture.array.shape, picture.array.dtype) == (shape, np.float32)
    assert (picture.array.min(), picture.array.max()) == (low, high)
    assert picture.spacing_mm == (None if spacing_mm is None else pytest.approx(spacing_mm, abs=1e-5))
    assert picture.orientation == orientation


@pytest.mark.parametrize("way", ["RLE", "bigendian", "expb", "implicit", "jp2klossless", "padded"])
def test_one_scan_in_every_lossless_coding_is_one_image(way: str) -> None:
    expected = read_image(SCANS / "MR_small.dcm", where="row 2").array
    assert np.array_equal(read_image(SCANS / f"MR_small_{way}.dcm", where="row 2").array, expected)


def test_rescale_is_applied_to_stored_values(tmp_path: Path) -> None:
    stored = pydicom.dcmread(CT).pixel_array.astype(np.float32)
    path = edited(tmp_path, lambda scan: scan.update({"RescaleSlope": "2.5", "RescaleIntercept": "-7"}))
    assert np.array_equal(read_image(path, where="row 2").array, stored * 2.5 - 7)


def test_monochrome1_is_inverted_for_images_and_not_for_label_maps(tmp_path: Path) -> None:
    expected = read_image(CT, where="row 2").array
    path = edited(tmp_path, lambda scan: setattr(scan, "PhotometricInterpretation", "MONOCHROME1"))
    inverted = read_image(path, where="row 2").array
    assert np.array_equal(inverted, expected.max() + expected.min() - expected)
    assert np.array_equal(read_label_map(path, where="row 2").array, expected)


@pytest.mark.parametrize(
    ("file", "expected"),
    [
        ("SC_rgb_rle_2frame.dcm", r"one 2-D image .* multi-frame DICOM object \(2 frames\); convert"),
        ("liver_1frame.dcm", "multi-frame DICOM object"),
        ("MR_small_jpeg_ls_lossless.dcm", "got JPEG-LS Lossless Image Compression.*gdcmconv --raw"),
        ("SC_rgb_jpeg_gdcm.dcm", "got JPEG Lossless, Non-Hierarchical.*decompress the file first"),
        ("JPGExtended.dcm", "got JPEG Extended.*decompress the file first"),
        ("rtplan.dcm", r"DICOM without pixels \(RT Plan Storage\)"),
        ("no_meta.dcm", "neither DICOM with a file header nor"),
        ("MR_truncated.dcm", "expected a readable image at .*MR_truncated.dcm, got ValueError; restore"),
        ("meta_missing_tsyntax.dcm", "expected Rows in the DICOM header"),
    ],
)
def test_dicom_that_is_no_2d_image_is_refused_with_what_to_do(file: str, expected: str) -> None:
    with pytest.raises(DataError, match=expected) as caught:
        read_image(SCANS / file, where="row 2")
    assert str(caught.value).startswith("row 2: ")
    assert str(caught.value).isprintable()


def test_orientation_is_where_array_axes_point_in_the_patient(tmp_path: Path) -> None:
    sagittal = edited(tmp_path, lambda scan: setattr(scan, "ImageOrientationPatient", [0, 1, 0, 0, 0, -1]))
    assert read_image(sagittal, where="row 2").orientation == "IP"
    image = nibabel.Nifti1Image(np.ones((1, 6, 8), np.float32), np.diag([2.0, 0.5, -0.75, 1.0]))
    nibabel.save(image, tmp_path / "a.nii.gz")
    picture = read_image(tmp_path / "a.nii.gz", where="row 2")
    assert (picture.array.shape, picture.spacing_mm, picture.orientation) == ((6, 8), (0.5, 0.75), "AI")


def test_palette_of_a_png_colours_the_image_and_numbers_the_label_map(tmp_path: Path) -> None:
    indices = np.zeros((8, 8), np.uint8)
    indices[2:5, 2:5] = 1
    image = Image.fromarray(indices, mode="P")
    image.putpalette([10, 20, 30, 200, 100, 0])
    image.save(tmp_path / "a.png")
    assert read_image(tmp_path / "a.png", where="row 2").array[3, 3].tolist() == [200, 100, 0]
    assert np.array_equal(read_label_map(tmp_path / "a.png", where="row 2").array, indices)


@pytest.mark.parametrize("mode", ["L", "P"])
def test_tiff_of_several_pages_is_refused(tmp_path: Path, mode: str) -> None:
    pages = [Image.new(mode, (8, 8), number) for number in range(3)]
    pages[0].save(tmp_path / "a.tif", save_all=True, append_images=pages[1:])
    with pytest.raises(DataError, match="expected one picture in .*a.tif, got 3"):
        read_image(tmp_path / "a.tif", where="row 2")


@pytest.mark.parametrize(
    ("array", "expected"),
    [
        (np.array(["a", "b"]), "real numbers"),
        (np.ones((3, 3), complex), "real numbers"),
        (np.ones((0, 5)), "1 to 134217728 pixels"),
        (np.array([{}], dtype=object), "readable image"),
    ],
)
def test_array_that_is_no_image_is_refused(tmp_path: Path, array: np.ndarray, expected: str) -> None:
    np.save(tmp_path / "a.npy", array)
    with pytest.raises(DataError, match=expected):
        read_image(tmp_path / "a.npy", where="row 2")


@pytest.mark.parametrize("name", ["a.nii", "a.npy", "a.png", "MR_small.dcm"])
def test_image_has_memory_of_its_own(tmp_path: Path, name: str) -> None:
    picture = read_image(sound_file(name, tmp_path), where="row 2")
    assert picture.array.flags.writeable
    np.save(tmp_path / "mapped.npy", np.ones((4, 4), np.float32))
    mapped = read_image(tmp_path / "mapped.npy", where="row 2").array
    assert type(mapped) is np.ndarray
    assert mapped.flags.writeable


def test_headers_that_claim_too_many_pixels_are_refused_before_they_are_believed(tmp_path: Path) -> None:
    huge = edited(tmp_path, lambda scan: scan.update({"Rows": 65535, "Columns": 65535}))
    with pytest.raises(DataError, match=f"1 to {MAX_PIXELS} pixels"):
        read_image(huge, where="row 2")
    nibabel.save(nibabel.Nifti1Image(np.ones((4, 4), np.float32), np.eye(4)), tmp_path / "a.nii")
    content = bytearray((tmp_path / "a.nii").read_bytes())
    content[42:46] = (32000).to_bytes(2, "little") * 2  # dim[1] and dim[2] of the NIfTI-1 header
    (tmp_path / "a.nii").write_bytes(content)
    with pytest.raises(DataError, match=f"1 to {MAX_PIXELS} pixels"):
        read_image(tmp_path / "a.nii", where="row 2")


def test_nothing_of_a_header_is_logged_or_warned_about(
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    capfd: pytest.CaptureFixture[str],
    recwarn: pytest.WarningsRecorder,
) -> None:
    caplog.set_level(logging.DEBUG)
    path = edited(tmp_path, lambda scan: None)
    content = path.read_bytes().replace(b"19970430", b"Jane Doe")  # no date: pydicom would quote it
    path.write_bytes(content)
    shutil.copy(SCANS / "badVR.dcm", tmp_path / "bad.dcm")
    read_image(path, where="row 2")
    with pytest.raises(DataError):
        read_image(tmp_path / "bad.dcm", where="row 2")
    assert not caplog.records
    assert not recwarn.list
    assert capfd.readouterr() == ("", "")
    assert not logging.getLogger("pydicom").disabled


def test_refusal_of_a_damaged_header_does_not_quote_it(tmp_path: Path) -> None:
    path = edited(tmp_path, lambda scan: None)
    content = path.read_bytes()
    assert content.count(b"-1024") >= 1  # RescaleIntercept, "-1024 "
    path.write_bytes(content.replace(b"-1024 ", b"JaneDo"))
    with pytest.raises(DataError, match="expected a readable image") as caught:
        read_image(path, where="row 2")
    assert "Jane" not in str(caught.value)


@pytest.mark.parametrize(
    ("name", "expected"),
    [("a.dcm", True), ("IM0001", True), ("1.2.840.5", True), ("a.NII.GZ", False), ("a.PNG", False), ("a.npy", False)],
)
def test_what_has_no_other_formats_name_is_dicom(name: str, expected: bool) -> None:
    assert is_dicom(Path(name)) is expected


def sound_file(name: str, folder: Path) -> Path:
    """A small file of the format that the name stands for."""
    path = folder / name
    picture = (np.arange(20 * 16) % 251).astype(np.uint8).reshape(20, 16)
    if name.endswith((".nii", ".nii.gz")):
        nibabel.save(nibabel.Nifti1Image(picture.astype(np.float32), np.eye(4)), path)
    elif name.endswith(".npy"):
        np.save(path, picture)
    elif name.endswith((".png", ".tif", ".jpg", ".bmp")):
        Image.fromarray(picture).save(path)
    else:
        shutil.copy(SCANS / name, path)
    return path


FORMATS = [
    *("a.nii", "a.nii.gz", "a.npy", "a.png", "a.tif", "a.jpg", "a.bmp"),
    *("MR_small.dcm", "MR_small_RLE.dcm", "MR_small_jp2klossless.dcm", "SC_rgb_jpeg_dcmtk.dcm"),
]


def an_image_or_a_data_error(path: Path) -> None:
    refusal = None
    try:
        picture = read_image(path, where="row 2")
    except DataError as error:
        refusal = str(error)
    if refusal is None:
        assert picture.array.dtype == np.float32
        assert 1 <= picture.array.size <= MAX_PIXELS
    else:
        assert refusal.isprintable()
        assert len(refusal) < 1000


@pytest.mark.parametrize("name", FORMATS)
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=40)
@given(data=st.data())
def test_damaged_file_is_an_image_or_a_data_error(name: str, tmp_path: Path, data: st.DataObject) -> None:
    path = tmp_path / name
    if not path.exists():
        sound_file(name, tmp_path)
        (tmp_path / "sound").write_bytes(path.read_bytes())
        read_image(path, where="row 2")
    content = bytearray((tmp_path / "sound").read_bytes())
    header = st.integers(0, min(len(content) - 1, 1500))
    for position in data.draw(st.lists(header | st.integers(0, len(content) - 1), max_size=6), label="positions"):
        content[position] ^= 1 << data.draw(st.integers(0, 7), label="bit")
    del content[data.draw(st.just(len(content)) | st.integers(0, len(content)), label="length") :]
    path.write_bytes(content)
    an_image_or_a_data_error(path)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=40)
@given(st.sampled_from([".nii", ".nii.gz", ".npy", ".png", ".dcm"]), st.binary(max_size=400))
@example(".dcm", bytes(128) + b"DICM")
@example(".npy", b"\x93NUMPY\x01\x00\xff\xff")
def test_any_bytes_are_an_image_or_a_data_error(tmp_path: Path, suffix: str, content: bytes) -> None:
    path = tmp_path / f"a{suffix}"
    path.write_bytes(content)
    an_image_or_a_data_error(path)
