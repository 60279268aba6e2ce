"""A consortium on this machine for benchmarks: provisioned, enrolled, approved, its processes started and watched.

Everything is as in production (keys, TLS, node authentication, inbox, audit log, reply store, ledger) but for the
backbone, which is small and random, and the images, which are made up.
"""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import nibabel
import numpy as np

from client.approvals import keep_study, store_approval
from client.enrolment import init_site
from client.site_folder import SiteFolder
from medfed.study import StudyConfig
from server.consortium_folder import ConsortiumFolder, open_consortium
from server.provisioning import provision
from server.study_signing import StudyToApprove, sign_study

REPOSITORY = Path(__file__).resolve().parent.parent
ENVIRONMENT = {
    **os.environ,
    **dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"), "1"),
    "FLWR_TELEMETRY_ENABLED": "0",
    "FLWR_DISABLE_UPDATE_CHECK": "1",
    "PYTHONPATH": str(REPOSITORY),
}
GOODBYE_S = 30.0
POLICY = """minimum_patients = 1
allow_unprotected = true

[budget]
epsilon = 1e6
delta = 0.01
unit = "patient"
"""
PRIVACY = {
    "trust": "site",
    "unit": "patient",
    "noise_multiplier": 6.0,
    "delta": 0.01,
    "clip_norm": 1.0,
    "sampling_rate": 0.5,
    "steps_per_round": 2,
    "images_per_patient": 2,
    "evaluation": "exact",
}


@dataclass
class LocalConsortium:
    """Folders and processes; whatever was started ends with the ``with`` block.

    Attributes:
        root: holds everything.
        coordinator: its folder.
        sites: folder of each site by name.
        processes: started here, by name.
    """

    root: Path
    coordinator: ConsortiumFolder
    sites: Mapping[str, SiteFolder]
    processes: dict[str, subprocess.Popen[bytes]] = field(default_factory=dict)

    @classmethod
    def make(cls, root: Path, names: Sequence[str]) -> Self:
        """Provision a consortium in a new folder, on a free port, and enrol sites of these names."""
        root.mkdir(parents=True)
        file = root / "CONSORTIUM.toml"
        listed = "".join(f'[[sites]]\nname = "{name}"\n' for name in names)
        file.write_text(f'name = "benchmark"\n[server]\nhost = "127.0.0.1"\nport = {free_port()}\n{listed}')
        provision(file, root / "coordinator")
        coordinator, sites = open_consortium(root / "coordinator"), {}
        for name in names:
            manifest = write_cohort(root / "cohorts" / name)
            sites[name] = init_site(coordinator.kit(name), root / "sites" / name, data=manifest, device="cpu")
            sites[name].policy_file.write_text(POLICY)
        provision(file, root / "coordinator", enrolments=[site.enrolment_file for site in sites.values()])
        return cls(root, coordinator, sites)

    @property
    def address(self) -> str:
        """``host:port`` of its SuperLink."""
        server = self.coordinator.config.server
        return f"{server.host}:{server.port}"

    def approved(self, study: StudyConfig) -> StudyToApprove:
        """The study, signed, and approved by every site."""
        signed = sign_study(study, self.coordinator)
        for site in self.sites.values():
            keep_study(site, signed.study.digest, signed.path.read_bytes())
            store_approval(site, signed.study.name, signed.study.digest)
        return signed

    def start(self, name: str, *arguments: str | Path, command: Sequence[str] = ("-m", "medfed")) -> None:
        """Start a Python process; what it logs goes to ``<name>.log``."""
        with (self.root / f"{name}.log").open("ab") as log:
            self.processes[name] = subprocess.Popen(
                [sys.executable, "-P", *command, *map(str, arguments)], env=ENVIRONMENT, stdout=log, stderr=log
            )

    def log(self, name: str) -> str:
        """What a process has logged."""
        return (self.root / f"{name}.log").read_text()

    def __enter__(self) -> Self:
        signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # whatever ends this process ends the others
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        running = [process for process in reversed(self.processes.values()) if process.poll() is None]
        for process in running:
            process.send_signal(signal.SIGTERM)
        for process in running:
            try:
                process.wait(GOODBYE_S)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


def tiny_study(sites: Sequence[str], *, num_rounds: int, evaluate_every: int, private: bool) -> StudyConfig:
    """For patients of :func:`write_cohort`: an epoch a round, or two noised steps, for which the ledger is charged."""
    study: dict[str, Any] = {
        "name": "tiny",
        "seed": 5,
        "backbone": {"name": "stand-in-segmenter", "sha256": "0" * 64},
        "adapter": {"rank": 2, "alpha": 4.0, "targets": "decoder-qv"},
        "task": {"kind": "segmentation", "classes": ["near", "far"]},
        "training": {"batch_size": 2, "learning_rate": 0.01, **({} if private else {"local_epochs": 1})},
        "rounds": {"num_rounds": num_rounds, "evaluate_every": evaluate_every, "deadline_s": 120},
        "sites": [{"name": name, **({"declared_patients": 3} if private else {})} for name in sites],
    }
    return StudyConfig.model_validate({**study, "privacy": PRIVACY} if private else study)


def write_cohort(folder: Path, *, train: int = 3, test: int = 2) -> Path:
    """Manifest of a few noise images with two bright squares, classes 1 and 2."""
    folder.mkdir(parents=True)
    generator = np.random.default_rng([*folder.name.encode()])
    rows = ["image,label,patient_id,split"]
    for number in range(train + test):
        label_YX = np.zeros((64, 64), dtype=np.uint8)
        label_YX[8:20, 8:20], label_YX[28:44, 24:38] = 1, 2
        image_YX = (generator.normal(0, 10, size=(64, 64)) + 60.0 * label_YX).astype(np.float32)
        for name, array in (("image", image_YX), ("label", label_YX)):
            nibabel.save(nibabel.Nifti1Image(array, np.eye(4)), folder / f"{name}{number}.nii.gz")
        split = "train" if number < train else "test"
        rows.append(f"image{number}.nii.gz,label{number}.nii.gz,{folder.name}-{number},{split}")
    manifest = folder / "manifest.csv"
    manifest.write_text("\n".join(rows) + "\n")
    return manifest


def free_port() -> int:
    """A port at which nobody listens now."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])
