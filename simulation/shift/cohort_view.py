"""``medfed simulate --show-cohort``: what the hospitals of a study hold and how far apart they are; nothing trains.

Every site is measured on all its patients as they are before the first round; a site whose scanner is replaced is
there twice. The patients of those two rows are the same, so the test between them is not of two independent samples;
its p-value is then a rough guide.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from client.data import Cohort, Item, load_cohort, refuse_shared_patients
from client.features import FeatureCache, cache_key
from medfed.canonical import derive_seed
from medfed.device import DeviceChoice, choose_device
from medfed.models.adapted import AdaptedModel, adapted_model
from medfed.shift_profile import ShiftProfile
from medfed.study import StudyConfig, read_study
from server.checkpoint import write_durably
from simulation.cohort import drifted
from simulation.harness import cohort_manifests
from simulation.progress import Reporter, Silent
from simulation.run_folder import cache_folder, config_folder
from simulation.shift.cohort_figure import ShownSite, draw_cohort
from simulation.shift.discrepancy import NUM_PERMUTATIONS, Discrepancy, discrepancy
from simulation.shift.discrepancy_figure import draw_discrepancies
from simulation.shift.study_shift import shifts_of

_Vectors = npt.NDArray[np.float64]
_LEAST_PATIENTS = 2  # of a site, for an unbiased estimate


@dataclass(frozen=True)
class CohortView:
    """What was written.

    Attributes:
        folder: where.
        figure: sites by example images by label histograms, PNG; beside it as SVG.
        matrix: the measured shift of every pair of sites, PNG; beside it as SVG; None for a single site.
        measured: the same as JSON.
        pairs: the measured shift by pair of sites.
        provenance: where the images come from.
    """

    folder: Path
    figure: Path
    matrix: Path | None
    measured: Path
    pairs: Mapping[tuple[str, str], Discrepancy]
    provenance: str


def show_cohort(
    study: str | Path, *, out: str | Path = "runs", device: DeviceChoice = "auto", reporter: Reporter | None = None
) -> CohortView:
    """Draw and measure the cohorts of a study.

    Args:
        study: study file.
        out: a folder ``<study>-cohort-<digest>`` is made in it, or written again.
        device: where features are computed.
        reporter: is told of progress.

    Raises:
        MedfedError: as a simulation of the study would.
    """
    reporter = reporter or Silent()
    config = read_study(Path(study))
    shifts = shifts_of(config)
    reporter.stage("loading backbone")
    model = adapted_model(config, choose_device(device))
    manifests, provenance = cohort_manifests(config, reporter)
    reporter.stage("reading cohorts")
    cohorts, places = _cohorts(config, model, manifests, shifts)
    vectors = _features(cohorts, model, reporter)
    reporter.stage("measuring shift")
    pairs = {
        (first, second): discrepancy(
            vectors[first],
            vectors[second],
            np.random.default_rng(derive_seed(config.seed, "permutations", first, second)),
        )
        for first, second in itertools.combinations(cohorts, 2)
        if min(len(vectors[first]), len(vectors[second])) >= _LEAST_PATIENTS
    }
    folder = (Path(out) / f"{config.name}-cohort-{config.digest[:8]}").resolve()
    shown = [
        ShownSite(name, _described(config, name, shifts), cohort, places[name]) for name, cohort in cohorts.items()
    ]
    figure = _write(folder / "cohort", draw_cohort(config, shown, model.pixels, provenance))
    matrix = _write(folder / "shift", draw_discrepancies(list(cohorts), pairs)) if pairs else None
    measured = folder / "shift.json"
    write_durably(measured, json.dumps(_as_json(config, pairs), indent=2).encode() + b"\n")
    return CohortView(folder, figure, matrix, measured, pairs, provenance)


def _cohorts(
    study: StudyConfig, model: AdaptedModel, manifests: Mapping[str, Path], shifts: Mapping[str, ShiftProfile]
) -> tuple[dict[str, Cohort], dict[str, Path]]:
    """Cohort and manifest by name: of every site, and of every site once its scanner is replaced."""
    places = {name: manifests[name] for name in study.site_names}
    cohorts = {name: load_cohort(name, (path,), study.task, model.pixels) for name, path in places.items()}
    refuse_shared_patients(cohorts)
    for name, shift in shifts.items():
        if shift.drift is not None:
            later = f"{name}, round {shift.drift.from_round} on"
            places[later] = drifted(manifests[name])
            cohorts[later] = load_cohort(name, (places[later],), study.task, model.pixels)
    return cohorts, places


def _features(cohorts: Mapping[str, Cohort], model: AdaptedModel, reporter: Reporter) -> dict[str, _Vectors]:
    """One row for each patient of every cohort: the mean over their images of the frozen backbone's embedding."""
    cache = FeatureCache(cache_folder() / "features", cache_key(config_folder() / "feature-cache.key"))
    reporter.start("encoding images", sum(len(cohort.items) for cohort in cohorts.values()))
    model.load(model.initial_P)
    model.train(False)
    vectors = {}
    for name, cohort in cohorts.items():
        by_patient: dict[str, list[_Vectors]] = {}
        for item in cohort.items:
            by_patient.setdefault(item.patient_id, []).append(_feature(item, model, cache))
            reporter.step()
        vectors[name] = np.stack([np.mean(images, axis=0) for images in by_patient.values()])
    return vectors


