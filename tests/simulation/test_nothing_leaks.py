"""Everything that a private run emits is searched for what must stay at the site; the search itself is tested too.

The patients of this file have names, files and pixels that can be recognised, and a sampler that always draws the
same number of them.
"""

import base64
import json
import logging
import re
import sqlite3
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from flwr.app import Message
from safetensors import safe_open
from torch import Tensor

import client.private_trainer as private_trainer
from client import private_round, serve
from client.data import Item, preprocess
from client.private_trainer import PrivateTrainResult, train_privately
from medfed.cli import main
from medfed.errors import PrivacyError
from medfed.messages import RECORD_KEY, RoundReply
from medfed.models.registry import backbone_of
from medfed.payload import decode_adapter
from medfed.study import StudyConfig
from privacy.noise import add_gaussian
from privacy.per_sample.engine import Engine
from privacy.plan import PrivacyPlan
from privacy.randomness import RandomStream
from simulation.grid import InProcessGrid
from simulation.run_folder import stored_study

MakeStudy = Callable[..., StudyConfig]
StudyFile = Callable[[StudyConfig], Path]

TRUE, DRAWN, DECLARED, HELD_OUT = 53, 47, 40, 2
"""Training patients of each site; how many each step draws; how many the study says there are; held-out patients."""

STEPS = 2
PIXEL = 31415.875
"""Value of a row of every image, exact in float32."""

_NUMBER = re.compile(r"(?<![\w.])-?\d+(?:\.\d+)?(?:[eE][-+]?\d+)?(?![\w.]*\w)")


