"""Flower still has every private name that ``simulation/flower_private.py`` builds on, and it still means the same."""

from __future__ import annotations

import dataclasses
import importlib
import inspect
from typing import Any

import pytest

from simulation import flower_private

# isort: split
from flwr.app import ConfigRecord, Error, Message, RecordDict

MEND = "Flower changed a private name: mend simulation/flower_private.py, then this list."

USED_NAMES = [
    ("flwr.common.constant", "PARTITION_ID_KEY"),
    ("flwr.common.constant", "NUM_PARTITIONS_KEY"),
    ("flwr.common.constant", "SUPERLINK_NODE_ID"),
    ("flwr.common.constant", "ErrorCode"),
    ("flwr.supercore.constant", "NOOP_FEDERATION_ID"),
    ("flwr.supercore.run", "Run"),
    ("flwr.supercore.task_identity", "TaskIdentity"),
    ("flwr.supercore.telemetry", "FLWR_TELEMETRY_ENABLED"),
    ("flwr.supercore.telemetry", "EventType"),
    ("flwr.simulation.run_simulation", "_run_simulation"),
]


@pytest.fixture
def message() -> Message:
    flower_private.set_task_identity(run_id=7, node_id=flower_private.SERVER_NODE_ID)
    return Message(RecordDict({"m": ConfigRecord({"x": 1})}), 1000, "train")


@pytest.mark.parametrize(("module", "name"), USED_NAMES)
def test_flower_still_has_the_private_name(module: str, name: str) -> None:
    assert hasattr(importlib.import_module(module), name), f"{module}.{name} is gone. {MEND}"


def test_constants_still_have_the_values_that_client_apps_read() -> None:
    values = (
        flower_private.PARTITION_ID_KEY,
        flower_private.NUM_PARTITIONS_KEY,
        flower_private.SERVER_NODE_ID,
    )
    assert values == ("partition-id", "num-partitions", 1), MEND


def test_error_codes_still_tell_a_failed_client_from_a_crashed_one() -> None:
    assert (flower_private.CLIENT_APP_RAISED, flower_private.CLIENT_APP_CRASHED) == (2, 8), MEND


def test_message_takes_run_and_source_from_the_task_identity(message: Message) -> None:
    assert message.metadata.run_id == 7, MEND
    assert message.metadata.src_node_id == flower_private.SERVER_NODE_ID, MEND


def test_task_identity_has_the_three_fields_we_set_and_no_other() -> None:
    identity: Any = importlib.import_module("flwr.supercore.task_identity").TaskIdentity
    fields = {name for name in vars(identity) if not name.startswith("__")}
    assert fields == {"_run_id", "_task_id", "_node_id"}, MEND


def test_stamp_reaches_the_fields_that_message_id_and_run_id_read(message: Message) -> None:
    flower_private.stamp(message, message_id="abc", run_id=9)
    assert (message.metadata.message_id, message.metadata.run_id) == ("abc", 9), MEND
    assert Message(RecordDict(), reply_to=message).metadata.reply_to_message_id == "abc", MEND


def test_message_like_copies_metadata_and_takes_new_content(message: Message) -> None:
    twin = flower_private.message_like(message, content=RecordDict(), error=None)
    assert twin.metadata == message.metadata, MEND
    assert twin.metadata is not message.metadata, MEND
    assert len(twin.content) == 0, MEND
    assert flower_private.message_like(message, content=None, error=Error(2, "E")).error.reason == "E", MEND


def test_empty_run_can_be_copied_field_by_field() -> None:
    run = flower_private.empty_run(5)
    assert dataclasses.is_dataclass(run), MEND
    assert flower_private.Run(**vars(run)) == run, MEND


def test_simulation_engine_still_takes_what_we_pass() -> None:
    engine = importlib.import_module("flwr.simulation.run_simulation")._run_simulation
    passed = {
        "num_supernodes", "exit_event", "client_app", "server_app", "backend_name", "backend_config",
        "server_app_context", "app_dir", "run", "is_app",
    }  # fmt: skip
    missing = passed - set(inspect.signature(engine).parameters)
    assert not missing, f"_run_simulation has no {sorted(missing)}. {MEND}"


def test_client_run_config_is_still_read_from_the_app_directory(tmp_path: Any) -> None:
    from simulation.ray_engine import _APP_FILE_HEAD, _toml_lines

    run_config = {
        "study": 'q"\\\n\x7f\u00e9\U0001f600',
        "lr": 1e-5,
        "big": 1e16,
        "n": -3,
        "on": True,
        "a.b": "c",
    }
    (tmp_path / "pyproject.toml").write_text(_APP_FILE_HEAD + _toml_lines(run_config), encoding="utf-8")
    read = importlib.import_module("flwr.common.config").get_fused_config_from_dir(tmp_path, {})
    assert read == run_config, MEND
