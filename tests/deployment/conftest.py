"""A consortium of three hospitals on this machine, in processes of their own that tests freeze, kill and cut off.

One SuperLink and three sites serve a whole module, each test runs a study of its own through them. All plain studies
have one seed and differ in their names alone, so all of them must end with the same adapter, whatever happens to them.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import selectors
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
import pytest

from client.approvals import store_approval
from client.audit_log import Line, read_audit_log
from client.enrolment import init_site
from client.flower_link import Delivery
from client.site_folder import SiteFolder
from client.spending import ShownCharge, read_spending
from medfed.framed_file import unpack
from medfed.signing import read_key
from medfed.study import FEDERATED, StudyConfig
from server.checkpoint import read_checkpoint
from server.consortium_folder import open_consortium
from server.provisioning import provision
from server.run_status import RunStatus, SiteStatus, read_status
from server.study_signing import sign_study

SITES = ("north", "east", "few")
TRAINING = {"north": 4, "east": 4, "few": 3}
POLICY = 'minimum_patients = 3\nallow_unprotected = true\n[budget]\nepsilon = 1e4\ndelta = 0.01\nunit = "patient"\n'


def wait_until(happened: Callable[[], Any], *, seconds: float = 60.0, every: float = 0.005, what: str = "") -> Any:
    """Wait for something that is true; what it was."""
    end = time.monotonic() + seconds
    while not (value := happened()):
        assert time.monotonic() < end, f"waited {seconds} s for {what or happened}"
        time.sleep(every)
    return value


class Process:
    """``medfed ...`` in a process of its own, with what it says in a file; ``inside`` a command that becomes it."""

    def __init__(
        self,
        log: Path,
        *arguments: object,
        environment: dict[str, str] | None = None,
        inside: tuple[str, ...] = (),
    ) -> None:
        self.log = log
        clean = {name: value for name, value in os.environ.items() if "proxy" not in name.lower()}
        clean |= {"MEDFED_SITE": "", "PYTHONUNBUFFERED": "1", **(environment or {})}
        with log.open("ab") as file:
            self._from = file.tell()
            self._process = subprocess.Popen(
                [*inside, sys.executable, "-P", "-m", "medfed", *map(str, arguments)],
                stdout=file,
                stderr=subprocess.STDOUT,
                env=clean,
            )

    @property
    def pid(self) -> int:
        return self._process.pid

    @property
    def said(self) -> str:
        """Since this process began."""
        return self.log.read_bytes()[self._from :].decode(errors="replace")

    @property
    def is_alive(self) -> bool:
        return self._process.poll() is None

    def says(self, pattern: str, *, seconds: float = 60.0, times: int = 1) -> None:
        """Wait until it said something."""

        def heard() -> bool:
            done = len(re.findall(pattern, self.said)) >= times
            assert done or self.is_alive, f"ended with {self._process.returncode}: {self.said[-2000:]}"
            return done

        wait_until(heard, seconds=seconds, every=0.02, what=f"{pattern!r} in {self.said[-3000:]}")

    def freeze(self) -> None:
        self._process.send_signal(signal.SIGSTOP)

    def thaw(self) -> None:
        self._process.send_signal(signal.SIGCONT)

    def kill(self) -> None:
        """Kill -9."""
        if self.is_alive:
            self._process.send_signal(signal.SIGKILL)
            self._process.wait(10)

    def ended(self, seconds: float = 120.0) -> int:
        """Wait for the end; the exit code."""
        return self._process.wait(seconds)

    def stop(self) -> None:
        """Ask to stop; kill what does not."""
        if self.is_alive:
            self.thaw()
            self._process.terminate()
            try:
                self._process.wait(10)
            except subprocess.TimeoutExpired:
                self.kill()


class ConnectProxy:
    """An HTTP CONNECT proxy that a test can cut, that can flip bits, and that can lead elsewhere."""

    def __init__(self, address: str = "127.0.0.1") -> None:
        self._listener = socket.create_server((address, 0))
        self.address, self.port = self._listener.getsockname()
        self.is_cut = False
        self.flips = 0
        self.leads_to: int | None = None
        self.asked: list[str] = []
        self.refused = 0
        self._open: set[socket.socket] = set()
        threading.Thread(target=self._accept, daemon=True).start()

    @property
    def environment(self) -> dict[str, str]:
        return {"HTTPS_PROXY": f"http://{self.address}:{self.port}"}

    def cut(self) -> None:
        self.is_cut = True
        self.drop_all()

    def heal(self) -> None:
        self.is_cut = False

    def drop_all(self) -> None:
        for one in tuple(self._open):
            with contextlib.suppress(OSError):
                one.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        self.cut()
        self._listener.close()

    def _accept(self) -> None:
        while True:
            try:
                near, _ = self._listener.accept()
            except OSError:
                return
            threading.Thread(target=self._serve, args=(near,), daemon=True).start()

    def _serve(self, near: socket.socket) -> None:
        with near, contextlib.suppress(OSError):
            if self.is_cut:
                self.refused += 1
                return
            head = b""
            while b"\r\n\r\n" not in head and (got := near.recv(4096)):
                head += got
            method, where, _ = head.decode().split("\r\n")[0].split()
            assert method == "CONNECT"
            self.asked.append(where)
            port = self.leads_to or int(where.rpartition(":")[2])
            with socket.create_connection(("127.0.0.1", port)) as far:
                near.sendall(b"HTTP/1.1 200 Connection established\r\n\r\n")
                self._open |= {near, far}
                try:
                    self._pump(near, far)
                finally:
                    self._open -= {near, far}

    def _pump(self, near: socket.socket, far: socket.socket) -> None:
        with selectors.DefaultSelector() as selector:
            selector.register(near, selectors.EVENT_READ, far)
            selector.register(far, selectors.EVENT_READ, near)
            while not self.is_cut:
                for key, _ in selector.select(0.5):
                    assert isinstance(key.fileobj, socket.socket)
                    if not (data := key.fileobj.recv(65536)):
                        return
                    if self.flips and key.fileobj is near and len(data) > 100:
                        self.flips -= 1
                        data = data[:60] + bytes([data[60] ^ 1]) + data[61:]
                    key.data.sendall(data)


class Deployment:
    """The consortium; see the module."""

    def __init__(self, root: Path) -> None:
        self.root = root
        with socket.create_server(("127.0.0.1", 0)) as free, socket.create_server(("127.0.0.1", 0)) as other:
            self.port, health_port = free.getsockname()[1], other.getsockname()[1]
        self.health_address = f"127.0.0.1:{health_port}"
        file = root / "CONSORTIUM.toml"
        listed = "".join(f'[[sites]]\nname = "{site}"\n' for site in SITES)
        file.write_text(f'name = "brains"\n[server]\nhost = "127.0.0.1"\nport = {self.port}\n{listed}')
        provision(file, root / "coordinator")
        self.coordinator = open_consortium(root / "coordinator")
        self.folders: dict[str, SiteFolder] = {}
        for site in SITES:
            data = write_cohort(root / "data" / site, site, train=TRAINING[site])
            folder = init_site(self.coordinator.kit(site), root / "sites" / site, data=data, device="cpu")
            folder.policy_file.write_text(POLICY)
            self.folders[site] = folder
        enrolments = [folder.enrolment_file for folder in self.folders.values()]
        provision(file, root / "coordinator", enrolments=enrolments)
        self.proxy = ConnectProxy()
        self.sites: dict[str, Process] = {}
        self.runs: list[Process] = []
        self.superlink = self.start_superlink()

    def start_superlink(self) -> Process:
        asked = ("server", "start", self.coordinator.root, "--health", self.health_address)
        self.superlink = Process(self.root / "superlink.log", *asked)
        return self.superlink

    def start_site(self, site: str, environment: dict[str, str] | None = None, inside: tuple[str, ...] = ()) -> Process:
        """North is behind a proxy, and has no other way."""
        given = {**(self.proxy.environment if site == "north" else {}), **(environment or {})}
        log, root = self.root / f"{site}.log", self.folders[site].root
        process = Process(log, "site", "start", root, environment=given, inside=inside)
        self.sites[site] = process
        return process

    def make_sure_all_serve(self) -> None:
        """Start what a test before has left dead."""
        self.proxy.heal()
        self.proxy.leads_to, self.proxy.flips = None, 0
        for process in (self.superlink, *self.sites.values()):
            if process.is_alive:
                process.thaw()
        if not self.superlink.is_alive:
            self.start_superlink()
        begun = [self.start_site(site) for site in SITES if site not in self.sites or not self.sites[site].is_alive]
        for process in begun:
            process.says("event=connected")
        for site in SITES:
            self.folders[site].policy_file.write_text(POLICY)

    def sign(self, name: str, *, approved_by: tuple[str, ...] = SITES, **sections: Any) -> Path:
        """A study, signed and approved; keyword arguments replace its sections."""
        plain: dict[str, Any] = {
            "name": name,
            "seed": 5,
            "backbone": {"name": "stand-in-segmenter", "sha256": "0" * 64},
            "adapter": {"rank": 2, "alpha": 4.0, "targets": "decoder-qv"},
            "task": {"kind": "segmentation", "classes": ["near", "far"]},
            "training": {"local_epochs": 20, "batch_size": 2, "learning_rate": 0.01},
            "rounds": {"num_rounds": 3, "deadline_s": 30},
            "sites": [{"name": site} for site in SITES],
        }
        signed = sign_study(StudyConfig.model_validate({**plain, **sections}), self.coordinator)
        for site in approved_by:
            store_approval(self.folders[site], name, signed.study.digest)
        return signed.path

    def sign_private(self, name: str, **sections: Any) -> Path:
        """A study with noise at each site."""
        given: dict[str, Any] = {
            "training": {"batch_size": 2, "learning_rate": 0.01},
            "privacy": {
                "trust": "site",
                "unit": "patient",
                "noise_multiplier": 1.0,
                "delta": 0.01,
                "clip_norm": 1.0,
                "sampling_rate": 0.5,
                "steps_per_round": 40,
                "images_per_patient": 2,
                "evaluation": "exact",
            },
            "sites": [{"name": site, "declared_patients": 3} for site in SITES],
        }
        return self.sign(name, **{**given, **sections})

    def begin(self, study: Path, *, tries: int = 5) -> Run:
        """``medfed server run``."""
        return Run(self, "run", self.coordinator.root, study, "--tries", tries, "--wait", 60)

    def charges(self, site: str, study: str) -> list[ShownCharge]:
        """What the site's ledger, verified, says of a study."""
        shown = read_spending(self.folders[site].ledger)
        assert shown.error is None
        return [one for cohort in shown.cohorts for of in cohort.studies if of.study == study for one in of.charges]

    def audit_log(self, site: str) -> tuple[Line, ...]:
        """The site's audit log, verified from its first line to its last."""
        folder = self.folders[site]
        lines = read_audit_log(folder.audit_log, read_key(folder.ledger_key).public_key())
        assert lines
        return lines

    def status_of(self, run: Run, site: str) -> SiteStatus:
        """What the server knows of a site now."""
        return run.status.sites[site]

    def in_work(self, site: str) -> str:
        """Kind of the message that the site works on; empty if there is none."""
        try:
            facts, objects = unpack((self.folders[site].inflight / "message").read_bytes())
        except (FileNotFoundError, ValueError):
            return ""
        known = {name: facts[name] for name in ("message_id", "run_id", "created_at", "ttl_s")}
        metadata = Delivery(objects=objects, **known).message().metadata
        return f"{metadata.message_type} {metadata.group_id}"

    def stop(self) -> None:
        for process in (*self.runs, *self.sites.values(), self.superlink):
            process.stop()
        self.proxy.close()


