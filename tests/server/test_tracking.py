"""Trackers are told every number of every round once, and a study without one is as it was."""

import json
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from medfed.errors import MissingExtraError, StudyError
from medfed.study import StudyConfig, parse_study
from server.tracking import tell, tracker_of

MakeStudy = Callable[..., StudyConfig]


class Told:
    def __init__(self) -> None:
        self.scalars: list[tuple[str, float, int]] = []

    def scalar(self, name: str, value: float, step: int) -> None:
        self.scalars.append((name, value, step))

    def close(self) -> None:
        pass


def line(event: str, number: int, site: str = "north", **metrics: float) -> str:
    return json.dumps({"event": event, "scope": "federated", "round": number, "site": site, **metrics})


def test_every_line_is_told_once_however_often_a_run_is_resumed(tmp_path: Path) -> None:
    told, lines = Told(), [line("evaluate", 0, dice=0.5, num_examples=3)]
    tell(told, tmp_path, lines)
    lines += [line("train", 1, loss=0.7), line("train", 1, "south", loss=0.9)]
    tell(told, tmp_path, lines)
    tell(told, tmp_path, lines)
    assert told.scalars == [
        ("evaluate/north/dice", 0.5, 0),
        ("evaluate/north/num_examples", 3.0, 0),
        ("train/north/loss", 0.7, 1),
        ("train/south/loss", 0.9, 1),
    ]


def test_study_without_a_tracker_has_none_and_keeps_its_digest(make_study: MakeStudy, tmp_path: Path) -> None:
    study = make_study()
    assert tracker_of(study, tmp_path) is None
    assert b"tracking" not in study.canonical
    tracked = study.replace(tracking="tensorboard")
    assert tracked.digest != study.digest
    assert parse_study(tracked.canonical) == tracked


def test_tensorboard_shows_what_was_told(make_study: MakeStudy, tmp_path: Path) -> None:
    tracker = tracker_of(make_study().replace(tracking="tensorboard"), tmp_path)
    assert tracker is not None
    tell(tracker, tmp_path, [line("train", 1, loss=0.5), line("train", 2, loss=0.25)])
    tracker.close()
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert [(event.step, event.value) for event in events.Scalars("train/north/loss")] == [(1, 0.5), (2, 0.25)]


@pytest.mark.parametrize(
    ("extra", "module"), [("tensorboard", "torch.utils.tensorboard"), ("mlflow", "mlflow.tracking")]
)
def test_missing_tracker_says_what_to_install(
    make_study: MakeStudy, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, extra: str, module: str
) -> None:
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(MissingExtraError, match=rf"pip install 'medfed\[{extra}\]'"):
        tracker_of(make_study().replace(tracking=extra), tmp_path)


def test_unknown_tracker_is_refused(make_study: MakeStudy) -> None:
    with pytest.raises((StudyError, ValueError), match="tracking"):
        make_study().replace(tracking="carrier-pigeon")
