"""Any real data set as the hospitals of a study: a manifest in, one manifest for each site out; images stay in place.

Patients are dealt out, never images: all rows of a patient go to one site, with the split that they have.

==============  ==========================================================================================
way             what decides
==============  ==========================================================================================
``dirichlet``   the label: of each class, sites get shares drawn from a Dirichlet distribution of concentration
                alpha (Yurochkin et al. 2019; Hsu, Qi and Brown 2019); small alpha, few classes per site
``quantity``    chance; sites have shares of all patients drawn from a Dirichlet distribution
``uniform``     chance; sites of equal size
``column``      a column of the manifest, such as a hospital or a scanner: one site for each value
==============  ==========================================================================================
"""

from __future__ import annotations

import csv
import io
import os
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np

from medfed.canonical import derive_seed
from medfed.durable_file import replace_durably
from medfed.errors import DataError

Way = Literal["dirichlet", "quantity", "uniform", "column"]
Row = dict[str, str]

_FILES = ("image", "label", "lesion_mask")
_NEEDED = ("image", "patient_id", "split")
_SPLITS = ("train", "test")
_NOT_IN_A_NAME = re.compile(r"[^a-z0-9]+")
_LONGEST_NAME = 48


@dataclass(frozen=True)
class Partition:
    """What came out.

    Attributes:
        sites: rows of each site, in the order of the manifest.
        column: what labels were counted by; None if by nothing.
    """

    sites: Mapping[str, Sequence[Row]]
    column: str | None

    def patients(self, site: str, split: str) -> int:
        """Patients of a site in a split."""
        return len({row["patient_id"] for row in self.sites[site] if row["split"] == split})

    def labels(self, site: str) -> Mapping[str, int]:
        """Patients of a site by the value of the column that labels were counted by."""
        if self.column is None:
            return {}
        return Counter(_label_of(self.sites[site], self.column).values())

    @property
    def values(self) -> list[str]:
        """All values of that column, in order."""
        return sorted({value for site in self.sites for value in self.labels(site)}, key=_natural)


def read_rows(manifest: Path) -> list[Row]:
    """The rows of a manifest.

    Raises:
        DataError: it cannot be read, lacks a column, or has a patient in two splits.
    """
    try:
        with manifest.open(newline="", encoding="utf-8-sig") as file:
            reader = csv.DictReader(file)
            if missing := [name for name in _NEEDED if name not in (reader.fieldnames or [])]:
                raise DataError(f"{manifest}: expected a column {missing[0]!r}, got none; add it.")
            rows = [{name: (value or "").strip() for name, value in row.items() if name} for row in reader]
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise DataError(f"Expected a readable CSV manifest at {manifest}, got: {error}.") from None
    split_of: dict[str, str] = {}
    for number, row in enumerate(rows, start=2):
        if row["split"] not in _SPLITS or not row["patient_id"]:
            raise DataError(
                f"{manifest}, row {number}: expected a patient_id and split 'train' or 'test', got "
                f"{row['patient_id']!r} and {row['split']!r}."
            )
        if split_of.setdefault(row["patient_id"], row["split"]) != row["split"]:
            raise DataError(
                f"{manifest}, row {number}: expected all images of a patient in one split, got train and test; "
                "move the patient to one of them."
            )
    if not rows:
        raise DataError(f"{manifest}: expected at least one image, got an empty manifest.")
    return rows


def partition(
    rows: Sequence[Row],
    way: Way,
    *,
    num_sites: int | None,
    column: str | None,
    concentration: float,
    least: int,
    seed: int,
) -> Partition:
    """Deal out patients to sites.

    Args:
        rows: as :func:`read_rows` gives them.
        way: as in the table of this module.
        num_sites: None for ``column``, where the column has as many values as there are sites.
        column: the label for ``dirichlet`` (of a patient: of the first image), the site for ``column``; for the others
            what the table of the outcome counts, if anything.
        concentration: alpha of the Dirichlet distribution.
        least: training and held-out patients that each site has at least; taken from the largest sites if need be.
        seed: equal seeds give equal partitions, whatever the order of rows.

    Raises:
        DataError: the column is not there, a patient has two values of it where sites are named by it, or there are
            not enough patients.
    """
    if column is not None and column not in rows[0]:
        raise DataError(f"Expected a column {column!r}, got {', '.join(rows[0])}; name another.")
    if way in ("dirichlet", "column") and column is None:
        raise DataError(f"Expected a column to deal out by for {way!r}, got none; give --column.")
    if way == "column":
        assert column is not None
        named = _by_column(rows, column)
    else:
        if num_sites is None or num_sites < 1:
            raise DataError(f"Expected a number of sites of at least 1 for {way!r}, got {num_sites}; give --sites.")
        label = column if way == "dirichlet" else None
        home = _dealt(rows, way, num_sites, label, concentration, least, seed)
        width = len(str(num_sites))
        named = {f"site-{index + 1:0{width}d}": [row for row in rows if home[row["patient_id"]] == index]
                 for index in range(num_sites)}  # fmt: skip
    for site, members in named.items():
        for split in _SPLITS:
            if not any(row["split"] == split for row in members):
                raise DataError(
                    f"Expected {split} patients at {site!r}, got none; choose fewer sites, or a larger --alpha."
                )
    return Partition(named, column)