class Run(Process):
    """``medfed server run`` or ``resume``."""

    def __init__(self, deployment: Deployment, *arguments: object) -> None:
        self._deployment = deployment
        log = deployment.root / f"run{len(deployment.runs)}.log"
        super().__init__(log, "server", *arguments)
        deployment.runs.append(self)

    @property
    def folder(self) -> Path:
        """Of the run."""
        self.says(r"(?m)^run /.*\n")
        found = re.search(r"(?m)^run (/.*)$", self.said)
        assert found is not None
        return Path(found[1])

    @property
    def status(self) -> RunStatus:
        return read_status(self.folder)

    def lines(self, event: str) -> list[dict[str, Any]]:
        """Of metrics.jsonl."""
        lines = [json.loads(line) for line in (self.folder / "metrics.jsonl").read_text().splitlines()]
        return [line for line in lines if line["event"] == event]

    def trained(self) -> dict[int, list[str]]:
        """Round -> sites whose updates are in it."""
        rounds: dict[int, list[str]] = {}
        for line in self.lines("train"):
            rounds.setdefault(line["round"], []).append(line["site"])
        return rounds

    def resumed(self) -> Run:
        """``medfed server resume`` in another process."""
        return Run(self._deployment, "resume", self._deployment.coordinator.root, self.folder, "--wait", 60)

    def finishes(self) -> bytes:
        """Wait for the end of the study; the bytes of its adapter."""
        assert self.ended() == 0, self.said[-3000:]
        assert self.status.phase == "finished"
        study = StudyConfig.model_validate_json((self.folder / "study.json").read_bytes())
        state = read_checkpoint(self.folder, study.resolved_manifest, study_digest=study.digest, scope=FEDERATED)
        assert state is not None
        assert state.round == study.rounds.num_rounds
        return state.adapter_P.numpy().tobytes()

    def gives_up(self) -> str:
        """Wait for the end of a study that cannot go on: exit code 8 and one line that says why."""
        assert self.ended() == 8, self.said[-3000:]
        assert "Traceback" not in self.said
        reasons = re.findall(r"(?m)^medfed: (.*)$", self.said)
        assert len(reasons) == 1
        assert self.said.rstrip().endswith(reasons[0])
        assert (self.status.phase, self.status.reason) == ("failed", reasons[0])
        return str(reasons[0])


