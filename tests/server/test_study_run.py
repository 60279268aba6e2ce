"""How often and how long a study is tried, and what its status file says meanwhile."""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path

import pytest

import server.study_run
from medfed.errors import CheckpointError, LinkDownError, PolicyError, RoundError
from medfed.study import StudyConfig
from server.run_status import StatusBoard, read_status
from server.study_run import Patience, first_status, run_study


@pytest.fixture
def attempt(make_study: Callable[..., StudyConfig], tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Runs a study whose tries end as listed: an error, or None for the end; the pauses between them.

    ``rounds`` are the completed rounds before and after each try.
    """
    study = make_study()

    def run(*ends: BaseException | None, rounds: list[int] | None = None, tries: int = 3) -> list[float]:
        ending, completed, pauses = iter(ends), iter(rounds or [0] * 100), list[float]()

        def one_try(*_: object, **__: object) -> None:
            if (error := next(ending)) is not None:
                raise error

        class Stop(threading.Event):
            def wait(self, timeout: float | None = None) -> bool:
                pauses.append(timeout or 0.0)
                return False

        monkeypatch.setattr(server.study_run, "_one_try", one_try)
        monkeypatch.setattr(server.study_run, "_completed_rounds", lambda *_: next(completed))
        monkeypatch.setattr(server.study_run, "write_run_results", lambda *_: None)
        board = StatusBoard(tmp_path, first_status(study, "brains"))
        run_study(
            study, {}, None, board, folder=tmp_path, patience=Patience(tries=tries, pause_s=5.0), stop=Stop()  # type: ignore[arg-type]
        )  # fmt: skip
        return pauses

    return run


def test_a_try_that_fails_is_followed_by_another_after_a_pause_that_doubles(attempt, tmp_path: Path) -> None:
    assert attempt(RoundError("a"), LinkDownError("b"), None) == [5.0, 10.0]
    status = read_status(tmp_path)
    assert (status.phase, status.reason, status.tries) == ("finished", "", 3)


def test_a_study_is_given_up_after_tries_in_a_row_that_complete_no_round(attempt, tmp_path: Path) -> None:
    with pytest.raises(RoundError, match="^third$"):
        attempt(RoundError("first"), RoundError("second"), RoundError("third"))
    status = read_status(tmp_path)
    assert (status.phase, status.reason, status.tries) == ("failed", "third", 3)


def test_a_try_that_completed_a_round_counts_anew(attempt) -> None:
    ends = [RoundError(str(number)) for number in range(4)]
    # before and after each try: the third completes a round
    assert attempt(*ends, None, rounds=[0, 0, 0, 0, 0, 1, 1, 1, 1]) == [5.0, 10.0, 5.0, 10.0]


def test_what_another_try_does_not_mend_ends_the_run_at_once(attempt, tmp_path: Path) -> None:
    with pytest.raises(PolicyError):
        attempt(PolicyError("no"), None)
    assert read_status(tmp_path).phase == "failed"
    with pytest.raises(KeyboardInterrupt):
        attempt(KeyboardInterrupt(), None)
    status = read_status(tmp_path)
    assert (status.phase, status.reason) == (
        "paused",
        "stopped by the coordinator; go on with 'medfed server resume'",
    )


def test_a_status_file_is_whole_or_refused(attempt, tmp_path: Path) -> None:
    attempt(None)
    content = (tmp_path / "status.json").read_bytes()
    for broken in (b"", content[:-3], content.replace(b'"tries"', b'"trials"'), b"[]"):
        (tmp_path / "status.json").write_bytes(broken)
        with pytest.raises(CheckpointError, match="begin one with 'medfed server run'"):
            read_status(tmp_path)


def test_a_board_counts_what_sites_answer_and_nothing_of_strangers(attempt, tmp_path: Path) -> None:
    attempt(None)
    board = StatusBoard(tmp_path, read_status(tmp_path))
    board.sent("north", 10)
    board.answered("north", action="train", round=2, payload_bytes=7, epsilon=0.5)
    board.answered("north", action="describe", round=0, payload_bytes=1, refusal="PolicyError: no")
    board.answered("stranger", action="train", round=9, payload_bytes=7)
    board.online(["south"])
    board.completed(1, 1.23456)
    status = read_status(tmp_path)
    north = status.sites["north"]
    assert (north.round, north.answers, north.refusals, north.bytes_sent, north.bytes_received) == (2, 2, 1, 10, 8)
    assert (north.epsilon, north.last_refusal, north.is_online) == (0.5, "PolicyError: no", False)
    assert status.sites["south"].is_online
    assert (status.round, status.round_seconds) == (1, 1.235)
    assert "stranger" not in status.sites
