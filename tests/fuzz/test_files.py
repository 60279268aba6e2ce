"""What is read from files: studies, policies, settings, ledgers, logs, checkpoints, weights, adapters."""

import hashlib
import json
import os
import shutil
import sqlite3
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from hostile import examples, files_of, given, hostile, only, unchanged
from safetensors.torch import save

from client.approvals import read_approvals, store_approval
from client.audit_log import AuditLog, Departure, read_audit_log
from client.flower_link import Delivery
from client.inbox import Inbox
from client.policy import read_policy
from client.reply_store import ReplyStore
from client.run_site import SessionFile
from client.site_folder import SiteFolder
from client.site_memory import SiteMemory
from medfed.adapter_manifest import AdapterManifest
from medfed.consortium_documents import EnrolmentRequest, Roster, StartupKit
from medfed.errors import (
    AuditLogError,
    CheckpointError,
    ConsortiumError,
    DocumentError,
    LedgerError,
    SecureAggregationError,
    SiteError,
    StudyError,
    WeightsError,
)
from medfed.framed_file import DamagedFileError, pack, unpack
from medfed.models.compressed_adapter import compress
from medfed.models.weights import load_state_dict
from medfed.signed_document import verify_document, verify_self_signed
from medfed.signing import read_key, read_public_key
from medfed.study import StudyConfig, parse_study, read_study
from privacy.accounting import Mechanism
from privacy.ledger import PrivacyLedger
from privacy.ledger_entry import Cap, Charge, read_body
from privacy.ledger_head import head_path, read_head
from privacy.ledger_view import LedgerView
from privacy.secure_aggregation.journal import Journal
from server.checkpoint import CHECKPOINT, Checkpoint, read_checkpoint, write_checkpoint
from server.consortium_config import parse_consortium
from server.results import read_results
from server.run_status import STATUS, RunStatus, SiteStatus, now_text, read_status

KEY = Ed25519PrivateKey.from_private_bytes(bytes(range(32)))
DEEP, LONG = "[" * 100_000, "9" * 5_000
POLICY = (
    b"approved_studies = ['" + b"ab" * 32 + b"']\nminimum_patients = 20\nallow_unprotected = false\n[budget]\n"
    b'epsilon = 10.0\ndelta = 1e-5\nunit = "patient"\n'
)
SETTINGS = b'data = "images/manifest.csv"\ndevice = "cpu"\nnum_threads = 2\ncohort = "chest"\n'
CONSORTIUM = b'name = "brains"\n[server]\nhost = "127.0.0.1"\nport = 8443\n[[sites]]\nname = "north"\n'
DEPARTURE = Departure(time="2026-01-01T00:00:00.000+00:00", run="1", action="train", outcome="reply", payload_bytes=3,
                      payload_digest="ab" * 32)  # fmt: skip


def _written(path: Path, data: bytes) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)
    path.chmod(0o600)
    return path


@pytest.mark.parametrize(
    "text", [f"x = {DEEP}", f"x = {LONG}", "x = " + "{a=" * 20_000], ids=["deep", "long", "inline"]
)
def test_toml_that_python_cannot_read_is_refused_in_one_line(tmp_path: Path, text: str) -> None:
    path = _written(tmp_path / "a.toml", text.encode())
    for read, error in ((read_policy, SiteError), (read_study, StudyError)):
        with pytest.raises(error, match="TOML"):
            read(path)
    with pytest.raises(ConsortiumError, match="TOML"):
        parse_consortium(text.encode(), "a.toml")
    folder = SiteFolder(tmp_path)
    _written(folder.settings_file, text.encode())
    with pytest.raises(SiteError, match="TOML"):
        folder.settings()


@pytest.mark.parametrize("name", ["a\\u0000b", "a" * 300, "a/" * 3000], ids=["nul", "long-name", "long-path"])
def test_a_manifest_whose_path_no_file_can_have_is_refused(
    tmp_path: Path, name: str, make_study: Any, study_file: Any
) -> None:
    folder = SiteFolder(tmp_path)
    _written(folder.settings_file, f'data = "{name}"\ncohort = "chest"\n'.encode())
    with pytest.raises(SiteError, match="data"):
        folder.settings()
    study = make_study()
    text = study_file(study).read_text().replace(json.dumps(str(study.sites[0].data)), f'"{name}"')
    with pytest.raises(StudyError, match="data"):
        read_study(_written(tmp_path / "s.toml", text.encode()))


