"""Messages of a hostile server at a site, and of a hostile site at the server: a refusal at most, and no text of theirs."""

import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx
import pytest
from cryptography.hazmat.primitives.asymmetric.ec import SECP384R1, generate_private_key
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from flwr.app import ConfigRecord, Context, Error, Message, MetricRecord, RecordDict
from flwr.app.message.message import make_message
from flwr.app.metadata import Metadata
from flwr.proto.fleet_pb2 import PullMessagesResponse
from flwr.proto.message_pb2 import Message as Proto
from flwr.proto.message_pb2 import ObjectTree, PullObjectResponse
from flwr.supercore.inflatable.inflatable_object import get_all_nested_objects
from hostile import examples, given, hostile, only, unchanged
from hypothesis import strategies as st

from client import app as client_app
from client import bounded_answer, flower_link
from client.audit_log import AuditLog
from client.flower_link import Delivery, FleetLink
from client.inbox import Inbox
from client.worker import SiteWorker
from medfed.errors import LinkDownError, LinkError, MessageError
from medfed.messages import MAX_MESSAGE_PARTS, RECORD_KEY, RoundInstruction, RoundReply, told
from server.certificates import certificate_pem, make_authority, new_key
from server.exchange import _read
from server.flower_link import LinkGrid, _Arriving

DIGEST = "ab" * 32
ASKED = RoundInstruction(study_digest=DIGEST, round=3, attempt=1)
FIELDS = ASKED.to_fields(study=b"study", adapter=b"adapter")
REPLY = RoundReply(site="north", study_digest=DIGEST, round=3, attempt=1, metrics={"dice": 0.5})
ESCAPES = "\x1b[2J\nevent=all_is_well\u2028\r" + "x" * 10_000


def _message(record: dict[str, Any], message_type: str = "train") -> Message:
    metadata = Metadata(1, "", 1, 7, "", "3", 1.0, 60.0, message_type)
    return make_message(metadata, content=RecordDict({RECORD_KEY: ConfigRecord(record)}))


def _parts(message: Message) -> tuple[str, dict[str, bytes]]:
    message.metadata.__dict__["_message_id"] = message.object_id
    return message.object_id, {digest: part.deflate() for digest, part in get_all_nested_objects(message).items()}


MESSAGE_ID, PARTS = _parts(_message(dict(FIELDS)))
RECORDS = st.dictionaries(
    st.sampled_from(("header", "study", "adapter", "broadcast", "secure", "x")),
    st.one_of(st.text(max_size=9), st.binary(max_size=9), st.integers(0, 99), st.lists(st.floats(), max_size=2)),
)


class FakeLink:
    """A server that sends one message and notes the answer."""

    def __init__(self, delivery: Delivery) -> None:
        self.node_id, self.is_open, self.sent, self._delivery = 7, True, [], delivery

    def receive(self) -> Delivery:
        return self._delivery

    def confirm(self, delivery: Delivery) -> None: ...

    def run_is_over(self, delivery: Delivery) -> bool:
        return False

    def age_s(self, delivery: Delivery) -> float:
        return 0.0

    def send(self, delivery: Delivery, reply: Message, *, runtime_s: float) -> bool:
        self.sent.append(reply)
        return True


def _served(delivery: Delivery, folder: Path) -> list[Message]:
    link = FakeLink(delivery)
    log = AuditLog(folder / "log", Ed25519PrivateKey.from_private_bytes(bytes(32)))
    worker = SiteWorker(
        link,  # type: ignore[arg-type]
        client_app.app,
        inbox=Inbox(folder / "inbox"),
        audit_log=log,
        session=SimpleNamespace(),  # type: ignore[arg-type]
        epsilon_after=lambda _: 0.0,
        stop=threading.Event(),
    )
    only(worker._served_one, raises=())
    assert not (folder / "inbox" / "message").exists()
    return link.sent


@examples(120)
@given(st.data())
def test_parts_of_a_message_make_one_or_are_refused(data: st.DataObject) -> None:
    which = data.draw(st.sampled_from(sorted(PARTS)))
    parts = {**PARTS, which: data.draw(hostile(PARTS[which], *PARTS.values()))}
    made = only(Delivery(MESSAGE_ID, 1, 1.0, 60.0, parts).message, raises=(MessageError,))
    assert isinstance(made, (Message, MessageError))


