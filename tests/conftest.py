"""What every test may rely on: one thread, fixed examples, folders of its own, no network."""

import json
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

os.environ["OMP_NUM_THREADS"] = "1"
os.environ["FLWR_TELEMETRY_ENABLED"] = "0"
os.environ["FLWR_DISABLE_UPDATE_CHECK"] = "1"

import nibabel
import numpy as np
import pytest
import torch
from hypothesis import Phase, settings

from client.enrolment import init_site
from client.site import SITES_VARIABLE, forget_sites
from client.site_folder import SiteFolder
from medfed.signing import create_key
from medfed.study import StudyConfig
from server.consortium_folder import ConsortiumFolder, open_consortium
from server.provisioning import provision

torch.set_num_threads(1)
settings.register_profile("medfed", derandomize=True, deadline=None)
settings.register_profile("mutation", settings.get_profile("medfed"), phases=(Phase.explicit, Phase.generate))
settings.load_profile("medfed")


@pytest.fixture(autouse=True, scope="session")
def _own_folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Caches and keys of the tests are the tests' own, and are shared by them."""
    folder = tmp_path_factory.mktemp("medfed")
    os.environ["MEDFED_CACHE"] = str(folder / "cache")
    os.environ["MEDFED_CONFIG"] = str(folder / "config")
    return folder


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """GPU tests need a GPU; that is the only reason for which a test is not run."""
    if torch.cuda.is_available():
        return
    for item in items:
        if "gpu" in item.keywords:
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


@pytest.fixture
def without_pictures(monkeypatch: pytest.MonkeyPatch) -> None:
    """Simulations end without overlays and report: half of the time of one that trains a stand-in for seconds."""
    monkeypatch.setattr("simulation.harness.draw_overlays", lambda *_: None)
    monkeypatch.setattr("simulation.harness.write_report", lambda _: None)


@pytest.fixture
def make_cohort(tmp_path: Path) -> Callable[..., Path]:
    """Writes a small segmentation cohort of one site and returns its manifest.

    Images are 64 x 64 noise with two bright squares, which are classes 1 and 2.
    """

    def make(site: str = "north", *, train: int = 3, test: int = 2, seed: int = 0) -> Path:
        folder = tmp_path / "cohorts" / site
        folder.mkdir(parents=True)
        generator = np.random.default_rng([seed, *site.encode()])
        rows = ["image,label,patient_id,split,side"]
        for number in range(train + test):
            label = np.zeros((64, 64), dtype=np.uint8)
            x, y = generator.integers(4, 24, size=2)
            label[y : y + 12, x : x + 12] = 1
            label[y + 20 : y + 36, x + 16 : x + 30] = 2
            image = (generator.normal(0, 10, size=(64, 64)) + 60.0 * label).astype(np.float32)
            for name, array in (("image", image), ("label", label)):
                nibabel.save(nibabel.Nifti1Image(array, np.eye(4)), folder / f"{name}{number}.nii.gz")
            split = "train" if number < train else "test"
            rows.append(f"image{number}.nii.gz,label{number}.nii.gz,{site}-{number},{split},{number % 2}")
        (folder / "manifest.csv").write_text("\n".join(rows) + "\n")
        return folder / "manifest.csv"

    return make


@dataclass(frozen=True)
class Consortium:
    """A consortium on this machine, all of whose sites have enrolled."""

    file: Path
    coordinator: ConsortiumFolder
    sites: dict[str, SiteFolder]


@pytest.fixture
def make_consortium(tmp_path: Path, make_cohort: Callable[..., Path]) -> Callable[..., Consortium]:
    """Provisions a consortium and enrols its sites, whose cohorts are those of :func:`make_cohort`."""

    def make(*sites: str, name: str = "brains", policy: str = "") -> Consortium:
        root = tmp_path / name
        root.mkdir()
        file = root / "CONSORTIUM.toml"
        listed = "".join(f'[[sites]]\nname = "{site}"\n' for site in sites)
        file.write_text(f'name = "{name}"\n[server]\nhost = "127.0.0.1"\nport = 8443\n{listed}')
        provision(file, root / "coordinator")
        coordinator, folders = open_consortium(root / "coordinator"), {}
        for site in sites:
            manifest = tmp_path / "cohorts" / site / "manifest.csv"
            data = manifest if manifest.exists() else make_cohort(site)
            folders[site] = init_site(coordinator.kit(site), root / "sites" / site, data=data, device="cpu")
            if policy:
                folders[site].policy_file.write_text(policy)
        provision(file, root / "coordinator", enrolments=[folder.enrolment_file for folder in folders.values()])
        return Consortium(file, coordinator, folders)

    return make


