"""How large a pixel of an image file is, in millimetres, where the file says so."""

from __future__ import annotations

from pathlib import Path

Spacing = tuple[float, float]
"""Height and width of a pixel: of its rows and columns, as the array has them."""

_MM_OF_UNIT = {"mm": 1.0, "meter": 1000.0, "micron": 0.001}


def pixel_spacing_mm(path: Path) -> Spacing | None:
    """Spacing of a 2-D image's rows and columns in millimetres; None where it is not known.

    ========================= ======================================================================
    NIfTI                     from the header, if it names a unit of length; axes of one voxel are left out
    DICOM                     Pixel Spacing (0028,0030), which is in mm
    PNG, JPEG, TIFF, ``.npy`` None: what they may say of inches is about printing
    spacing not above 0       None
    ========================= ======================================================================
    """
    name = path.name.lower()
    if name.endswith((".nii", ".nii.gz")):
        found = _of_nifti(path)
    elif name.endswith((".png", ".jpg", ".jpeg", ".tif", ".tiff", ".bmp", ".npy")):
        return None
    else:
        found = _of_dicom(path)
    return found if found is not None and min(found) > 0 else None


def _of_nifti(path: Path) -> Spacing | None:
    import nibabel

    header = nibabel.load(path).header
    scale = _MM_OF_UNIT.get(header.get_xyzt_units()[0])
    sides = [float(z) for z, n in zip(header.get_zooms(), header.get_data_shape(), strict=True) if n > 1]
    return None if scale is None or len(sides) != 2 else (sides[0] * scale, sides[1] * scale)


def _of_dicom(path: Path) -> Spacing | None:
    import pydicom

    spacing = pydicom.dcmread(path, stop_before_pixels=True, force=True).get("PixelSpacing")
    return None if spacing is None or len(spacing) != 2 else (float(spacing[0]), float(spacing[1]))
