"""The round loop against sites that misbehave: scripted client apps on the in-process Grid."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from flwr.app import ConfigRecord, Context, Message, RecordDict
from flwr.clientapp import ClientApp

from medfed.adapter_manifest import AdapterManifest
from medfed.errors import CheckpointError, RoundError
from medfed.messages import RECORD_KEY, Refusal, RoundInstruction, RoundReply
from medfed.payload import decode_adapter, encode_adapter
from medfed.study import StudyConfig
from server.checkpoint import Checkpoint, read_checkpoint
from server.rounds import Federation, run_rounds
from simulation.grid import InProcessGrid

MANIFEST = AdapterManifest.of({"a": torch.zeros(2), "b": torch.zeros(1)}, method="lora", rank=1)
SITES = ("north", "south", "west")


def study(**rounds: Any) -> StudyConfig:
    return StudyConfig.model_validate(
        {
            "name": "scripted",
            "seed": 1,
            "backbone": {"name": "none", "sha256": "0" * 64},
            "adapter": {"rank": 1, "alpha": 1.0, "targets": "x"},
            "task": {"kind": "segmentation", "classes": ["c"]},
            "training": {"local_epochs": 1, "batch_size": 1, "learning_rate": 1.0},
            "rounds": {"num_rounds": 3, **rounds},
            "sites": [{"name": site, "data": "x"} for site in SITES],
            "manifest": MANIFEST.model_dump(),
        }
    )


def app_of(script: Callable[[str, str, RoundInstruction], Any]) -> ClientApp:
    """A client app in which site i adds i + 1 to every element, unless the script says otherwise.

    The script gets (site, action, instruction); it may return None (behave), raise, or return a
    ``(reply, payload)`` pair.
    """
    app = ClientApp()

    def answer(message: Message, context: Context, action: str) -> Message:
        index = int(context.node_config["partition-id"])
        site, fields = SITES[index], message.content[RECORD_KEY]
        instruction = RoundInstruction.parse({"header": str(fields["header"])})
        header = {
            "site": site,
            "study_digest": instruction.study_digest,
            "round": instruction.round,
            "attempt": instruction.attempt,
            "num_examples": 10 * (index + 1),
            "metrics": {"dice": 0.5},
        }
        payload = b""
        if action == "train":
            decode_adapter(bytes(fields["adapter"]), MANIFEST)
            payload = encode_adapter(torch.full((3,), float(index + 1)), MANIFEST)
        scripted = script(site, action, instruction)
        if scripted is not None:
            changes, payload = scripted
            header |= changes
        reply = RoundReply(**header)
        return Message(RecordDict({RECORD_KEY: ConfigRecord(dict(reply.to_fields(adapter=payload)))}), reply_to=message)

    @app.query("describe")
    def describe(message: Message, context: Context) -> Message:
        return answer(message, context, "describe")

    @app.train()
    def train(message: Message, context: Context) -> Message:
        return answer(message, context, "train")

    @app.evaluate()
    def evaluate(message: Message, context: Context) -> Message:
        return answer(message, context, "evaluate")

    return app


def run(folder: Path, script: Callable[..., Any] = lambda *_: None, **rounds: Any) -> Checkpoint:
    config = study(**rounds)
    federation = Federation("federated", SITES, SITES, config.quorum)
    with InProcessGrid(app_of(script), node_configs=[{}] * 3, run_config={}) as grid:
        return run_rounds(grid, config, federation, initial_P=torch.zeros(3), folder=folder)


MEAN = (1 * 10 + 2 * 20 + 3 * 30) / 60


def test_rounds_add_the_weighted_mean_of_the_sites(tmp_path: Path) -> None:
    final = run(tmp_path)
    assert final.round == 3
    assert final.adapter_P.tolist() == pytest.approx([3 * MEAN] * 3)
    events = [(line["event"], line["round"], line["site"]) for line in map(json.loads, final.metrics)]
    assert events[:3] == [("evaluate", 0, site) for site in SITES]
    assert events[3:6] == [("train", 1, site) for site in SITES]
    assert events[-3:] == [("evaluate", 3, site) for site in SITES]


def test_uniform_weighting_ignores_the_number_of_images(tmp_path: Path) -> None:
    config = study().replace(strategy={"name": "fedit", "weighting": "uniform"})
    federation = Federation("federated", SITES, (), 3)
    with InProcessGrid(app_of(lambda *_: None), node_configs=[{}] * 3, run_config={}) as grid:
        final = run_rounds(grid, config, federation, initial_P=torch.zeros(3), folder=tmp_path)
    assert final.adapter_P.tolist() == pytest.approx([3 * 2.0] * 3)


def test_stopped_run_goes_on_from_its_checkpoint_and_ends_the_same(tmp_path: Path) -> None:
    def dies_in_round_2(site: str, action: str, instruction: RoundInstruction) -> None:
        if action == "train" and instruction.round == 2 and site == "west":
            raise RuntimeError("power cut")

    with pytest.raises(RoundError, match="Round 2: expected updates of 3 sites, got 2; west: the site failed"):
        run(tmp_path / "stopped", dies_in_round_2)
    stopped = read_checkpoint(tmp_path / "stopped", MANIFEST, study_digest=study().digest, scope="federated")
    assert stopped is not None
    assert stopped.round == 1
    trained: list[int] = []

    def counts(site: str, action: str, instruction: RoundInstruction) -> None:
        if action == "train":
            trained.append(instruction.round)

    resumed = run(tmp_path / "stopped", counts)
    undisturbed = run(tmp_path / "undisturbed")
    assert sorted(set(trained)) == [2, 3]
    assert torch.equal(resumed.adapter_P, undisturbed.adapter_P)
    assert (tmp_path / "stopped/metrics.jsonl").read_bytes() == (tmp_path / "undisturbed/metrics.jsonl").read_bytes()


def test_quorum_carries_a_round_without_a_failing_site(tmp_path: Path) -> None:
    def west_fails(site: str, action: str, instruction: RoundInstruction) -> None:
        if (site, action) == ("west", "train"):
            raise RuntimeError("out of memory")

    final = run(tmp_path, west_fails, quorum=2)
    assert final.adapter_P.tolist() == pytest.approx([3 * (10 + 40) / 30] * 3)


@pytest.mark.parametrize(
    ("changes", "payload", "reason"),
    [
        ({"round": 7}, None, "another"),
        ({"attempt": 2}, None, "another"),
        ({"study_digest": "e" * 64}, None, "another"),
        ({"site": "north"}, None, "'west', got one of 'north'"),
        ({}, b"", "at least 64 bytes"),
        ({}, b"MFAP" + bytes(100), "version"),
        ({"refusal": {"kind": "DataError", "reason": "broken"}}, b"", "DataError: broken"),
    ],
)
def test_wrong_reply_counts_as_none_and_is_named(
    tmp_path: Path, changes: dict[str, Any], payload: bytes | None, reason: str
) -> None:
    def wrong(site: str, action: str, instruction: RoundInstruction) -> Any:
        if (site, action) != ("west", "train"):
            return None
        return changes, payload if payload is not None else encode_adapter(torch.ones(3), MANIFEST)

    with pytest.raises(RoundError, match=reason):
        run(tmp_path / "strict", wrong)
    final = run(tmp_path / "quorum", wrong, quorum=2)
    assert final.adapter_P.tolist() == pytest.approx([3 * (10 + 40) / 30] * 3)


def test_non_finite_update_is_refused_with_its_tensor(tmp_path: Path) -> None:
    import struct
    import zlib

    def poisoned(site: str, action: str, instruction: RoundInstruction) -> Any:
        if (site, action) != ("west", "train"):
            return None
        good = bytearray(encode_adapter(torch.ones(3), MANIFEST))
        good[-4:] = struct.pack("<f", float("nan"))
        struct.pack_into("<I", good, 48, zlib.crc32(bytes(good[64:])))
        return {}, bytes(good)

    with pytest.raises(RoundError, match="'b'"):
        run(tmp_path, poisoned)


def test_site_that_cannot_serve_the_study_stops_the_run_before_it_starts(tmp_path: Path) -> None:
    def unready(site: str, action: str, instruction: RoundInstruction) -> Any:
        if (site, action) == ("south", "describe"):
            return {"refusal": Refusal(kind="WeightsError", reason="no weights").model_dump()}, b""
        return None

    with pytest.raises(RoundError, match="south: WeightsError: no weights"):
        run(tmp_path, unready)
    assert not (tmp_path / "checkpoint.safetensors").exists()


@pytest.mark.parametrize("action", ["describe", "train", "evaluate"])
def test_metric_of_another_name_is_refused(tmp_path: Path, action: str) -> None:
    def chatty(site: str, asked: str, instruction: RoundInstruction) -> Any:
        if (site, asked) != ("west", action):
            return None
        return {"metrics": {"patient-0042": 1.0}}, encode_adapter(torch.ones(3), MANIFEST)

    with pytest.raises(RoundError, match="patient-0042"):
        run(tmp_path, chatty)


def test_evaluation_without_a_site_is_no_evaluation(tmp_path: Path) -> None:
    def blind(site: str, action: str, instruction: RoundInstruction) -> None:
        if (site, action, instruction.round) == ("south", "evaluate", 3):
            raise RuntimeError("out of memory")

    with pytest.raises(RoundError, match="expected evaluations of 3 sites, south"):
        run(tmp_path, blind)
    resumed = run(tmp_path)
    assert sum('"evaluate"' in line for line in resumed.metrics) == 6


def test_metrics_file_is_repaired_on_resume(tmp_path: Path) -> None:
    run(tmp_path)
    whole = (tmp_path / "metrics.jsonl").read_bytes()
    (tmp_path / "metrics.jsonl").write_bytes(whole[:50])
    run(tmp_path)
    assert (tmp_path / "metrics.jsonl").read_bytes() == whole


def test_deadline_ends_a_round(tmp_path: Path) -> None:
    import time

    def slow(site: str, action: str, instruction: RoundInstruction) -> None:
        if (site, action) == ("south", "train"):
            time.sleep(0.6)

    with pytest.raises(RoundError, match=r"no reply within 0.5 s"):
        run(tmp_path, slow, deadline_s=0.5)


def test_checkpoint_of_another_study_is_not_continued(tmp_path: Path) -> None:
    run(tmp_path)
    with pytest.raises(CheckpointError):
        run(tmp_path, quorum=2)


def test_node_that_is_no_site_of_the_study_is_left_out(tmp_path: Path) -> None:
    config = study().replace(sites=[{"name": "north", "data": "x"}, {"name": "west", "data": "x"}])
    federation = Federation("federated", ("north", "west"), ("north",), 2)
    with InProcessGrid(app_of(lambda *_: None), node_configs=[{}] * 3, run_config={}) as grid:
        final = run_rounds(grid, config, federation, initial_P=torch.zeros(3), folder=tmp_path)
    assert final.adapter_P.tolist() == pytest.approx([3 * (10 + 90) / 40] * 3)