@pytest.fixture
def make_study(make_cohort: Callable[..., Path]) -> Callable[..., StudyConfig]:
    """A study of the random stand-in segmenter on small cohorts; keyword arguments replace sections."""

    def make(sites: tuple[str, ...] = ("north", "south"), **sections: Any) -> StudyConfig:
        return StudyConfig.model_validate(
            {
                "name": "small",
                "seed": 5,
                "backbone": {"name": "stand-in-segmenter", "sha256": "0" * 64},
                "adapter": {"rank": 2, "alpha": 4.0, "targets": "decoder-qv"},
                "task": {"kind": "segmentation", "classes": ["near", "far"]},
                "training": {"local_epochs": 1, "batch_size": 2, "learning_rate": 0.01},
                "rounds": {"num_rounds": 2},
                "sites": [{"name": site, "data": make_cohort(site)} for site in sites],
                **sections,
            }
        )

    return make


@pytest.fixture
def make_private_study(make_study: Callable[..., StudyConfig]) -> Callable[..., StudyConfig]:
    """A study of :func:`make_study` with patient-level privacy; keyword arguments replace keys of ``[privacy]``."""

    def make(sites: tuple[str, ...] = ("north", "south"), **privacy: Any) -> StudyConfig:
        plain = make_study(sites)
        given = {
            "trust": "site",
            "unit": "patient",
            "noise_multiplier": 1.0,
            "delta": 0.01,
            "clip_norm": 1.0,
            "sampling_rate": 0.5,
            "steps_per_round": 2,
            "images_per_patient": 2,
            "evaluation": "exact",
            **privacy,
        }
        return plain.replace(
            training={"batch_size": 2, "learning_rate": 0.01},
            privacy={name: value for name, value in given.items() if value is not None},
            sites=[site.model_copy(update={"declared_patients": 3}) for site in plain.sites],
        )

    return make


@pytest.fixture
def make_secure_study(make_study: Callable[..., StudyConfig]) -> Callable[..., StudyConfig]:
    """A study of :func:`make_study` with five sites and secure aggregation; keyword arguments replace its keys."""

    def make(**secure: Any) -> StudyConfig:
        plain = make_study(("north", "south", "west", "east", "centre"))
        given = {"enabled": True, "max_colluding": 0, "update_clip_norm": 8.0, **secure}
        return plain.replace(
            rounds={"num_rounds": 2},
            secure_aggregation={name: value for name, value in given.items() if value is not None},
            sites=[site.model_copy(update={"declared_patients": 3}) for site in plain.sites],
        )

    return make


@pytest.fixture
def study_file(tmp_path: Path) -> Callable[[StudyConfig], Path]:
    """Writes a study as TOML, the part of TOML that studies need, and returns the file."""

    def value(content: Any) -> str:
        if isinstance(content, dict):
            return "{" + ", ".join(f"{key} = {value(item)}" for key, item in content.items()) + "}"
        return json.dumps(content)

    def write(study: StudyConfig) -> Path:
        data = study.model_dump(mode="json", exclude={"manifest"}, exclude_none=True)
        lines = [f"{key} = {value(item)}" for key, item in data.items() if not isinstance(item, (dict, list))]
        for key, item in data.items():
            for section in item if isinstance(item, list) else [item] if isinstance(item, dict) else []:
                lines.append(f"[[{key}]]" if isinstance(item, list) else f"[{key}]")
                lines += [f"{name} = {value(content)}" for name, content in section.items()]
        path = tmp_path / f"{study.name}-{study.digest[:8]}.toml"
        path.write_text("\n".join(lines) + "\n")
        return path

    return write


@pytest.fixture
def open_sites(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Path]:
    """Describes virtual sites for a study to the client app, and returns the file.

    They allow the study up to ``epsilon``; draws come from the operating system unless ``noise_seed`` is given.
    """

    def open_them(
        study: StudyConfig,
        *,
        epsilon: float = 1e6,
        minimum_patients: int = 1,
        noise_seed: int | None = None,
        **policy: object,
    ) -> Path:
        key = tmp_path / "ledgers" / "ledger.key"
        if not key.exists():
            create_key(key)
        budget = (
            {"epsilon": epsilon, "delta": study.privacy.delta, "unit": study.privacy.unit} if study.privacy else None
        )
        described = {
            "device": "cpu",
            "policy": {
                "approved_studies": [study.digest],
                "minimum_patients": minimum_patients,
                "allow_unprotected": True,
                "budget": budget,
                **policy,
            },
            "cohorts": {"federated": "federated"},
            "ledgers": str(tmp_path / "ledgers"),
            "ledger_key": str(key),
            "identities": str(tmp_path / "identities"),
            "journals": str(tmp_path / "journals"),
            "memories": str(tmp_path / "memories"),
            "noise_seed": noise_seed,
            "sites": [{"name": site.name, "manifests": [str(site.data)]} for site in study.sites],
        }
        path = tmp_path / "sites.json"
        path.write_text(json.dumps(described))
        monkeypatch.setenv(SITES_VARIABLE, str(path))
        forget_sites()
        return path

    return open_them
