"""The site worker with a link that a test makes fail: killed between any two steps, one answer, one training."""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from flwr.app import ConfigRecord, Context, Message, RecordDict
from flwr.clientapp import ClientApp
from flwr.supercore.inflatable.inflatable_object import get_all_nested_objects
from flwr.supercore.task_identity import TaskIdentity
from hypothesis import given, settings
from hypothesis import strategies as st

from client.audit_log import AuditLog, read_audit_log
from client.flower_link import Delivery
from client.inbox import MAX_TRIES, Inbox
from client.reply_store import ReplyStore, question_digest
from client.worker import SiteWorker
from medfed.errors import AuditLogError, LinkDownError, LinkError, SiteError
from medfed.messages import RECORD_KEY, RoundInstruction, RoundReply

KEY = Ed25519PrivateKey.from_private_bytes(bytes(32))
DIGEST = "ab" * 32


class Killed(BaseException):
    """The process ends here."""


def delivery(round: int = 1, *, action: str = "train", name: str = "", ttl_s: float = 60.0) -> Delivery:
    """A message of the server, as it arrives."""
    TaskIdentity.run_id, TaskIdentity.task_id, TaskIdentity.node_id = 7, 1, 1
    fields = RoundInstruction(study_digest=DIGEST, round=round, scope="federated").to_fields(
        study=b"study", adapter=name.encode(), broadcast=b"", secure=b""
    )
    message = Message(RecordDict({RECORD_KEY: ConfigRecord(dict(fields))}), 11, action, group_id=str(round), ttl=ttl_s)
    message.metadata.__dict__["_message_id"] = message.object_id
    parts = {digest: part.deflate() for digest, part in get_all_nested_objects(message).items()}
    return Delivery(message.object_id, 7, message.metadata.created_at, ttl_s, parts)


class Server:
    """What a link reaches: deliveries that are there until they are confirmed, and answers, of which the first counts."""

    def __init__(self, *deliveries: Delivery) -> None:
        self.waiting = list(deliveries)
        self.answers: dict[str, list[Message]] = {}
        self.is_over = False
        self.age = 1.0

    @property
    def kinds(self) -> list[str]:
        """Of the first answer to each message."""
        return [first.error.reason if first.has_error() else "reply" for first, *_ in self.answers.values()]


class FakeLink:
    """A link that ends the process, or fails, where it is told to."""

    def __init__(self, server: Server, stop: threading.Event, fail: Callable[[str], None] = lambda _: None) -> None:
        self.server, self._stop, self.fail = server, stop, fail
        self.node_id, self.is_open, self.opened = 0, False, list[int | None]()

    def open(self, stale_node_id: int | None = None) -> int:
        self.fail("open")
        self.opened.append(stale_node_id)
        self.node_id, self.is_open = 11, True
        return 11

    def lost(self) -> None:
        self.is_open = False

    def receive(self) -> Delivery | None:
        self.fail("receive")
        if not self.server.waiting:
            self._stop.set()
            return None
        return self.server.waiting[0]

    def confirm(self, delivery: Delivery) -> None:
        self.fail("before confirm")
        self.server.waiting = [one for one in self.server.waiting if one.message_id != delivery.message_id]
        self.fail("after confirm")

    def run_is_over(self, delivery: Delivery) -> bool:
        self.fail("run_is_over")
        return self.server.is_over

    def age_s(self, delivery: Delivery) -> float:
        return self.server.age

    def send(self, delivery: Delivery, reply: Message, *, runtime_s: float) -> bool:
        self.fail("before send")
        self.server.answers.setdefault(delivery.message_id, []).append(reply)
        self.fail("after send")
        return True


class Session:
    """Remembers in memory."""

    node: int | None = None

    def unended(self) -> int | None:
        return self.node

    def begun(self, node_id: int) -> None:
        self.node = node_id


class Life:
    """One process of a site after the other, in one folder."""

    def __init__(self, folder: Path, server: Server) -> None:
        self.folder, self.server = folder, server
        self.fail: Callable[[str], None] = lambda _: None
        self.trained: list[str] = []
        self.error: BaseException | None = None
        self.epsilon: float | None = None
        self.session = Session()
        self.links: list[FakeLink] = []

    def live(self) -> None:
        """Until there is nothing to do."""
        stop = threading.Event()
        store = ReplyStore(self.folder / "replies")
        app = ClientApp()

        @app.train()
        def train(message: Message, context: Context) -> Message:
            self.fail("before training")
            fields = dict(message.content[RECORD_KEY].items())
            question = question_digest("train", fields)
            if (stored := store.stored(question)) is None:
                if self.error is not None:
                    raise self.error
                self.trained.append(question)
                self.fail("before the reply is stored")
                number = len(self.trained)  # like noise: another try would give another reply
                stored = RoundReply(
                    site="north",
                    study_digest=DIGEST,
                    round=1,
                    attempt=1,
                    num_examples=1,
                    metrics={"loss": number},
                    epsilon=self.epsilon,
                ).to_fields()
                store.keep(question, stored)
            self.fail("after the reply is stored")
            return Message(RecordDict({RECORD_KEY: ConfigRecord(dict(stored))}), reply_to=message)

        link = FakeLink(self.server, stop, lambda where: self.fail(where))
        self.links.append(link)
        worker = SiteWorker(
            link,
            app,
            inbox=Inbox(self.folder / "inflight"),
            audit_log=AuditLog(self.folder, KEY),
            session=self.session,
            epsilon_after=lambda _: 0.0,
            stop=stop,
        )
        worker._stop.wait = lambda timeout=None: True  # type: ignore[method-assign]  # no pauses
        worker.run()

    @property
    def departures(self) -> list[str]:
        return [line.departure.outcome for line in read_audit_log(self.folder / "audit-log.jsonl", KEY.public_key())]