@dataclass
class Secrets:
    """What must not be found, by name: bytes, numbers that are exact, and losses that may be rounded."""

    texts: dict[str, str] = field(default_factory=dict)
    needles: dict[str, list[bytes]] = field(default_factory=dict)
    counts: dict[int, str] = field(default_factory=dict)
    losses: list[float] = field(default_factory=list)

    def add_numbers(self, name: str, values: Tensor | np.ndarray, width: int = 4, places: int = 4) -> None:
        """A few runs of consecutive values, none of them zero, in both float types, as they lie in memory."""
        flat = np.asarray(values).ravel()
        starts = [i for i in range(0, len(flat) - width + 1, width) if np.all(flat[i : i + width] != 0)]
        for start in starts[:: max(1, len(starts) // places)]:
            run = flat[start : start + width]
            for dtype in ("<f4", "<f8"):
                self.needles.setdefault(name, []).append(run.astype(dtype).tobytes())

    def found_in(self, blob: bytes, *, numbers: bool = False) -> set[str]:
        """Names of the secrets in ``blob``; ``numbers`` reads it as text and looks at each number in it, too."""
        found = {name for name, text in self.texts.items() if _holds(blob, text.encode())}
        found |= {name for name, needles in self.needles.items() if any(_holds(blob, needle) for needle in needles)}
        return found | self._numbers_in(blob.decode("utf-8", "replace")) if numbers else found

    def _numbers_in(self, text: str) -> set[str]:
        found = set()
        for token in _NUMBER.findall(text):
            value = abs(float(token))
            if value in self.counts:
                found.add(self.counts[int(value)])
            for count, name in self.counts.items():
                share = value * count
                if value < 1 and value % 0.5 and abs(share - round(share)) < 1e-9 * count:
                    found.add(f"a share of {name}")
            decimals = len(token.partition(".")[2])
            if decimals >= 3 and "e" not in token.lower() and any(round(x, decimals) == value for x in self.losses):
                found.add("training loss")
        return found


def _holds(blob: bytes, needle: bytes) -> bool:
    """Whether ``blob`` holds the needle as it is, in hexadecimal, or in base64 at any alignment."""
    if needle in blob or needle.hex().encode() in blob.lower():
        return True
    for shift in range(3):
        # Characters at either end also depend on the neighbours.
        encoded = base64.b64encode(bytes(shift) + needle)[4 if shift else 0 : -4]
        if len(encoded) >= 8 and encoded in blob:
            return True
    return False


@dataclass
class Watched:
    """One run: what it emitted, channel by channel, and what it held."""

    secrets: Secrets
    folder: Path
    emitted: list[tuple[str, bytes, bool]] = field(default_factory=list)
    sums: list[Tensor] = field(default_factory=list)
    replies: list[Message] = field(default_factory=list)
    failed: int = 0

    def leaks(self) -> set[tuple[str, str]]:
        """Channel and name of every secret that was found."""
        return {
            (channel, name)
            for channel, blob, numbers in self.emitted
            for name in self.secrets.found_in(blob, numbers=numbers)
        }

    def payloads(self) -> list[bytes]:
        """The updates of the sites, in the order in which they were trained."""
        fields = [dict(reply.content[RECORD_KEY]) for reply in self.replies if not reply.has_error()]
        return [bytes(one["adapter"]) for one in fields if one["adapter"]]  # type: ignore[arg-type]


@pytest.fixture
def study(make_private_study: MakeStudy, tmp_path: Path) -> StudyConfig:
    """Two sites with recognisable patients, on whom half of the gradients are clipped."""
    study = make_private_study(
        sampling_rate=0.7, noise_multiplier=1.3, steps_per_round=STEPS, clip_norm=0.02, delta=1e-3
    )
    sites = [
        site.model_copy(update={"data": _write_cohort(tmp_path, site.name), "declared_patients": DECLARED})
        for site in study.sites
    ]
    return study.replace(sites=sites, training={"batch_size": 16, "learning_rate": 0.05, "optimizer": "sgd"})


def _write_cohort(tmp_path: Path, site: str) -> Path:
    folder = tmp_path / f"ward-oncology-{site}"
    (folder / "drawer-b").mkdir(parents=True)
    generator = np.random.default_rng([11, *site.encode()])
    rows = ["image,label,patient_id,split"]
    for number in range(TRUE + HELD_OUT):
        label = np.zeros((64, 64), dtype=np.float32)
        x, y = generator.integers(4, 24, size=2)
        label[y : y + 12, x : x + 12] = 1
        label[y + 20 : y + 36, x + 16 : x + 30] = 2
        image = generator.normal(100, 10, size=(64, 64)) + 60.0 * label
        image[40, :8] = PIXEL
        for kind, array in (("scan", image), ("outline", label)):
            np.save(folder / "drawer-b" / f"{kind}-of-zebedee-{number:03d}.npy", array.astype(np.float32))
        files = ",".join(f"drawer-b/{kind}-of-zebedee-{number:03d}.npy" for kind in ("scan", "outline"))
        rows.append(f"{files},zebedee-{site}-{number:03d},{'train' if number < TRUE else 'test'}")
    (folder / "manifest.csv").write_text("\n".join(rows) + "\n")
    return folder / "manifest.csv"


@pytest.fixture
def secrets(study: StudyConfig) -> Secrets:
    """What is known before the run; the run adds draws, sums and losses."""
    secrets = Secrets(
        texts={"patient id": "zebedee-", "file name": "of-zebedee", "folder": "drawer-b", "ward": "ward-oncology"},
        counts={TRUE: "true number", DRAWN: "batch size", DRAWN * STEPS: "batch sizes of a round"},
    )
    secrets.add_numbers("pixels", np.full(4, PIXEL))
    secrets.needles["pixels"].append(str(PIXEL).encode())
    pixels = backbone_of(study.backbone).pixels
    for site in study.sites:
        assert site.data is not None
        array = np.load(site.data.parent / "drawer-b" / "scan-of-zebedee-000.npy")
        secrets.add_numbers("pixels", array[30])
        secrets.add_numbers("pixels", preprocess(array, pixels, where="")[0, 30])
    return secrets


@pytest.fixture
def watch(
    study: StudyConfig,
    secrets: Secrets,
    study_file: StudyFile,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    capfd: pytest.CaptureFixture[str],
) -> Callable[[], Watched]:
    """Runs the study as ``medfed simulate`` does, with every logger at DEBUG, and collects all that comes out."""
    watched = Watched(secrets, tmp_path)
    messages: list[tuple[str, Message]] = []

    def draw(num_patients: int, sampling_rate: float, stream: RandomStream) -> np.ndarray:
        assert num_patients == TRUE
        drawn = np.sort(np.argsort(stream.uint64(num_patients))[:DRAWN]).astype(np.int64)
        first = drawn[:6]
        secrets.needles.setdefault("membership", []).extend(
            [first.tobytes(), first.astype("<i4").tobytes()]
            + [separator.join(map(str, first)).encode() for separator in (",", ", ", " ")]
        )
        return drawn

    def add(sum_P: Tensor, *, noise_std: float, stream: RandomStream) -> Tensor:
        watched.sums.append(sum_P.clone())
        privacy, training = study.privacy, study.training
        assert privacy is not None
        step_P = sum_P / (privacy.sampling_rate * DECLARED)
        for name, values in (("clipped sum", sum_P), ("step", step_P), ("move", -training.learning_rate * step_P)):
            secrets.add_numbers(f"raw {name}", values)
        return noise(sum_P, noise_std=noise_std, stream=stream)

    gradients = Engine.gradients

    def with_losses(self: Engine, batch: Any) -> tuple[Tensor, Tensor]:
        gradients_BP, losses_B = gradients(self, batch)
        if len(losses_B) > 3:  # not of the self-check, whose samples are nobody's
            seen.append(losses_B)
            secrets.losses.append(float(losses_B.mean()))
            secrets.losses.append(float(torch.cat(seen[-3:]).mean()))  # of a step: 47 images, 16 at a time
            secrets.add_numbers("loss bytes", losses_B)
            secrets.add_numbers("features", batch[0][0])
            secrets.needles.setdefault("loss in full", []).extend(f"{x:.6f}".encode() for x in losses_B.tolist())
        return gradients_BP, losses_B

    seen: list[Tensor] = []
    send = InProcessGrid.send_and_receive

    def record(self: InProcessGrid, outgoing: Iterable[Message], *, timeout: float | None = None) -> list[Message]:
        sent = list(outgoing)
        replies = send(self, sent, timeout=timeout)
        messages.extend([*(("instruction", one) for one in sent), *(("reply", one) for one in replies)])
        watched.replies.extend(replies)
        return replies

    noise = add_gaussian
    monkeypatch.setattr(private_trainer, "draw_patients", draw)
    if private_trainer.add_gaussian is add_gaussian:
        monkeypatch.setattr(private_trainer, "add_gaussian", add)
    monkeypatch.setattr(Engine, "gradients", with_losses)
    monkeypatch.setattr(InProcessGrid, "send_and_receive", record)

    def run() -> Watched:
        path = study_file(study)
        caplog.set_level(logging.DEBUG)
        capfd.readouterr()
        command = ["simulate", str(path), "--out", str(tmp_path / "runs"), "--workers", "0", "--no-baselines"]
        try:
            main(command)
        except SystemExit as error:
            watched.failed = int(error.code or 0)
        out, err = capfd.readouterr()
        watched.emitted += [("stdout", out.encode(), True), ("stderr", err.encode(), False)]
        watched.emitted += list(_in_messages(messages, study))
        watched.emitted += list(_in_logs(caplog))
        (folder,) = (tmp_path / "runs").iterdir()
        watched.folder = folder
        watched.emitted += list(_in_files(folder, study))
        assert len(seen) >= 3
        return watched

    return run


def _in_messages(messages: Iterable[tuple[str, Message]], study: StudyConfig) -> Iterator[tuple[str, bytes, bool]]:
    for kind, message in messages:
        if message.has_error():
            yield kind, f"{message.error.code} {message.error.reason}".encode(), False
            continue
        assert list(message.content) == [RECORD_KEY]
        for name, value in message.content[RECORD_KEY].items():
            assert isinstance(value, (str, bytes))
            blob = value if isinstance(value, bytes) else value.encode()
            yield kind, _without_manifests(blob, study) if name == "study" else blob, name != "adapter"


def _in_logs(caplog: pytest.LogCaptureFixture) -> Iterator[tuple[str, bytes, bool]]:
    yield "log", caplog.text.encode(), False
    for record in caplog.records:
        # Other libraries write numbers about fonts and files; no number of ours reaches them.
        yield "log", f"{record.name}: {record.getMessage()}".encode(), record.name.startswith("medfed")


def _in_files(folder: Path, study: StudyConfig) -> Iterator[tuple[str, bytes, bool]]:
    """All but the pictures, which show held-out images, and the sites' own description of where their data is."""
    for path in folder.rglob("*"):
        name = path.relative_to(folder).as_posix()
        if path.is_dir() or (name.startswith("figures/") and name != "figures/captions.json"):
            continue
        yield f"name of {name}", name.encode(), False
        blob = path.read_bytes()
        if name in ("sites.json", "ledgers/ledger.key"):
            continue
        if name == "report.html":
            blob = re.sub(
                rb"<style>.*?</style>|<svg.*?</svg>|data:image[^\"]*|[\d,.]+ s on one machine", b"", blob, flags=re.S
            )
        if name == "summary.json":
            blob = re.sub(rb'"wall_s": [\d.]+', b"", blob)
        yield name, _without_manifests(blob, study), path.suffix in (".json", ".jsonl", ".html", ".md")
        if path.suffix == ".sqlite":
            with sqlite3.connect(path) as connection:
                for body, digest, signature in connection.execute("SELECT body, digest, signature FROM entries"):
                    yield "ledger", body, True
                    yield "ledger", digest + signature, False
            connection.close()
        if path.suffix == ".safetensors":
            with safe_open(str(path), framework="pt") as file:
                yield "checkpoint metadata", json.dumps(file.metadata() or {}).encode(), True


def _without_manifests(blob: bytes, study: StudyConfig) -> bytes:
    """Without the paths of manifests, which whoever wrote the study put there; no site sends one."""
    for site in study.sites:
        blob = blob.replace(json.dumps(str(site.data)).encode(), b'""')
    return blob


def raw_moves(watched: Watched, study: StudyConfig) -> list[Tensor]:
    """What each update would be without noise: plain SGD on the sums of one site and round after the other."""
    assert study.privacy is not None
    scale = -study.training.learning_rate / (study.privacy.sampling_rate * DECLARED)
    return [scale * sum(watched.sums[i : i + STEPS]) for i in range(0, len(watched.sums), STEPS)]


def noise_on_the_wire(watched: Watched, study: StudyConfig) -> list[float]:
    """For each update, the standard deviation of what differs from the raw one, over what was promised."""
    assert study.privacy is not None
    manifest = stored_study(watched.folder).resolved_manifest
    plan = PrivacyPlan.of_study(study)
    promised = study.training.learning_rate * STEPS**0.5 * plan.noise_std / (plan.sampling_rate * DECLARED)
    updates = [decode_adapter(payload, manifest).double() for payload in watched.payloads()]
    return [
        float((update - raw).std()) / promised for update, raw in zip(updates, raw_moves(watched, study), strict=True)
    ]


def test_private_run_emits_nothing_that_must_stay_at_the_site(watch: Callable[[], Watched], study: StudyConfig) -> None:
    watched = watch()
    assert watched.failed == 0
    assert watched.leaks() == set()

    channels = {channel for channel, _, _ in watched.emitted}
    assert channels >= {
        "instruction", "reply", "log", "stdout", "ledger", "metrics.jsonl", "summary.json", "report.html",
        "study.json", "checkpoint metadata", "checkpoint.safetensors", "ledgers/north.sqlite",
    }  # fmt: skip
    logged = b"\n".join(blob for channel, blob, _ in watched.emitted if channel == "log")
    for logger in (b"medfed.privacy.ledger", b"medfed.client.serve", b"medfed.server.rounds"):
        assert logger in logged, "DEBUG logs were not collected"

    # Two sites, two rounds: each update carries the noise that was promised, and the server nothing else.
    assert len(watched.sums) == 4 * STEPS
    assert all(0.85 < ratio < 1.15 for ratio in noise_on_the_wire(watched, study))
    headers = [RoundReply.parse({"header": str(reply.content[RECORD_KEY]["header"])}) for reply in watched.replies]
    trained = [header for header in headers if header.round and not header.metrics]
    assert {(header.num_examples, header.refusal) for header in trained} == {(DECLARED, None)}
    assert {header.num_examples for header in headers} == {DECLARED, 2 * DECLARED, HELD_OUT}  # the pooled site, too
    assert all("loss" not in header.metrics for header in headers)
    assert "loss" not in (watched.folder / "metrics.jsonl").read_text()
    # Only the pictures show patients, held-out ones, and say so.
    assert "This file may show some of them" in (watched.folder / "report.html").read_text()


def test_run_that_fails_in_the_middle_of_training_emits_nothing_more(
    watch: Callable[[], Watched], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Tracebacks are logged at DEBUG, and name neither patients nor what was drawn."""
    healthy = private_trainer._clipped_sum
    calls: list[int] = []

    def diverge(*arguments: Any, **options: Any) -> Any:
        calls.append(1)
        if len(calls) == 3:
            engine = arguments[5]

            def refuse(batch: object, num_samples: int) -> None:
                raise PrivacyError("Expected something else of a patient.")

            monkeypatch.setattr(engine, "_gradients", refuse)
        return healthy(*arguments, **options)

    monkeypatch.setattr(private_trainer, "_clipped_sum", diverge)
    watched = watch()
    assert watched.failed == 8
    assert watched.leaks() == set()
    logged = b"".join(blob for channel, blob, _ in watched.emitted if channel == "log")
    assert b"Expected something else of a patient" in logged
    assert b"PrivacyError: the privacy plan cannot be kept" in b"".join(
        blob for channel, blob, _ in watched.emitted if channel == "stderr"
    )


def test_leaks_of_a_careless_site_are_found(
    watch: Callable[[], Watched], study: StudyConfig, secrets: Secrets, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Positive control over the whole path: each of these lines of code is one that somebody might write."""
    log = logging.getLogger("medfed.client.careless")

    def careless_training(model: Any, task: Any, units: Any, *rest: Any, **options: Any) -> PrivateTrainResult:
        item: Item = units[0][0]
        log.debug("event=training patient=%s", item.patient_id)
        log.info("event=drawn patients=%d", DRAWN)
        result = train_privately(model, task, units, *rest, **options)
        return PrivateTrainResult(result.adapter_P, {**result.facts, "clip_fraction": 31 / DRAWN})

    def careless_reply(*arguments: Any, **options: Any) -> RoundReply:
        if options.get("metrics") == {}:  # of a private round
            options["metrics"] = {"loss": round(secrets.losses[-1], 4)}
        return make_reply(*arguments, **options)

    make_reply = serve.reply_to
    inner = private_trainer.add_gaussian

    def without_noise(sum_P: Tensor, **options: Any) -> Tensor:
        inner(sum_P, **options)  # noted as usual
        return sum_P

    monkeypatch.setattr(private_round, "train_privately", careless_training)
    monkeypatch.setattr(serve, "reply_to", careless_reply)
    monkeypatch.setattr(serve, "public_size", lambda study, cohort, site: len(cohort.train))
    monkeypatch.setattr(private_trainer, "add_gaussian", without_noise)
    watched = watch()
    leaks = watched.leaks()
    assert leaks >= {
        ("log", "patient id"),
        ("log", "batch size"),
        ("ledger", "a share of batch size"),
        ("reply", "true number"),
        ("reply", "training loss"),
        ("metrics.jsonl", "training loss"),
        ("checkpoint metadata", "true number"),
    }
    assert all(ratio < 0.01 for ratio in noise_on_the_wire(watched, study))


def encodings_of(needle: bytes) -> list[bytes]:
    return [needle, needle.hex().encode(), *(base64.b64encode(b"x" * shift + needle + b"tail") for shift in range(3))]


def test_search_finds_every_secret_in_every_encoding_and_nothing_in_noise() -> None:
    secrets = Secrets(
        texts={"patient id": "zebedee-north-007"},
        counts={47: "batch size", 53: "true number"},
        losses=[1.2345678],
    )
    secrets.add_numbers("sum", np.linspace(0.1, 0.9, 40))
    for name, needle in [("patient id", b"zebedee-north-007"), *(("sum", one) for one in secrets.needles["sum"])]:
        for encoded in encodings_of(needle):
            assert secrets.found_in(b"before" + encoded + b"after") == {name}
    for text, name in [
        ('{"n": 47}', "batch size"),
        ("patients=53 round=2", "true number"),
        ("53.0", "true number"),
        (f'{{"clip_fraction": {31 / 47}}}', "a share of batch size"),
        (f"{52 / 53:.12f}", "a share of true number"),
        ("loss 1.235", "training loss"),
        ('"loss": 1.234568,', "training loss"),
    ]:
        assert secrets.found_in(text.encode(), numbers=True) == {name}, text
    for text in ("round=2 epsilon 4.470 0.66 147 530 v53 2026-07-47x 0.5 1.0 1.2", "0.6 of 40, delta 0.01, 1.3"):
        assert secrets.found_in(text.encode(), numbers=True) == set(), text
    generator = np.random.default_rng(0)
    assert secrets.found_in(generator.normal(size=100_000).astype("<f4").tobytes()) == set()
