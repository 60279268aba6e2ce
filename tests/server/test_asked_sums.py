"""A server that was killed asks for the same sums again: sites answer from what they stored, and mask nothing anew."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from client.reply_store import ReplyStore, question_digest
from medfed.errors import CheckpointError, LostRoundError, RoundError, SecureAggregationError
from medfed.messages import RoundInstruction, RoundReply
from medfed.study import FEDERATED, StudyConfig
from privacy.secure_aggregation.client import SecureClient
from privacy.secure_aggregation.framing import read_number
from privacy.secure_aggregation.identity import SECRET_BYTES, Identity
from privacy.secure_aggregation.messages import OpenRequest, Relay, Roster, RoundStart, VoteRequest
from privacy.secure_aggregation.plan import SecureAggregationPlan
from server.asked_sums import ASKED_SUMS, AskedSums
from server.exchange import Exchange, ModelPayload, SiteReply
from server.secure_sums import SecureSums, SummedRound
from strategies.secure_channel import SecureChannel

SITES = ("north", "south", "west", "east", "centre")
MODEL = ModelPayload(b"adapter")


class ServerKilledError(Exception):
    """Ends the server where a test wants it."""


@dataclass
class Hospital:
    """A site with its journal and the answers that it stores, as the client app uses them."""

    client: SecureClient
    replies: ReplyStore
    vectors: list[tuple[str, int]] = field(default_factory=list)
    """What was masked, and so charged, in the order of time: purpose and round."""

    def answers(
        self, action: str, round_number: int, channel: SecureChannel, model: ModelPayload, asked: bytes
    ) -> bytes:
        question = question_digest(action, {"header": str(round_number), "adapter": model.adapter, "secure": asked})
        if (stored := self.replies.stored(question)) is not None:
            return bytes(stored["secure"])
        reply = self._answer(action, channel, model, asked)
        self.replies.keep(question, {"header": "", "secure": reply})
        return reply

    def _answer(self, action: str, channel: SecureChannel, model: ModelPayload, asked: bytes) -> bytes:
        client = self.client
        if action == "secure_advertise":
            return client.advertise(read_number(asked)).to_bytes()
        if action == "secure_setup":
            return client.setup(Roster.parse(asked)).to_bytes()
        if action == "secure_accept":
            return client.accept(Relay.parse(asked)).to_bytes()
        if action == "secure_vote":
            return client.vote(VoteRequest.parse(asked)).to_bytes()
        if action == "secure_open":
            return client.open(OpenRequest.parse(asked)).to_bytes()
        agreed = {"channel": channel.digest, "model": model.digest}
        client.check_start(RoundStart.parse(asked), **agreed)
        self.vectors.append((action, channel.round))
        vector = channel.scores({"dice": 0.5}, np.zeros(channel._num_counts))
        return client.mask(RoundStart.parse(asked), vector, **agreed).to_bytes()


class Consortium:
    """Five hospitals, and servers one after the other."""

    def __init__(self, study: StudyConfig, folder: Path) -> None:
        identities = {site: Identity(os.urandom(SECRET_BYTES)) for site in SITES}
        keyed = [
            site.model_copy(update={"signing_key": identities[site.name].signing_key.hex()}) for site in study.sites
        ]
        self.study, self.folder = study.replace(sites=keyed), folder
        self.plan = SecureAggregationPlan.of_study(self.study, FEDERATED)
        self.sites = {
            site: Hospital(
                SecureClient(site, identities[site], self.plan, folder / site / "journal"),
                ReplyStore(folder / site / "replies"),
            )
            for site in SITES
        }
        self.away: set[tuple[str, str]] = set()
        self.killed_before = ""
        self.killed_after = ""
        self.asked: list[str] = []
        self.channel: SecureChannel | None = None

    def ask(
        self, action: Any, sites: Sequence[str], number: int, model: ModelPayload, secure: Mapping[str, bytes]
    ) -> Exchange:
        assert self.channel is not None
        if action == self.killed_before:
            raise ServerKilledError
        self.asked.append(action)
        replies: dict[str, SiteReply] = {}
        failures: dict[str, str] = {}
        refused: dict[str, str] = {}
        header = RoundReply(site="north", study_digest="ab" * 32, round=number, attempt=1)
        for site in sites:
            if {(site, action), (site, "")} & self.away:
                continue
            try:
                said = self.sites[site].answers(action, number, self.channel, model, secure[site])
                replies[site] = SiteReply(header, b"", said)
            except SecureAggregationError as error:
                failures[site], refused[site] = str(error), type(error).__name__
        if action == self.killed_after:
            raise ServerKilledError
        return Exchange(replies, {}, failures, refused)

    def server(self) -> Callable[[str, int], SummedRound]:
        """A server process that knows what is on disk and nothing else."""
        sums = SecureSums(self.study, FEDERATED, self.ask, quorum=3, asked_sums=self.folder / ASKED_SUMS)

        def sum_up(action: str, number: int) -> SummedRound:
            channel = replace(SecureChannel.evaluation(self.study, number), purpose=action)
            self.channel = channel
            return sums.sum(action, channel, MODEL)  # type: ignore[arg-type]

        return sum_up

    @property
    def vectors(self) -> list[int]:
        """How often each site masked."""
        return [len(site.vectors) for site in self.sites.values()]


@pytest.fixture
def consortium(make_secure_study: Callable[..., StudyConfig], tmp_path: Path) -> Consortium:
    return Consortium(make_secure_study(), tmp_path)


STEPS = ["train", "secure_open"]


@pytest.mark.parametrize("when", ["killed_before", "killed_after"])
@pytest.mark.parametrize("step", STEPS)
def test_server_killed_at_a_step_opens_the_same_sum_and_nobody_masks_again(
    consortium: Consortium, step: str, when: str
) -> None:
    setattr(consortium, when, step)
    with pytest.raises(ServerKilledError):
        consortium.server()("train", 1)
    setattr(consortium, when, "")
    consortium.asked.clear()
    summed = consortium.server()("train", 1)
    assert summed.sites == SITES
    assert consortium.vectors == [1] * 5
    assert "secure_advertise" not in consortium.asked


@pytest.mark.parametrize("when", ["killed_before", "killed_after"])
@pytest.mark.parametrize("step", ["secure_vote", "secure_open"])
def test_survivors_that_were_named_are_named_again_though_the_others_are_back(
    consortium: Consortium, step: str, when: str
) -> None:
    consortium.away = {("west", "train")}
    setattr(consortium, when, step)
    with pytest.raises(ServerKilledError):
        consortium.server()("train", 1)
    setattr(consortium, when, "")
    consortium.away.clear()
    summed = consortium.server()("train", 1)
    assert summed.sites == ("north", "south", "east", "centre")
    assert consortium.vectors == [1, 1, 0, 1, 1]


def test_a_whole_round_is_asked_again_when_its_checkpoint_was_not_written(consortium: Consortium) -> None:
    """Keys are made twice in it: twelve answers of each site lie between two checkpoints, and none may be missing."""
    server = consortium.server()
    consortium.away = {("west", "train")}
    server("train", 1)
    consortium.away.clear()
    server("evaluate", 1)
    before = [site.vectors.copy() for site in consortium.sites.values()]
    consortium.asked.clear()
    again = consortium.server()
    assert again("train", 1).sites == ("north", "south", "east", "centre")
    assert again("evaluate", 1).sites == SITES
    assert [site.vectors for site in consortium.sites.values()] == before
    assert consortium.asked == ["train", "secure_vote", "secure_open", "evaluate", "secure_open"]


def test_a_round_with_votes_twice_fits_into_what_a_site_stores(consortium: Consortium) -> None:
    server = consortium.server()
    for action in ("train", "evaluate"):
        consortium.away = {("west", action)}
        server(action, 1)
    masked = consortium.vectors
    again = consortium.server()
    for action in ("train", "evaluate"):
        assert again(action, 1).sites == ("north", "south", "east", "centre")
    assert consortium.vectors == masked


def test_a_round_that_too_few_answered_in_time_is_asked_again_once_and_then_anew(consortium: Consortium) -> None:
    consortium.away = {(site, "train") for site in ("west", "east", "centre")}
    with pytest.raises(RoundError):
        consortium.server()("train", 1)
    with pytest.raises(RoundError):
        consortium.server()("train", 1)
    assert consortium.vectors == [1, 1, 0, 0, 0]
    consortium.away.clear()
    assert consortium.server()("train", 1).sites == SITES
    assert consortium.vectors == [2, 2, 1, 1, 1]
    assert consortium.asked.count("secure_advertise") == 2


def test_sites_that_are_back_in_time_make_the_round_whole_at_no_second_vector(consortium: Consortium) -> None:
    consortium.away = {(site, "train") for site in ("west", "east", "centre")}
    with pytest.raises(RoundError):
        consortium.server()("train", 1)
    consortium.away.clear()
    assert consortium.server()("train", 1).sites == SITES
    assert consortium.vectors == [1] * 5


def test_too_few_shares_are_asked_for_again_before_the_round_is_lost(consortium: Consortium) -> None:
    consortium.away = {(site, "secure_open") for site in ("west", "east", "centre")}
    with pytest.raises(LostRoundError):
        consortium.server()("train", 1)
    assert consortium.asked.count("secure_open") == 2
    assert consortium.vectors == [1] * 5


def test_sites_that_stored_no_answer_are_asked_for_new_vectors_at_once(consortium: Consortium) -> None:
    """A second vector under the same masks is never given: a site refuses, and new keys are made."""
    consortium.killed_after = "train"
    with pytest.raises(ServerKilledError):
        consortium.server()("train", 1)
    consortium.killed_after = ""
    for site in SITES:
        consortium.sites[site].replies = ReplyStore(consortium.folder / site / "empty")
    assert consortium.server()("train", 1).sites == SITES
    assert consortium.vectors == [2] * 5


def test_site_killed_between_masking_and_storing_masks_nothing_more_and_is_in_no_sum(
    consortium: Consortium, monkeypatch: pytest.MonkeyPatch
) -> None:
    north = consortium.sites["north"]

    def killed(*_: object) -> None:
        raise SecureAggregationError("nobody hears this")

    with monkeypatch.context() as patched:
        patched.setattr(north.replies, "keep", lambda question, reply: north.vectors and killed())
        consortium.killed_after = "train"
        with pytest.raises(ServerKilledError):
            consortium.server()("train", 1)
    consortium.killed_after = ""
    assert consortium.server()("train", 1).sites == ("south", "west", "east", "centre")
    assert consortium.vectors == [1] * 5


def test_another_model_or_round_is_another_question(consortium: Consortium) -> None:
    server = consortium.server()
    server("train", 1)
    stored = AskedSums(consortium.folder / ASKED_SUMS, consortium.plan)
    assert consortium.channel is not None
    asked = stored.find(channel=consortium.channel.digest, model=MODEL.digest)
    assert asked is not None
    assert (asked.round, asked.survivors) == (1, SITES)
    assert stored.find(channel=consortium.channel.digest, model=bytes(32)) is None
    assert stored.find(channel=bytes(32), model=MODEL.digest) is None
    server("train", 2)
    later = AskedSums(consortium.folder / ASKED_SUMS, consortium.plan)
    assert later.find(channel=asked.start.channel, model=MODEL.digest) is None  # its checkpoint was written


def test_another_plan_asks_nothing_again_and_a_damaged_file_is_refused(consortium: Consortium) -> None:
    consortium.server()("train", 1)
    path = consortium.folder / ASKED_SUMS
    assert consortium.channel is not None
    other = replace(consortium.plan, scope="pooled")
    assert AskedSums(path, other).find(channel=consortium.channel.digest, model=MODEL.digest) is None
    whole = path.read_bytes()
    for damaged in (whole[:-1], whole[:100], b"", whole.replace(b'"round":1', b'"round":2')):
        path.write_bytes(damaged)
        with pytest.raises(CheckpointError, match="restore the file, or remove it"):
            AskedSums(path, consortium.plan)


@pytest.mark.parametrize("kept", ["nothing", "an older file"])
def test_a_lost_or_older_file_asks_anew_and_is_charged_again(consortium: Consortium, kept: str) -> None:
    """What the refusal of a damaged file says of removing it: the round goes on, with new keys and a new vector."""
    path = consortium.folder / ASKED_SUMS
    server = consortium.server()
    server("train", 1)
    older = path.read_bytes()
    consortium.killed_after = "train"
    with pytest.raises(ServerKilledError):
        server("train", 2)
    consortium.killed_after = ""
    path.unlink()
    if kept == "an older file":
        path.write_bytes(older)
    assert consortium.server()("train", 2).sites == SITES
    assert consortium.vectors == [3] * 5


def test_what_cannot_be_written_down_is_not_asked(consortium: Consortium) -> None:
    (consortium.folder / f".{ASKED_SUMS}.partial").mkdir()
    with pytest.raises(CheckpointError, match="make room, and resume"):
        consortium.server()("train", 1)
    assert "train" not in consortium.asked


def test_a_header_names_the_question() -> None:
    """What this file takes for a question is what the client app takes: the header has no time and no run in it."""
    first, second = (RoundInstruction(study_digest="ab" * 32, round=1).model_dump_json() for _ in range(2))
    assert first == second
