"""A measuring process runs on one thread, answers line by line, and says why it failed."""

from collections.abc import Callable
from pathlib import Path

import pytest

from simulation.bench.one_thread import answers

Ask = Callable[..., list[dict[str, object]]]


@pytest.fixture
def ask(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Ask:
    """Runs the given lines of Python as a module."""
    monkeypatch.setitem(answers.__globals__["ENVIRONMENT"], "PYTHONPATH", str(tmp_path))

    def run(code: str, *question: str) -> list[dict[str, object]]:
        (tmp_path / "asked.py").write_text(code)
        return list(answers("asked", *question))

    return run


@pytest.mark.process
def test_lines_are_answers(ask: Ask) -> None:
    assert ask("import sys\nfor word in sys.argv[1:]: print('{\"word\": \"' + word + '\"}')", "a", "b") == [
        {"word": "a"},
        {"word": "b"},
    ]


@pytest.mark.process
def test_process_has_one_thread(ask: Ask) -> None:
    (answer,) = ask("import json, torch\nprint(json.dumps({'threads': torch.get_num_threads()}))")
    assert answer == {"threads": 1}


@pytest.mark.process
def test_process_that_fails_says_why(ask: Ask) -> None:
    with pytest.raises(RuntimeError, match="no such thing"):
        ask("raise SystemExit('no such thing')")