@examples(80)
@given(hostile(POLICY))
def test_a_policy_is_read_or_refused(tmp_path: Path, data: bytes) -> None:
    path = _written(tmp_path / "policy.toml", data)
    with unchanged(tmp_path):
        only(read_policy, path, raises=(SiteError,))


@examples(80)
@given(hostile(SETTINGS))
def test_settings_of_a_site_are_read_or_refused(tmp_path: Path, data: bytes) -> None:
    folder = SiteFolder(tmp_path)
    _written(folder.settings_file, data)
    with unchanged(tmp_path):
        only(folder.settings, raises=(SiteError,))


@examples(80)
@given(hostile(CONSORTIUM))
def test_a_consortium_file_is_read_or_refused(data: bytes) -> None:
    only(parse_consortium, data, "CONSORTIUM.toml", raises=(ConsortiumError,))


def test_a_study_is_read_or_refused_as_toml_and_as_canonical_bytes(
    tmp_path: Path, make_private_study: Callable[..., StudyConfig], study_file: Callable[[StudyConfig], Path]
) -> None:
    study = make_private_study()
    manifest = AdapterManifest.of({"a": torch.zeros(2, 3)}, method="lora", rank=2)
    text, canonical = study_file(study).read_bytes(), study.with_manifest(manifest).canonical
    path = tmp_path / "hostile" / "study.toml"

    @examples(80)
    @given(hostile(text))
    def toml(data: bytes) -> None:
        only(read_study, _written(path, data), raises=(StudyError,))

    @examples(100)
    @given(hostile(canonical, study.canonical))
    def wire(data: bytes) -> None:
        parsed = only(parse_study, data, raises=(StudyError,))
        if not isinstance(parsed, StudyError):
            assert parsed.canonical == data

    toml()
    wire()


def test_signed_documents_and_approvals_are_read_or_refused(make_consortium: Any, tmp_path: Path) -> None:
    consortium = make_consortium("north")
    folder, coordinator = consortium.sites["north"], consortium.coordinator
    store_approval(folder, "study", "ab" * 32)
    signing_key = folder.own_identity().signing_key.hex()
    kit, enrolment = folder.kit_file.read_bytes(), folder.enrolment_file.read_bytes()
    roster, approval = coordinator.roster_file.read_bytes(), folder.approvals / f"{'ab' * 32}.json"
    approved = approval.read_bytes()

    @examples(60)
    @given(hostile(kit, enrolment, roster))
    def documents(data: bytes) -> None:
        only(lambda: verify_self_signed(data, StartupKit, origin="x"), raises=(DocumentError,))
        only(lambda: verify_self_signed(data, EnrolmentRequest, origin="x"), raises=(DocumentError,))
        key = coordinator.coordinator_public_key
        only(lambda: verify_document(data, Roster, public_key=key, origin="x"), raises=(DocumentError,))

    @examples(40)
    @given(hostile(approved))
    def approvals(data: bytes) -> None:
        approval.write_bytes(data)
        with unchanged(folder.root):
            found = only(lambda: read_approvals(folder, signing_key=signing_key), raises=())
        assert len(found.valid) == (1 if data == approved else 0)

    documents()
    approvals()


def _framed(header: bytes, blobs: bytes = b"") -> bytes:
    body = len(header).to_bytes(8, "big") + header + blobs
    return b"medfed framed 1\n" + hashlib.sha256(body).digest() + body


FRAMED = pack({"message_id": "a", "run_id": 1, "created_at": 1.0, "ttl_s": 2.0, "tries": 1, "header": "h"}, {"a": b"x"})


@pytest.mark.parametrize(
    "header",
    ['{"facts":{},"sizes":[["a",Infinity]]}', '{"facts":{},"sizes":[["a",1e999]]}', DEEP, '{"facts":{},"sizes":[],"x":1}',
     '{"facts":{"a":NaN},"sizes":[]}', '{"facts":{},"sizes":[["a",0],["a",0]]}', '{"facts":{},"sizes":[["a",-1],["b",1]]}',
     '{"facts":{},"sizes":[["a",true]]}', '{"facts":{},"sizes":[["a",9223372036854775807]]}', '{"facts":[],"sizes":[]}'],
    ids=range(10),
)  # fmt: skip
def test_a_framed_file_with_a_forged_header_is_damaged(header: str) -> None:
    with pytest.raises(DamagedFileError):
        unpack(_framed(header.encode()))