@pytest.fixture
def make_life(tmp_path: Path) -> Callable[..., Life]:
    return lambda *deliveries: Life(tmp_path / "state", Server(*deliveries))


STEPS = (
    "open", "receive", "before confirm", "after confirm", "run_is_over", "before training",
    "before the reply is stored", "after the reply is stored", "before send", "after send",
)  # fmt: skip


def once_at(step: str, error: BaseException) -> Callable[[str], None]:
    """Fails at the first passage of a step."""
    done = list[str]()

    def fail(where: str) -> None:
        if where == step and not done:
            done.append(where)
            raise error

    return fail


@pytest.mark.parametrize("step", STEPS)
def test_killed_at_any_step_a_site_gives_the_server_one_answer_and_the_same_bytes(
    make_life: Callable[..., Life], step: str
) -> None:
    life = make_life(delivery())
    life.fail = once_at(step, Killed())
    with pytest.raises(Killed):
        life.live()
    life.live()
    (answers,) = life.server.answers.values()
    bodies = {str(dict(answer.content[RECORD_KEY].items())) for answer in answers}
    assert len(bodies) == 1
    assert len(life.trained) == (2 if step == "before the reply is stored" else 1)
    assert set(life.departures) == {"reply"}
    assert len(life.departures) >= len(answers)  # what is not in the log has not left
    assert life.server.waiting == []
    assert Inbox(life.folder / "inflight").pending() is None


@pytest.mark.parametrize(("epsilon", "returns"), [(None, 0), (0.5, 1)])
def test_memory_is_given_back_after_a_reply_that_spent_something(
    make_life: Callable[..., Life], monkeypatch: pytest.MonkeyPatch, epsilon: float | None, returns: int
) -> None:
    sent: list[int] = []
    life = make_life(delivery())
    life.epsilon = epsilon
    monkeypatch.setattr("client.worker.return_free_memory", lambda: sent.append(len(life.server.answers)))
    life.live()
    assert sent == [1] * returns  # after the answer, so that nobody waits for it


@pytest.mark.parametrize("step", STEPS)
@pytest.mark.parametrize("error", [LinkDownError("away"), LinkError("refused")])
def test_a_link_that_fails_at_any_step_costs_time_alone(
    make_life: Callable[..., Life], step: str, error: LinkError
) -> None:
    if step in ("before training", "before the reply is stored", "after the reply is stored"):
        return  # not the link's
    life = make_life(delivery())
    life.fail = once_at(step, error)
    life.live()
    (answers,) = life.server.answers.values()
    assert len(life.trained) == 1
    assert {answer.content[RECORD_KEY]["header"] for answer in answers} == {answers[0].content[RECORD_KEY]["header"]}


@pytest.mark.parametrize("step", ["run_is_over", "before send", "after send"])
def test_a_link_that_is_down_for_long_is_no_crash_of_the_site(make_life: Callable[..., Life], step: str) -> None:
    life, failures = make_life(delivery()), list[str]()

    def fail(where: str) -> None:
        if where == step and len(failures) < 3 * MAX_TRIES:
            failures.append(where)
            raise LinkDownError("away")

    life.fail = fail
    life.live()
    assert life.server.kinds == ["reply"]
    assert len(life.trained) == 1


def test_an_unended_session_is_ended_by_the_next_process(make_life: Callable[..., Life]) -> None:
    life = make_life(delivery())
    life.fail = once_at("before training", Killed())
    with pytest.raises(Killed):
        life.live()
    life.live()
    assert [link.opened for link in life.links] == [[None], [11]]


def test_a_message_that_kills_every_process_is_answered_with_an_error_in_the_end(
    make_life: Callable[..., Life],
) -> None:
    life = make_life(delivery(), delivery(2, name="next"))

    def fail(where: str) -> None:
        if where == "before training" and len(life.server.waiting) == 1:
            raise Killed

    life.fail = fail
    for _ in range(MAX_TRIES):
        with pytest.raises(Killed):
            life.live()
    life.fail = lambda _: None
    life.live()
    assert life.server.kinds == ["CrashedTwice", "reply"]
    assert len(life.trained) == 1


