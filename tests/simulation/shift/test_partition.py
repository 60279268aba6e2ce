"""Partition of real data: by patient, seeded, as skewed as asked for, and files stay where they are."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from typer.testing import CliRunner

from medfed.errors import DataError
from simulation.cohort_command import app
from simulation.shift.partition import Partition, Row, Way, partition, read_rows, write_partition


def data_set(num_patients: int = 120, num_classes: int = 4, seed: int = 0) -> list[Row]:
    """One to three images of each patient; every fifth patient is held out."""
    generator = np.random.default_rng(seed)
    return [
        {
            "image": f"images/{number}-{index}.png",
            "patient_id": f"p{number}",
            "split": "test" if number % 5 == 0 else "train",
            "diagnosis": str(int(label)),
            "centre": ("Oslo", "Bergen", "Tromso")[number % 3],
        }
        for number, label in enumerate(generator.integers(num_classes, size=num_patients))
        for index in range(int(generator.integers(1, 4)))
    ]


def dealt(rows: list[Row], way: Way, *, sites: int = 4, alpha: float = 0.5, seed: int = 0, least: int = 1) -> Partition:
    column = {"dirichlet": "diagnosis", "column": "centre"}.get(way)
    number = None if way == "column" else sites
    return partition(rows, way, num_sites=number, column=column, concentration=alpha, least=least, seed=seed)


@settings(max_examples=30)
@given(
    st.sampled_from(["dirichlet", "quantity", "uniform", "column"]),
    st.integers(1, 6),
    st.floats(0.05, 20),
    st.integers(0, 10**6),
)
def test_every_image_is_at_one_site_and_patients_never_cross(way: Way, sites: int, alpha: float, seed: int) -> None:
    rows = data_set()
    result = dealt(rows, way, sites=sites, alpha=alpha, seed=seed)
    out = [row for members in result.sites.values() for row in members]
    assert sorted(row["image"] for row in out) == sorted(row["image"] for row in rows)
    homes: dict[str, set[str]] = {}
    for site, members in result.sites.items():
        for row in members:
            homes.setdefault(row["patient_id"], set()).add(site)
    assert all(len(home) == 1 for home in homes.values())
    assert all(result.patients(site, split) >= 1 for site in result.sites for split in ("train", "test"))


@pytest.mark.parametrize("way", ["dirichlet", "quantity", "uniform"])
def test_partition_depends_on_the_seed_and_not_on_the_order_of_rows(way: Way) -> None:
    rows = data_set()

    def homes(rows: list[Row], seed: int) -> dict[str, str]:
        return {row["patient_id"]: site for site, found in dealt(rows, way, seed=seed).sites.items() for row in found}

    assert homes(rows, 1) == homes(rows[::-1], 1)
    assert homes(rows, 1) != homes(rows, 2)


def test_small_alpha_skews_labels_and_a_large_one_does_not() -> None:
    """Mean total variation between a site's labels and all labels, over ten seeds."""

    def skew(alpha: float) -> float:
        found = []
        for seed in range(10):
            result = dealt(data_set(400), "dirichlet", alpha=alpha, seed=seed)
            counts = np.array([[result.labels(site).get(v, 0) for v in result.values] for site in result.sites], float)
            overall = counts.sum(axis=0) / counts.sum()
            found.append(np.abs(counts / counts.sum(axis=1, keepdims=True) - overall).sum(axis=1).mean() / 2)
        return float(np.mean(found))

    assert skew(0.1) > 0.4
    assert skew(1000.0) < 0.1


def test_quantity_skew_has_large_and_small_sites_and_uniform_has_equal_ones() -> None:
    rows = data_set(400)
    sizes = [dealt(rows, "quantity", alpha=0.3).patients(f"site-{n}", "train") for n in range(1, 5)]
    assert max(sizes) > 4 * min(sizes)
    even = dealt(rows, "uniform")
    assert {even.patients(site, "train") for site in even.sites} == {80}


def test_every_site_has_the_least_that_is_asked_for() -> None:
    result = dealt(data_set(), "quantity", alpha=0.05, least=5)
    for split in ("train", "test"):
        assert min(result.patients(site, split) for site in result.sites) >= 5


def test_column_gives_a_site_for_each_value() -> None:
    result = dealt(data_set(), "column")
    assert list(result.sites) == ["bergen", "oslo", "tromso"]
    assert {row["centre"] for row in result.sites["oslo"]} == {"Oslo"}


def test_manifests_name_the_same_files_from_where_they_are(tmp_path: Path) -> None:
    rows = data_set(20)
    (tmp_path / "data" / "images").mkdir(parents=True)
    for row in rows:
        (tmp_path / "data" / row["image"]).write_text(row["image"])
    manifest = tmp_path / "data" / "all.csv"
    paths = write_partition(dealt(rows, "uniform", sites=2), manifest, tmp_path / "deep" / "er")
    for path in paths.values():
        with path.open(newline="") as file:
            written = list(csv.DictReader(file))
        assert list(written[0]) == list(rows[0])
        for row in written:
            assert (path.parent / row["image"]).read_text() == f"images/{Path(row['image']).name}"
    with pytest.raises(DataError, match="choose another folder"):
        write_partition(dealt(rows, "column"), manifest, tmp_path / "deep" / "er")


def test_what_cannot_be_dealt_out_is_refused() -> None:
    rows = data_set()
    with pytest.raises(DataError, match="choose fewer sites"):
        dealt(rows, "uniform", sites=50)
    with pytest.raises(DataError, match="name another"):
        partition(rows, "dirichlet", num_sites=2, column="grade", concentration=1, least=1, seed=0)
    torn = [{**row, "centre": f"centre {index % 2}"} for index, row in enumerate(rows)]
    with pytest.raises(DataError, match="at one site"):
        partition(torn, "column", num_sites=None, column="centre", concentration=1, least=1, seed=0)


def write_manifest(path: Path, rows: list[Row]) -> Path:
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, fieldnames=list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    return path


def test_patient_in_two_splits_is_refused(tmp_path: Path) -> None:
    rows = data_set(10)
    rows.append({**rows[0], "split": "train"})
    with pytest.raises(DataError, match="one split"):
        read_rows(write_manifest(tmp_path / "all.csv", rows))


def test_command_prints_what_came_out(tmp_path: Path) -> None:
    manifest = write_manifest(tmp_path / "all.csv", data_set())
    arguments = ["partition", str(manifest), "--sites", "3", "--column", "diagnosis", "--out", str(tmp_path / "sites")]
    shown = CliRunner().invoke(app, arguments)
    assert shown.exit_code == 0, shown.output
    assert "site-2" in shown.output
    assert "patients by diagnosis" in shown.output
    found = json.loads(CliRunner().invoke(app, [*arguments, "--json"]).output)
    assert sum(site["train_patients"] for site in found["sites"].values()) == 96
    assert sum(sum(site["labels"].values()) for site in found["sites"].values()) == 120
