"""The inbox and the stored replies: whole or not there, private, and never a reason to train twice."""

from __future__ import annotations

import stat
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from client.flower_link import Delivery
from client.inbox import Inbox
from client.reply_store import ReplyStore, question_digest
from medfed.errors import SiteError
from medfed.framed_file import DamagedFileError, pack, unpack

MESSAGE = Delivery("ab" * 32, 2**63 + 5, 1.5e9, 60.0, {"ab" * 32: b"\x00\xff" * 50, "cd" * 32: b""})


def test_a_message_is_found_again_with_its_number_of_tries(tmp_path: Path) -> None:
    assert Inbox(tmp_path / "in").begin(MESSAGE).tries == 1
    for tries in (2, 3):
        pending = Inbox(tmp_path / "in").pending()
        assert pending is not None
        assert (pending.delivery, pending.tries) == (MESSAGE, tries)
    assert stat.S_IMODE((tmp_path / "in" / "message").stat().st_mode) == 0o600
    assert stat.S_IMODE((tmp_path / "in").stat().st_mode) == 0o700
    Inbox(tmp_path / "in").finish()
    assert Inbox(tmp_path / "in").pending() is None


def test_a_message_that_is_cut_short_or_changed_anywhere_is_dropped(tmp_path: Path) -> None:
    inbox, path = Inbox(tmp_path), tmp_path / "message"
    inbox.begin(MESSAGE)
    whole = path.read_bytes()
    for position in range(0, len(whole), 5):
        for content in (whole[:position], whole[:position] + bytes([whole[position] ^ 1]) + whole[position + 1 :]):
            path.write_bytes(content)
            assert inbox.pending() is None
            assert not path.exists()


def test_a_partial_file_of_a_killed_process_is_in_nobodys_way(tmp_path: Path) -> None:
    (tmp_path / ".message.partial").write_bytes(b"half")
    inbox = Inbox(tmp_path)
    assert inbox.pending() is None
    inbox.begin(MESSAGE)
    assert inbox.pending() is not None


@given(
    st.dictionaries(st.text(max_size=5), st.integers() | st.text(max_size=5), max_size=4),
    st.dictionaries(st.text(max_size=5), st.binary(max_size=20), max_size=4),
)
def test_a_framed_file_gives_back_what_was_packed(facts: dict[str, object], blobs: dict[str, bytes]) -> None:
    from medfed.canonical import canonical_bytes

    try:
        canonical_bytes(facts)
    except (ValueError, TypeError):
        return
    assert unpack(pack(facts, blobs)) == (facts, blobs)


@given(st.binary(max_size=200))
def test_other_bytes_are_no_framed_file(data: bytes) -> None:
    with pytest.raises(DamagedFileError):
        unpack(data)


def test_a_reply_comes_back_byte_for_byte_and_a_damaged_one_is_asked_for_anew(tmp_path: Path) -> None:
    store, reply = ReplyStore(tmp_path / "replies"), {"header": '{"a":1}', "adapter": b"\x00x", "secure": b""}
    question = question_digest("train", {"header": "h", "study": b"s"})
    assert store.stored(question) is None
    store.keep(question, reply)
    assert ReplyStore(tmp_path / "replies").stored(question) == reply
    (path,) = (tmp_path / "replies").iterdir()
    whole = path.read_bytes()
    for position in range(0, len(whole), 3):
        path.write_bytes(whole[:position] + bytes([whole[position] ^ 128]) + whole[position + 1 :])
        assert store.stored(question) is None
        path.write_bytes(whole[:position])
        assert store.stored(question) is None


def test_the_newest_replies_are_kept(tmp_path: Path) -> None:
    store = ReplyStore(tmp_path)
    questions = [question_digest("train", {"header": str(number)}) for number in range(16)]
    for question in questions:
        store.keep(question, {"header": question})
    assert [store.stored(question) is not None for question in questions] == [False] * 4 + [True] * 12


@given(st.dictionaries(st.sampled_from(["header", "study", "adapter"]), st.binary(max_size=4) | st.text(max_size=4)))
def test_a_question_is_its_action_its_fields_and_their_borders(fields: dict[str, str | bytes]) -> None:
    digest = question_digest("train", fields)
    assert digest == question_digest("train", dict(reversed(fields.items())))
    assert digest != question_digest("evaluate", fields)
    assert digest != question_digest("train", {**fields, "secure": b""})
    for name in fields:
        assert digest != question_digest("train", {**fields, name: b"other content"})


def test_a_full_disk_is_said_and_leaves_what_was_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import os

    inbox, store = Inbox(tmp_path / "in"), ReplyStore(tmp_path / "replies")
    inbox.begin(MESSAGE)
    before = (tmp_path / "in" / "message").read_bytes()

    def full(_: int) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(os, "fsync", full)
        with pytest.raises(SiteError, match="make room, nothing is lost"):
            inbox.begin(MESSAGE, 2)
        with pytest.raises(SiteError, match="make room"):
            store.keep("ab" * 32, {"header": "x"})
    assert (tmp_path / "in" / "message").read_bytes() == before
    assert store.stored("ab" * 32) is None