def test_nothing_trains_for_a_run_that_is_over_or_a_message_that_is_too_old(make_life: Callable[..., Life]) -> None:
    life = make_life(delivery())
    life.server.is_over = True
    life.live()
    life.server.is_over, life.server.age = False, 61.0
    life.server.waiting = [delivery(2)]
    life.live()
    assert (life.trained, life.server.answers, life.departures) == ([], {}, [])


@pytest.mark.parametrize("error", [ValueError("patient 12 in /data/x.nii"), SystemExit("patient 12")])
def test_what_an_app_raises_travels_as_its_kind_alone(make_life: Callable[..., Life], error: BaseException) -> None:
    life = make_life(delivery())
    life.error = error
    life.live()
    (answers,) = life.server.answers.values()
    assert answers[0].error.reason == type(error).__name__
    assert life.departures == ["error"]


def test_the_same_question_in_another_message_gets_the_same_bytes(make_life: Callable[..., Life]) -> None:
    life = make_life(delivery(), delivery())
    life.live()
    first, second = (answers[0] for answers in life.server.answers.values())
    assert first.content[RECORD_KEY]["header"] == second.content[RECORD_KEY]["header"]
    assert len(life.trained) == 1


@pytest.mark.parametrize("where", ["inflight", "replies"])
def test_a_message_that_cannot_be_written_down_is_not_confirmed_and_a_reply_not_sent(
    make_life: Callable[..., Life], where: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    import client.inbox
    import client.reply_store

    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    life = make_life(delivery())
    module = client.inbox if where == "inflight" else client.reply_store
    monkeypatch.setattr(module, "replace_durably", full)
    if where == "inflight":
        with pytest.raises(SiteError, match="nothing is lost"):
            life.live()
        assert life.server.waiting
    else:
        life.live()
        assert life.server.kinds == ["SiteError"]
        monkeypatch.undo()


def test_nothing_is_sent_that_cannot_be_noted_in_the_audit_log(
    make_life: Callable[..., Life], monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object, **__: object) -> None:
        raise AuditLogError("no space")

    life = make_life(delivery())
    monkeypatch.setattr(AuditLog, "append", full)
    with pytest.raises(AuditLogError):
        life.live()
    assert life.server.answers == {}
    monkeypatch.undo()
    life.live()
    assert life.server.kinds == ["reply"]
    assert len(life.trained) == 1


@settings(max_examples=12)
@given(
    order=st.permutations(range(3)),
    repeated=st.lists(st.integers(0, 2), max_size=3),
    killed=st.lists(st.sampled_from(STEPS), max_size=4),
)
def test_reordered_and_replayed_messages_and_kills_give_each_question_one_answer(
    tmp_path_factory: pytest.TempPathFactory, order: list[int], repeated: list[int], killed: list[str]
) -> None:
    deliveries = [delivery(1, name=str(number)) for number in (*order, *repeated)]
    life = Life(tmp_path_factory.mktemp("life"), Server(*deliveries))
    for step in killed:
        life.fail = once_at(step, Killed())
        try:
            life.live()
        except Killed:
            continue
    life.fail = lambda _: None
    life.live()
    given_to: dict[bytes, set[str]] = {}
    for one in deliveries:
        fields = dict(one.message().content[RECORD_KEY].items())
        first = life.server.answers[one.message_id][0]
        said = first.error.reason if first.has_error() else str(dict(first.content[RECORD_KEY].items()))
        given_to.setdefault(fields["adapter"], set()).add(said)
    assert all(len(said - {"CrashedTwice"}) <= 1 for said in given_to.values())
    assert len(life.trained) <= 3 + killed.count("before the reply is stored")


@settings(max_examples=20)
@given(place=st.floats(0, 1, exclude_max=True), which=st.integers(0, 9), bit=st.integers(0, 7), cut=st.booleans())
def test_truncated_or_flipped_parts_are_no_message_and_trigger_nothing(
    tmp_path_factory: pytest.TempPathFactory, place: float, which: int, bit: int, cut: bool
) -> None:
    good = delivery()
    parts = dict(good.objects)
    digest = sorted(parts)[which % len(parts)]
    content = parts[digest]
    position = int(place * len(content))
    flipped = content[:position] + bytes([content[position] ^ (1 << bit)]) + content[position + 1 :]
    parts[digest] = content[:position] if cut else flipped
    life = Life(
        tmp_path_factory.mktemp("life"),
        Server(Delivery(good.message_id, good.run_id, good.created_at, good.ttl_s, parts)),
    )
    life.live()
    assert (life.trained, life.server.answers, life.departures) == ([], {}, [])
    assert Inbox(life.folder / "inflight").pending() is None