def write_cohort(folder: Path, site: str, *, train: int, test: int = 2) -> Path:
    """Images of 64 x 64 noise with two bright squares, which are classes 1 and 2."""
    folder.mkdir(parents=True)
    generator = np.random.default_rng(list(site.encode()))
    rows = ["image,label,patient_id,split"]
    for number in range(train + test):
        label = np.zeros((64, 64), dtype=np.uint8)
        x, y = generator.integers(4, 24, size=2)
        label[y : y + 12, x : x + 12] = 1
        label[y + 20 : y + 36, x + 16 : x + 30] = 2
        image = (generator.normal(0, 10, size=(64, 64)) + 60.0 * label).astype(np.float32)
        for name, array in (("image", image), ("label", label)):
            nibabel.save(nibabel.Nifti1Image(array, np.eye(4)), folder / f"{name}{number}.nii.gz")
        split = "train" if number < train else "test"
        rows.append(f"image{number}.nii.gz,label{number}.nii.gz,{site}-{number},{split}")
    (folder / "manifest.csv").write_text("\n".join(rows) + "\n")
    return folder / "manifest.csv"


@pytest.fixture(name="until")
def _until() -> Callable[..., Any]:
    """:func:`wait_until`, which tests cannot import."""
    return wait_until


@pytest.fixture
def proxy_at() -> Iterator[Callable[[str], ConnectProxy]]:
    """Makes a proxy that listens at an address, and closes it."""
    made: list[ConnectProxy] = []

    def make(address: str) -> ConnectProxy:
        made.append(ConnectProxy(address))
        return made[-1]

    yield make
    for proxy in made:
        proxy.close()


@pytest.fixture(scope="session")
def serving(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Deployment]:
    """The consortium of all tests here."""
    deployment = Deployment(tmp_path_factory.mktemp("deployment"))
    try:
        yield deployment
    finally:
        deployment.stop()


@pytest.fixture
def deployment(serving: Deployment) -> Deployment:
    """The consortium with all its processes up, as every test begins; logs must show no traceback when it ends."""
    serving.make_sure_all_serve()
    return serving


@pytest.fixture(scope="session")
def undisturbed(serving: Deployment) -> bytes:
    """The adapter of a plain study that nothing happened to."""
    serving.make_sure_all_serve()
    return serving.begin(serving.sign("undisturbed")).finishes()
