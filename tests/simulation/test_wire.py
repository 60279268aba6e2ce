"""What is on the wire: a whole simulation is recorded and searched."""

from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import pytest
from flwr.app import ConfigRecord, Message

from medfed.messages import RECORD_KEY, RoundReply
from medfed.payload import HEADER_BYTES
from medfed.study import StudyConfig
from simulation.grid import InProcessGrid
from simulation.harness import simulate
from simulation.run_folder import stored_study


@pytest.fixture
def recorded(monkeypatch: pytest.MonkeyPatch) -> tuple[list[Message], list[Message]]:
    """Every instruction and every reply that passes a grid."""
    sent: list[Message] = []
    came: list[Message] = []
    original = InProcessGrid.send_and_receive

    def record(self: InProcessGrid, messages: Iterable[Message], *, timeout: float | None = None) -> list[Message]:
        outgoing = list(messages)
        sent.extend(outgoing)
        replies = original(self, outgoing, timeout=timeout)
        came.extend(replies)
        return replies

    monkeypatch.setattr(InProcessGrid, "send_and_receive", record)
    return sent, came


def values_of(messages: list[Message]) -> Iterator[tuple[str, str | bytes]]:
    for message in messages:
        assert list(message.content) == [RECORD_KEY]
        record = message.content[RECORD_KEY]
        assert isinstance(record, ConfigRecord)
        for key, value in record.items():
            assert isinstance(value, (str, bytes))
            yield key, value


@pytest.mark.usefixtures("without_pictures")
def test_replies_hold_a_header_and_one_payload_and_name_no_patient_and_no_file(
    recorded: tuple[list[Message], list[Message]],
    make_study: Callable[..., StudyConfig],
    study_file: Callable[[StudyConfig], Path],
    tmp_path: Path,
) -> None:
    run = simulate(study_file(make_study()), out=tmp_path / "runs", workers=0)
    manifest = stored_study(run.folder).resolved_manifest
    payload_bytes = HEADER_BYTES + 4 * manifest.num_elements
    sent, came = recorded
    assert len(sent) == len(came) > 20
    seen: dict[str, set[int]] = {"header": set(), "adapter": set(), "secure": set()}
    for key, value in values_of(came):
        assert key in seen
        seen[key].add(len(value))
        text = value if isinstance(value, bytes) else value.encode()
        for secret in (b"north-", b"south-", b".nii", str(tmp_path).encode()):
            assert secret not in text
    assert seen["adapter"] == {0, payload_bytes}
    assert seen["secure"] == {0}
    assert max(seen["header"]) < 1000
    for key, value in values_of(came):
        if key == "header":
            RoundReply.parse({"header": value})


@pytest.mark.usefixtures("without_pictures")
def test_instructions_hold_the_study_and_the_adapter_and_no_weights(
    recorded: tuple[list[Message], list[Message]],
    make_study: Callable[..., StudyConfig],
    study_file: Callable[[StudyConfig], Path],
    tmp_path: Path,
) -> None:
    run = simulate(study_file(make_study()), out=tmp_path / "runs", workers=0, baselines=False)
    study = stored_study(run.folder)
    sent, _ = recorded
    sizes = {(key, len(value)) for key, value in values_of(sent)}
    payload_bytes = HEADER_BYTES + 4 * study.resolved_manifest.num_elements
    assert {size for key, size in sizes if key == "adapter"} == {0, payload_bytes}
    assert {size for key, size in sizes if key == "study"} == {len(study.canonical)}
    assert {key for key, _ in sizes} == {"header", "study", "adapter", "broadcast", "secure"}