@examples(100)
@given(hostile(FRAMED))
def test_a_framed_file_is_read_exactly_or_damaged_whole_and_resealed(data: bytes) -> None:
    for one in (data, _framed(data[56:]), b"medfed framed 1\n" + hashlib.sha256(data[48:]).digest() + data[48:]):
        read = only(unpack, one, raises=(DamagedFileError,))
        if not isinstance(read, DamagedFileError):
            assert pack(*read) == one


@examples(60)
@given(hostile(FRAMED, FRAMED[48:]))
def test_inbox_and_replies_take_a_whole_file_or_none(tmp_path: Path, data: bytes) -> None:
    inbox, replies = Inbox(tmp_path / "inbox"), ReplyStore(tmp_path / "replies")
    sealed = b"medfed framed 1\n" + hashlib.sha256(data).digest() + data
    for one in (data, sealed):
        _written(tmp_path / "inbox" / "message", one)
        pending = only(inbox.pending, raises=())
        assert (tmp_path / "inbox" / "message").exists() == (pending is not None)
        inbox.finish()
        _written(tmp_path / "replies" / "q.reply", one)
        with unchanged(tmp_path / "replies"):
            only(replies.stored, "q", raises=())


def test_inbox_drops_a_message_with_numbers_that_are_none(tmp_path: Path) -> None:
    inbox = Inbox(tmp_path)
    inbox.begin(Delivery("a", 1, 1.0, 2.0, {}))
    facts = {"message_id": "a", "run_id": 10**400, "created_at": 10**400, "ttl_s": 1.0, "tries": 1}
    _written(tmp_path / "message", pack(facts, {}))
    assert only(inbox.pending, raises=()) is None
    assert not files_of(tmp_path)


HEADS = [DEEP, '{"sequence":1e999,"digest":"00","signature":"00"}', '{"sequence":' + LONG + "}", "null", "[]", "",
         '{"sequence":-1,"digest":"00","signature":"00"}', '{"sequence":1,"digest":"\\ud800","signature":"\\ud800"}']  # fmt: skip


@pytest.mark.parametrize("text", HEADS, ids=range(len(HEADS)))
def test_a_forged_head_file_is_refused(tmp_path: Path, text: str) -> None:
    with pytest.raises(LedgerError):
        read_head(_written(tmp_path / "a.head", text.encode()), KEY.public_key())
    AuditLog(tmp_path, KEY).append(DEPARTURE)
    _written(tmp_path / "audit-log.head", text.encode())
    with pytest.raises(AuditLogError):
        read_audit_log(tmp_path / "audit-log.jsonl", KEY.public_key())


def test_an_audit_log_is_read_whole_or_refused(tmp_path: Path) -> None:
    log = AuditLog(tmp_path, KEY)
    for _ in range(2):
        log.append(DEPARTURE)
    lines, head = (tmp_path / "audit-log.jsonl").read_bytes(), (tmp_path / "audit-log.head").read_bytes()

    @examples(80)
    @given(hostile(lines), hostile(head))
    def check(broken_lines: bytes, broken_head: bytes) -> None:
        for one, other in ((broken_lines, head), (lines, broken_head)):
            _written(tmp_path / "audit-log.jsonl", one)
            _written(tmp_path / "audit-log.head", other)
            with unchanged(tmp_path):
                read = only(read_audit_log, tmp_path / "audit-log.jsonl", KEY.public_key(), raises=(AuditLogError,))
            assert isinstance(read, AuditLogError) or len(read) == 2

    check()


def test_a_ledger_is_read_whole_or_refused(tmp_path: Path) -> None:
    path, charge = tmp_path / "l" / "north.sqlite", Charge(
        cohort="chest", study="lesions", study_digest="ab" * 32, scope="federated", round=1, clip_norm=1.0, delta=1e-5,
        mechanism=Mechanism(noise_multiplier=1.1, sampling_rate=0.2, steps=3), unit="patient", adjacency="add-remove",
        request_digest="00" * 32)  # fmt: skip
    ledger = PrivacyLedger.open(path, KEY)
    reserved = ledger.reserve(charge, Cap(epsilon=100.0, delta=1e-5, unit="patient"))
    ledger.settle(reserved, "sent", b"reply", {"clip_fraction": 0.5})
    database, head = path.read_bytes(), head_path(path).read_bytes()
    with sqlite3.connect(path) as connection:
        bodies = [body for (body,) in connection.execute("SELECT body FROM entries")]
    connection.close()

    @examples(80)
    @given(hostile(*bodies))
    def entry(data: bytes) -> None:
        only(read_body, data, raises=())

    @examples(60)
    @given(hostile(database), hostile(head))
    def whole(broken_database: bytes, broken_head: bytes) -> None:
        for one, other in ((broken_database, head), (database, broken_head)):
            _written(path, one)
            _written(head_path(path), other)
            read = only(lambda: LedgerView(path, KEY.public_key()).entries(), raises=(LedgerError,))
            assert isinstance(read, LedgerError) or len(read) == 3
            assert other == head_path(path).read_bytes()

    entry()
    whole()


