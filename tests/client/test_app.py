"""The client app: whatever goes wrong at a site, the server learns the kind of error and no text of it."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from flwr.app import ConfigRecord, Context, Message, RecordDict

from client import serve
from client.app import app
from medfed.errors import DataError, SiteError, StudyError
from medfed.messages import RECORD_KEY, RoundInstruction, RoundReply
from medfed.models.adapted import resolve
from medfed.study import StudyConfig
from simulation.grid import InProcessGrid

SECRET = "/data/patient-0042.nii.gz"


@pytest.fixture
def study(make_study: Callable[..., StudyConfig], open_sites: Callable[..., Path]) -> StudyConfig:
    study = resolve(make_study(("north",)), torch.device("cpu"))
    open_sites(study)
    return study


def ask(study: StudyConfig, fields: dict[str, str | bytes] | None = None, kind: str = "query.describe") -> Message:
    instruction = RoundInstruction(study_digest=study.digest, round=0)
    content = fields or instruction.to_fields(study=study.canonical, adapter=b"")
    with InProcessGrid(app, node_configs=[{}], run_config={}) as grid:
        message = Message(RecordDict({RECORD_KEY: ConfigRecord(dict(content))}), 1000, kind)
        (reply,) = grid.send_and_receive([message])
    return reply


def header_of(reply: Message) -> RoundReply:
    return RoundReply.parse({"header": str(reply.content[RECORD_KEY]["header"])})


def test_site_describes_itself(study: StudyConfig) -> None:
    header = header_of(ask(study))
    assert (header.site, header.num_examples, header.refusal) == ("north", 3, None)


@pytest.mark.parametrize("error", [DataError(SECRET), PermissionError(13, "denied", SECRET), RuntimeError(SECRET)])
def test_refusal_carries_the_kind_of_error_and_none_of_its_text(
    study: StudyConfig, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, error: Exception
) -> None:
    def fail(*_: object) -> None:
        raise error

    monkeypatch.setattr(serve, "study_and_model", fail)
    reply = ask(study)
    refusal = header_of(reply).refusal
    assert refusal is not None
    assert refusal.kind == type(error).__name__
    assert SECRET not in str(dict(reply.content[RECORD_KEY]))
    assert SECRET not in caplog.text


def test_message_that_cannot_be_read_gives_the_kind_of_error_alone(study: StudyConfig) -> None:
    good = RoundInstruction(study_digest=study.digest, round=0).to_fields(study=study.canonical, adapter=b"")
    for fields in ({"header": "{}"}, {**good, "extra": b"x"}, {**good, "header": "no"}):
        reply = ask(study, fields)
        assert reply.has_error()
        assert reply.error.reason == "RuntimeError"
    context = Context(run_id=1, node_id=1, node_config={"partition-id": 0}, state=RecordDict(), run_config={})
    message = Message(RecordDict({RECORD_KEY: ConfigRecord({"header": "{}"})}), 1000, "train")
    with pytest.raises(RuntimeError, match=r"^MessageError$"):
        app(message=message, context=context)


def test_the_sites_own_log_says_what_to_do_and_the_server_is_told_none_of_it(
    study: StudyConfig, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fail(*_: object) -> None:
        raise SiteError("Expected /srv/site/state for its owner alone, got mode 0755;\n run chmod 700 on it.")

    monkeypatch.setattr(serve, "study_and_model", fail)
    refusal = header_of(ask(study)).refusal
    assert refusal is not None
    assert refusal.reason == SiteError.public
    assert (
        "kind=SiteError why=Expected /srv/site/state for its owner alone, got mode 0755; run chmod 700" in caplog.text
    )


def test_what_the_server_sent_is_a_short_printable_line_in_the_log(
    study: StudyConfig, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fail(*_: object) -> None:
        raise StudyError("unknown key \x1b[2J" + 10**6 * "x")

    monkeypatch.setattr(serve, "study_and_model", fail)
    ask(study)
    (line,) = [record.getMessage() for record in caplog.records if "event=refused" in record.msg]
    assert line.isprintable()
    assert len(line) < 1100


def test_study_with_another_digest_or_manifest_is_refused(study: StudyConfig, open_sites: Callable[..., Path]) -> None:
    instruction = RoundInstruction(study_digest="0" * 64, round=0)
    refusal = header_of(ask(study, instruction.to_fields(study=study.canonical, adapter=b""))).refusal
    assert refusal is not None
    assert refusal.kind == "StudyError"
    manifest = study.resolved_manifest
    smaller = study.with_manifest(manifest.subset(lambda name: name != manifest.tensors[0].name))
    refusal = header_of(ask(smaller)).refusal
    assert refusal is not None
    assert refusal.kind == "PolicyError"  # nobody approved it
    open_sites(smaller)
    refusal = header_of(ask(smaller)).refusal
    assert refusal is not None
    assert refusal.kind == "AdapterMismatchError"


def test_study_without_this_site_is_refused(study: StudyConfig) -> None:
    other = study.replace(sites=[{"name": "elsewhere", "data": "x"}])
    refusal = header_of(ask(other)).refusal
    assert refusal is not None
    assert refusal.kind == "StudyError"


@pytest.mark.parametrize("kind", ["query.describe", "train", "evaluate", "query.secure_advertise"])
def test_round_that_the_study_does_not_have_is_refused(study: StudyConfig, kind: str) -> None:
    instruction = RoundInstruction(study_digest=study.digest, round=study.rounds.num_rounds + 1)
    refusal = header_of(ask(study, instruction.to_fields(study=study.canonical, adapter=b"", secure=b""), kind)).refusal
    assert refusal is not None
    assert refusal.kind == "MessageError"


def test_last_round_of_the_study_is_none_too_many(study: StudyConfig) -> None:
    instruction = RoundInstruction(study_digest=study.digest, round=study.rounds.num_rounds)
    assert header_of(ask(study, instruction.to_fields(study=study.canonical, adapter=b""))).refusal is None