def write_partition(result: Partition, manifest: Path, out: Path) -> dict[str, Path]:
    """Write ``<site>/manifest.csv`` of every site; files are named relative to it and stay where they are.

    Returns:
        Manifest of each site.

    Raises:
        DataError: there is something else at ``out`` already.
    """
    paths = {site: out / site / "manifest.csv" for site in result.sites}
    if out.exists() and (strange := [entry.name for entry in out.iterdir() if entry.name not in result.sites]):
        raise DataError(f"Expected {out} to hold this partition or nothing, got {strange[0]!r}; choose another folder.")
    for site, path in paths.items():
        path.parent.mkdir(parents=True, exist_ok=True)
        rows = [_moved(row, manifest.parent.resolve(), path.parent.resolve()) for row in result.sites[site]]
        write_rows(path, rows)
    return paths


def write_rows(path: Path, rows: Sequence[Mapping[str, str]]) -> None:
    """Write a manifest, whole or not at all."""
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, fieldnames=list(rows[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    replace_durably(path, text.getvalue().encode(), mode=0o644)


def _by_column(rows: Sequence[Row], column: str) -> dict[str, list[Row]]:
    named: dict[str, list[Row]] = {}
    value_of: dict[str, str] = {}
    origin: dict[str, str] = {}
    for row in rows:
        value = row[column]
        name = _NOT_IN_A_NAME.sub("-", value.lower()).strip("-")[:_LONGEST_NAME]
        if not name:
            raise DataError(f"Expected a value in {column!r} for every image, got {value!r}; fill it in.")
        if origin.setdefault(name, value) != value:
            raise DataError(f"Expected values of {column!r} with different letters or digits, got {origin[name]!r} and "
                            f"{value!r}; rename one.")  # fmt: skip
        if value_of.setdefault(row["patient_id"], value) != value:
            raise DataError(
                f"Expected all images of a patient at one site, got one with {value_of[row['patient_id']]!r} and "
                f"{value!r} in {column!r}; give the patient one of them."
            )
        named.setdefault(name, []).append(row)
    return dict(sorted(named.items()))


def _dealt(
    rows: Sequence[Row], way: Way, num_sites: int, label: str | None, concentration: float, least: int, seed: int
) -> dict[str, int]:
    """Site of every patient; splits are dealt out apart, by the same shares."""
    label_of = _label_of(rows, label) if label else dict.fromkeys((row["patient_id"] for row in rows), "")
    split_of = {row["patient_id"]: row["split"] for row in rows}
    home: dict[str, int] = {}
    for value in sorted(set(label_of.values())):
        drawn = np.random.default_rng(derive_seed(seed, "partition", way, value))
        shares = np.full(num_sites, 1 / num_sites)
        if way != "uniform":
            shares = drawn.dirichlet(np.full(num_sites, concentration))
        for split in _SPLITS:
            patients = sorted(p for p, found in label_of.items() if found == value and split_of[p] == split)
            order = np.random.default_rng(derive_seed(seed, "order", value, split)).permutation(len(patients))
            # Half a patient is rounded at the borders between sites, so that shares are kept to within one.
            borders = np.rint(np.cumsum(shares) * len(patients)).astype(int)
            sites = np.searchsorted(borders, np.arange(len(patients)), side="right")
            home |= {patients[index]: int(min(site, num_sites - 1)) for index, site in zip(order, sites, strict=True)}
    for split in _SPLITS:
        _fill_up(home, [p for p, found in split_of.items() if found == split], split, num_sites, least, seed)
    return home


def _fill_up(home: dict[str, int], patients: list[str], split: str, num_sites: int, least: int, seed: int) -> None:
    """Move patients from the largest site to those that have fewer than the least, in place."""
    if len(patients) < least * num_sites:
        raise DataError(
            f"Expected {least * num_sites} {split} patients or more for {num_sites} sites of at least {least}, got "
            f"{len(patients)}; choose fewer sites."
        )
    generator = np.random.default_rng(derive_seed(seed, "fill up", split))
    order = [sorted(patients)[index] for index in generator.permutation(len(patients))]
    for site in range(num_sites):
        while sum(home[p] == site for p in patients) < least:
            sizes = Counter(home[p] for p in patients)
            largest = max(range(num_sites), key=lambda index: (sizes[index], -index))
            home[next(p for p in order if home[p] == largest)] = site


def _label_of(rows: Sequence[Row], column: str) -> dict[str, str]:
    """Value of the column by patient: that of the first image."""
    labels: dict[str, str] = {}
    for row in rows:
        labels.setdefault(row["patient_id"], row[column])
    return labels


def _moved(row: Row, before: Path, after: Path) -> Row:
    """The row with its files named relative to another folder."""
    return {
        name: os.path.relpath(before / value, after) if name in _FILES and value else value
        for name, value in row.items()
    }  # fmt: skip


def _natural(value: str) -> tuple[int, float, str]:
    """Numbers by size, then words."""
    try:
        return (0, float(value), "")
    except ValueError:
        return (1, 0.0, value)