def _safetensors(header: object, data: bytes = b"", length: int | None = None) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + data


def _tensor(dtype: str, shape: list[int], end: int) -> dict[str, object]:
    return {"a": {"dtype": dtype, "shape": shape, "data_offsets": [0, end]}}


LYING = [
    *(_safetensors(_tensor(dtype, [2], size), bytes(size)) for dtype, size in (("F4", 1), ("F8_E8M0", 2), ("XX", 8))),
    _safetensors(_tensor("F32", [2**31, 2**31], 8), bytes(8)),
    _safetensors(_tensor("F32", [2**40], 2**42), bytes(8)),
    _safetensors(_tensor("F32", [-1], 4), bytes(4)),
    _safetensors({}, length=2**63),
    _safetensors({}, length=2**40),
    _safetensors(b"[" * 100_000),
]
WHOLE = save({"a": torch.ones(2), "b": torch.zeros(1, 3)}, metadata={"format": "pt"})


@pytest.mark.parametrize("data", LYING, ids=range(len(LYING)))
def test_tensors_whose_header_lies_are_refused(tmp_path: Path, data: bytes) -> None:
    path = _written(tmp_path / "a.safetensors", data)
    only(load_state_dict, path, hashlib.sha256(data).hexdigest(), raises=(WeightsError,))  # torch knows F4 and F8_E8M0
    _written(tmp_path / "m" / "round-000001.memory", hashlib.sha256(data).digest() + data)
    with pytest.raises(SiteError):
        SiteMemory(tmp_path / "m").before(2)


@examples(60)
@given(hostile(WHOLE))
def test_weights_and_memories_are_read_or_refused(tmp_path: Path, data: bytes) -> None:
    path = _written(tmp_path / "a.safetensors", data)
    with unchanged(tmp_path):
        only(load_state_dict, path, hashlib.sha256(data).hexdigest(), raises=(WeightsError,))
    _written(tmp_path / "m" / "round-000001.memory", hashlib.sha256(data).digest() + data)
    with unchanged(tmp_path):
        only(SiteMemory(tmp_path / "m").before, 2, raises=(SiteError,))


def test_pickled_weights_are_read_or_refused(tmp_path: Path) -> None:
    torch.save({"a": torch.ones(2)}, tmp_path / "whole.pth")

    @examples(80)
    @given(hostile((tmp_path / "whole.pth").read_bytes(), b"\x80\x02}q\x00."))
    def check(data: bytes) -> None:
        path = _written(tmp_path / "a.pth", data)
        only(load_state_dict, path, hashlib.sha256(data).hexdigest(), raises=(WeightsError,))

    check()


def test_an_adapter_folder_is_compressed_or_refused_and_nothing_is_left(tmp_path: Path) -> None:
    name = "base_model.model.q"
    tensors = save({f"{name}.lora_A.weight": torch.ones(2, 4), f"{name}.lora_B.weight": torch.ones(4, 2)})
    config = json.dumps({"r": 2, "lora_alpha": 4, "rank_pattern": {}, "alpha_pattern": {}}).encode()
    folder, out = tmp_path / "adapter", tmp_path / "out"

    @examples(60)
    @given(hostile(tensors), hostile(config))
    def check(broken_tensors: bytes, broken_config: bytes) -> None:
        for one, other in ((broken_tensors, config), (tensors, broken_config)):
            _written(folder / "adapter_model.safetensors", one)
            _written(folder / "adapter_config.json", other)
            with unchanged(folder):
                done = only(compress, folder, out, 1, raises=(StudyError,))
            assert out.exists() != isinstance(done, StudyError)
            shutil.rmtree(out, ignore_errors=True)

    check()


MANIFEST = AdapterManifest.of({"a": torch.zeros(2)}, method="lora", rank=1)
DIGEST = "ab" * 32
FACTS: dict[str, Any] = {"study_digest": DIGEST, "scope": "federated", "round": 1, "weights": {"north": 1.0}}