def test_parts_that_hold_each_other_are_refused_at_once() -> None:
    ring = {"a": b"Message b 0\x00", "b": b"RecordDict a 0\x00"}
    many = {f"{n}": f"RecordDict {','.join([str(n + 1)] * 50)} 0".encode() + b"\x00" for n in range(500)}
    for start, parts in (("a", ring), ("0", many), ("a", {})):
        with pytest.raises(MessageError):
            Delivery(start, 1, 1.0, 60.0, parts).message()


@examples(60)
@given(st.data())
def test_a_worker_survives_every_message_and_sends_no_text_of_an_error(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    which = data.draw(st.sampled_from(sorted(PARTS)))
    parts = {**PARTS, which: data.draw(hostile(PARTS[which]))}
    for reply in _served(Delivery(MESSAGE_ID, 1, 1.0, 60.0, parts), tmp_path_factory.mktemp("site")):
        assert not reply.has_error() or reply.error.reason.isidentifier()


@examples(40)
@given(RECORDS, st.sampled_from(("train", "evaluate", "query.secure_open", "query.unknown")))
def test_a_record_that_is_no_instruction_is_answered_with_its_kind(
    tmp_path_factory: pytest.TempPathFactory, record: dict[str, Any], message_type: str
) -> None:
    message_id, parts = _parts(_message(record, message_type))
    (reply,) = _served(Delivery(message_id, 1, 1.0, 60.0, parts), tmp_path_factory.mktemp("site"))
    assert reply.has_error()
    assert reply.error.reason.isidentifier()


def test_the_app_refuses_an_instruction_and_leaves_the_site_as_it_is(
    make_study: Any, open_sites: Callable[..., Path], tmp_path: Path
) -> None:
    study = make_study()
    open_sites(study)
    context = Context(run_id=1, node_id=1, node_config={"partition-id": 0}, state=RecordDict(), run_config={})

    @examples(40)
    @given(hostile(study.canonical), hostile(b"MFAP" + bytes(60)), hostile(b"\x00\x00\x00\x04abcd"))
    def check(sent_study: bytes, adapter: bytes, secure: bytes) -> None:
        fields = ASKED.to_fields(study=sent_study, adapter=adapter, secure=secure)
        for action in (client_app.train, client_app.evaluate, client_app.secure_open):
            with unchanged(tmp_path):
                reply = only(action, _message(dict(fields)), context, raises=())
            said = RoundReply.parse({"header": str(reply.content[RECORD_KEY]["header"])})
            assert said.refusal is not None
            assert "Expected" not in said.refusal.reason

    check()


@examples(120)
@given(hostile(REPLY.model_dump_json().encode()), RECORDS)
def test_the_server_reads_a_reply_or_counts_it_as_none(header: bytes, record: dict[str, Any]) -> None:
    asked = _message(dict(FIELDS))
    text = header.decode(errors="replace")
    for one in ({**record, "header": text}, {"header": text, "adapter": b"", "secure": b""}, record):
        reply = Message(RecordDict({RECORD_KEY: ConfigRecord(one)}), reply_to=asked)
        _check_reply(reply)
    _check_reply(Message(RecordDict({RECORD_KEY: MetricRecord({"a": 1.0})}), reply_to=asked))
    _check_reply(Message(RecordDict(), reply_to=asked))


def _check_reply(reply: Message) -> None:
    read = only(_read, reply, ASKED, "north", frozenset({"dice"}), raises=(MessageError,))
    if isinstance(read, MessageError):
        assert str(read).isprintable()
        assert len(str(read)) < 500


def test_the_text_of_a_site_reaches_no_log_and_no_terminal_as_it_is() -> None:
    asked = _message(dict(FIELDS))
    _check_reply(Message(Error(1, ESCAPES), reply_to=asked))
    for header in (
        REPLY.model_dump_json().replace("dice", ESCAPES.encode("unicode_escape").decode().replace("\\x1b", "\\u001b")),
        REPLY.model_dump_json().replace('"refusal":null', '"refusal":{"kind":"A","reason":"\\u001b[2J"}'),
        REPLY.model_dump_json()[:-1] + ',"\\u001b[2J\\n":1}',
    ):
        record = {"header": header, "adapter": b"", "secure": b""}
        _check_reply(Message(RecordDict({RECORD_KEY: ConfigRecord(record)}), reply_to=asked))
        with pytest.raises(MessageError):
            _read(Message(RecordDict({RECORD_KEY: ConfigRecord(record)}), reply_to=asked), ASKED, "north", frozenset())
    assert told(ESCAPES).isprintable()
    assert len(told(ESCAPES)) == 200


ODD = (float("nan"), float("inf"), float("-inf"), -1.0, 0.0, 1e300)


@pytest.mark.parametrize("message_type", ["train", "query.describe", "query.unknown"])
@pytest.mark.parametrize("ttl", ODD)
def test_a_worker_survives_odd_metadata_and_logs_one_line(
    tmp_path: Path, message_type: str, ttl: float, caplog: pytest.LogCaptureFixture
) -> None:
    metadata = Metadata(1, "", 1, 2**63 - 1, ESCAPES, ESCAPES, ttl, ttl, message_type)
    message_id, parts = _parts(make_message(metadata, content=RecordDict({ESCAPES: ConfigRecord({})})))
    with caplog.at_level("INFO", logger="medfed"):
        _served(Delivery(message_id, 1, 1.0, 60.0, parts), tmp_path)
    assert all(record.getMessage().isprintable() for record in caplog.records if record.name.startswith("medfed"))


@pytest.mark.parametrize("time_s", ODD[:3])
def test_a_message_whose_time_is_no_number_is_refused(time_s: float) -> None:
    for times in ((time_s, 1.0), (1.0, time_s)):
        with pytest.raises(MessageError, match="time"):
            Delivery("a", 1, *times, {})


class FakeSuperLink:
    """Has every part of one reply."""

    def __init__(self, parts: dict[str, bytes]) -> None:
        self.parts = parts

    def call(self, method: Any, request: Any) -> Any:
        content = self.parts.get(getattr(request, "object_id", ""), b"")
        return SimpleNamespace(object_found=True, object_available=True, object_content=content)


@examples(120)
@given(st.data())
def test_parts_of_a_reply_make_one_or_are_refused(data: st.DataObject) -> None:
    which = data.draw(st.sampled_from(sorted(PARTS)))
    parts = {**PARTS, which: data.draw(hostile(PARTS[which], *PARTS.values()))}
    run = SimpleNamespace(run_id=1)
    client = SimpleNamespace(PullObject=None, ConfirmMessageReceived=None)
    grid = LinkGrid(FakeSuperLink(parts), client, run, on_sent=lambda _: None, on_reply=lambda _: None)  # type: ignore[arg-type]
    made = only(grid._whole, _Arriving(MESSAGE_ID, "asked", sorted(parts)), raises=(MessageError,))
    assert isinstance(made, (Message, MessageError))


def test_an_answer_that_no_superlink_gives_is_a_link_error() -> None:
    key = new_key()
    certificate = certificate_pem(make_authority("brains", key))
    link = FleetLink("127.0.0.1:1", certificate, generate_private_key(SECP384R1()))
    answered: list[tuple[int, bytes]] = [(200, b"")]

    def answer(request: httpx.Request) -> httpx.Response:
        status, body = answered[-1]
        return httpx.Response(status, content=body, headers={"location": "https://[", "date": "never"})

    link._client._client.close()
    link._client._client = httpx.Client(transport=httpx.MockTransport(answer), follow_redirects=True)
    pulled = PullMessagesResponse(messages_list=[Proto()], message_object_trees=[ObjectTree(object_id="a")])

    @examples(60)
    @given(
        st.one_of(st.just(b""), st.binary(max_size=60), hostile(pulled.SerializeToString(), b"\x0a\x02\x0a\x00")),
        st.sampled_from((200, 200, 200, 302, 400, 599)),
    )
    def check(body: bytes, status: int) -> None:
        answered.append((status, body))
        only(link.receive, raises=(LinkError,))
        only(link.confirm, Delivery("a", 1, 1.0, 60.0, {}), raises=(LinkError,))

    check()
    pulled.messages_list[0].metadata.created_at = float("nan")
    pulled.messages_list[0].metadata.message_type = "train"
    pulled.messages_list[0].content.SetInParent()
    answered.append((200, pulled.SerializeToString()))
    with pytest.raises(LinkError, match="MessageError"):
        link.receive()
    answered.append((400, ESCAPES.encode()))
    with pytest.raises(LinkError) as caught:
        link.receive()
    assert str(caught.value).isprintable()
    link.close()


class Endless(httpx.SyncByteStream):
    """An answer that never ends; how much of it was read."""

    read = 0

    def __iter__(self) -> Iterator[bytes]:
        while True:
            self.read += 2**20
            yield bytes(2**20)


def _linked(answer: Callable[[httpx.Request], httpx.Response], monkeypatch: pytest.MonkeyPatch) -> FleetLink:
    certificate = certificate_pem(make_authority("brains", new_key()))
    link = FleetLink("127.0.0.1:1", certificate, generate_private_key(SECP384R1()))
    monkeypatch.setattr(link._client._client, "_transport", httpx.MockTransport(answer))
    monkeypatch.setattr(link._client._client, "_mounts", {})
    return link


def _announced(*children: str) -> bytes:
    tree = ObjectTree(object_id="a", children=[ObjectTree(object_id=child) for child in children])
    pulled = PullMessagesResponse(messages_list=[Proto()], message_object_trees=[tree])
    pulled.messages_list[0].metadata.message_type = "train"
    pulled.messages_list[0].content.SetInParent()
    return pulled.SerializeToString()


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> int:
    """Limits of a message and of other answers."""
    for module in (bounded_answer, flower_link):
        monkeypatch.setattr(module, "MAX_MESSAGE_BYTES", 3 * 2**20)
    monkeypatch.setattr(bounded_answer, "MAX_ENVELOPE_BYTES", 2 * 2**20)
    return 3 * 2**20


@pytest.mark.parametrize("path", ["pull-messages", "pull-object"])
def test_an_answer_without_end_is_refused_before_it_fills_the_memory(
    path: str, small: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    endless = Endless()

    def answer(request: httpx.Request) -> httpx.Response:
        if request.url.path.endswith(path):
            return httpx.Response(200, stream=endless)
        return httpx.Response(200, content=_announced())

    link = _linked(answer, monkeypatch)
    with pytest.raises(LinkDownError, match=rf"Expected an answer of at most \d+ bytes to /v1/fleet/{path}") as caught:
        link.receive()
    assert str(caught.value).isprintable()
    assert endless.read <= small + 2**20
    link.close()


@pytest.mark.parametrize(
    "header", [{"content-length": "99999999"}, {"content-encoding": "gzip"}, {"content-encoding": ESCAPES[:3] + "x"}]
)
def test_a_long_or_compressed_answer_is_refused_before_it_is_read(
    header: dict[str, str], small: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    endless = Endless()
    link = _linked(lambda _: httpx.Response(200, stream=endless, headers=header), monkeypatch)
    with pytest.raises(LinkDownError) as caught:
        link.receive()
    assert str(caught.value).isprintable()
    assert endless.read == 0
    link.close()


def test_a_message_of_too_many_or_too_large_parts_is_refused_in_one_line(
    small: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[str] = []

    def answer(request: httpx.Request) -> httpx.Response:
        asked.append(request.url.path)
        if request.url.path.endswith("pull-object"):
            part = PullObjectResponse(object_found=True, object_available=True, object_content=bytes(2**20))
            return httpx.Response(200, content=part.SerializeToString())
        return httpx.Response(200, content=_announced(*children))

    link = _linked(answer, monkeypatch)
    children = [str(number) for number in range(1, 17)]
    with pytest.raises(LinkDownError, match="got one of 17 parts, more than 16; nothing of it is kept"):
        link.receive()
    assert asked == ["/v1/fleet/pull-messages"]
    children = children[:5]
    with pytest.raises(LinkDownError, match=f"got one of more than {small} bytes; nothing of it is kept"):
        link.receive()
    assert asked.count("/v1/fleet/pull-object") == 4  # the rest is not asked for
    children = children[:2]
    whole = link.receive()
    assert whole is not None
    assert sum(map(len, whole.objects.values())) == small
    link.close()


def test_a_message_of_ours_has_fewer_parts_than_a_site_takes() -> None:
    assert len(PARTS) == 3
    assert len(PARTS) < MAX_MESSAGE_PARTS