def _feature(item: Item, model: AdaptedModel, cache: FeatureCache) -> _Vectors:
    with torch.no_grad():
        embedding = model.embed(cache.features_of(item, model)[None])[0]
    vector: _Vectors = pooled(embedding.cpu()).numpy()
    return vector


def pooled(embedding: Tensor) -> Tensor:
    """One float64 vector of an embedding of any shape: maps and tokens by mean and deviation over places.

    ==============  =====================================
    embedding       vector
    ==============  =====================================
    (C, H, W)       2 C: over the H W places
    (T, D)          2 D: over the T tokens
    (D,)            itself
    ==============  =====================================
    """
    embedding = embedding.double().contiguous()  # sums in one order, whatever layout a cache gave it
    if embedding.dim() == 1:
        return embedding
    places = embedding.flatten(1).T if embedding.dim() == 3 else embedding
    return torch.cat([places.mean(dim=0), places.std(dim=0, correction=0)])


def _described(study: StudyConfig, name: str, shifts: Mapping[str, ShiftProfile]) -> tuple[str, ...]:
    """Lines under a site's name: its scanner, and the families of its shift."""
    site_name, _, later = name.partition(",")
    (site,) = (site for site in study.sites if site.name == site_name)
    shift = shifts.get(site_name)
    scanner = shift.drift.scanner if later and shift and shift.drift else site.scanner
    families = [family.replace("_", " ") for family in (shift.families if shift else ())]
    return tuple(line for line in (scanner, *families) if line)


def _write(stem: Path, drawn: Mapping[str, bytes]) -> Path:
    for suffix, content in drawn.items():
        write_durably(stem.with_suffix(f".{suffix}"), content)
    return stem.with_suffix(".png")


def _as_json(study: StudyConfig, pairs: Mapping[tuple[str, str], Discrepancy]) -> dict[str, object]:
    return {
        "study": study.name,
        "study_digest": study.digest,
        "measure": "unbiased MMD^2, Gaussian kernel of median width, of one vector for each patient",
        "features": f"frozen {study.backbone.name}, mean and standard deviation over places",
        "permutations": NUM_PERMUTATIONS,
        "pairs": [
            {
                "sites": list(names),
                "mmd_squared": found.mmd_squared,
                "p_value": found.p_value,
                "patients": [found.num_first, found.num_second],
            }
            for names, found in pairs.items()
        ],
    }