def _checkpoint(facts: object, metrics: str = "", **tensors: torch.Tensor) -> bytes:
    text = facts if isinstance(facts, str) else json.dumps(facts)
    return save({"adapter": torch.zeros(2), **tensors}, metadata={"medfed": text, "metrics": metrics})


FORGED = [
    *(_checkpoint({**FACTS, key: value}) for key, value in (
        ("round", "x"), ("round", -1), ("round", float("inf")), ("round", 1.5), ("weights", 3), ("weights", {"a": None}),
        ("adapter_P", 1), ("scope", 1), ("study_digest", None))),
    *(_checkpoint(text) for text in (DEEP, LONG, "null", "[]", "")),
    *(_checkpoint(FACTS, metrics) for metrics in ("no json\n", "[]\n", DEEP)),
    _checkpoint(FACTS, "", other=torch.zeros(1)),
    _checkpoint(FACTS, "", adapter=torch.zeros(2, dtype=torch.int64)),
]  # fmt: skip


@pytest.mark.parametrize("data", FORGED, ids=range(len(FORGED)))
def test_a_forged_checkpoint_is_refused_in_one_line(tmp_path: Path, data: bytes) -> None:
    _written(tmp_path / CHECKPOINT, data)
    with pytest.raises(CheckpointError) as caught:
        read_checkpoint(tmp_path, MANIFEST, study_digest=DIGEST, scope="federated")
    assert "\n" not in str(caught.value)


def test_a_checkpoint_is_read_or_refused(tmp_path: Path) -> None:
    write_checkpoint(tmp_path, Checkpoint(adapter_P=torch.ones(2), metrics=('{"event": "round"}',), **FACTS))
    whole = (tmp_path / CHECKPOINT).read_bytes()
    read = read_checkpoint(tmp_path, MANIFEST, study_digest=DIGEST, scope="federated")
    assert read is not None
    assert (read.round, read.weights) == (1, {"north": 1.0})

    @examples(80)
    @given(hostile(whole))
    def check(data: bytes) -> None:
        _written(tmp_path / CHECKPOINT, data)
        with unchanged(tmp_path):
            only(
                lambda: read_checkpoint(tmp_path, MANIFEST, study_digest=DIGEST, scope="federated"),
                raises=(CheckpointError,),
            )

    check()


def test_status_and_results_are_read_or_refused(tmp_path: Path) -> None:
    status = RunStatus(study="a", study_digest=DIGEST, consortium="c", num_rounds=3, started_at=now_text(),
                       updated_at=now_text(), sites={"north": SiteStatus(last_seen=now_text())})  # fmt: skip
    from rich.console import Console

    from server.status_table import status_view

    @examples(60)
    @given(hostile(status.model_dump_json().encode()))
    def check(data: bytes) -> None:
        _written(tmp_path / STATUS, data)
        _written(tmp_path / "summary.json", data)
        only(read_results, tmp_path, raises=(CheckpointError,))
        read = only(read_status, tmp_path, raises=(CheckpointError,))
        if not isinstance(read, CheckpointError):
            with Path(os.devnull).open("w") as nowhere:
                only(Console(file=nowhere).print, status_view(read), raises=())

    check()


def test_a_refusal_that_looks_like_markup_is_shown_as_it_is(tmp_path: Path) -> None:
    from rich.console import Console

    from server.status_table import status_view

    site = SiteStatus(refusals=1, last_refusal="PolicyError: [/b] no [red]")
    status = RunStatus(study="a", study_digest=DIGEST, consortium="c", num_rounds=3, started_at=now_text(),
                       updated_at=now_text(), sites={"north": site})  # fmt: skip
    console = Console(width=200, record=True, file=(tmp_path / "out").open("w"))
    console.print(status_view(status))
    assert "[/b] no [red]" in console.export_text()
    console.file.close()


@examples(60)
@given(hostile(b"-----BEGIN PUBLIC KEY-----\nMCowBQYDK2VwAyEA\n-----END PUBLIC KEY-----\n", b"7", b"-1"))
def test_keys_sessions_and_secrets_of_a_journal_are_read_or_refused(tmp_path: Path, data: bytes) -> None:
    path = _written(tmp_path / "key", data)
    only(read_key, path, raises=(SiteError,))
    only(read_public_key, path, raises=(SiteError,))
    only(SessionFile(path).unended, raises=())
    _written(tmp_path / "j" / "epoch-1" / "own", data)
    only(Journal(tmp_path / "j").own, 1, raises=(SecureAggregationError,))
