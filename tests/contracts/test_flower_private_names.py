"""Flower still has every private name that the simulator and the two links build on, and it still means the same."""

from __future__ import annotations

import ast
import dataclasses
import hashlib
import importlib
import inspect
from pathlib import Path
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


LINKS = ("client/flower_link.py", "server/flower_link.py")
MEND_LINKS = "Flower changed a private name: mend the link that uses it, and WORKS_WITH in medfed/flower_version.py."


def imported_from_flower(path: str) -> list[tuple[str, str]]:
    """Every ``from flwr... import name`` of a file, those inside functions as well."""
    tree = ast.parse((Path(__file__).parents[2] / path).read_text())
    return [
        (node.module, name.name)
        for node in ast.walk(tree)
        if isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] == "flwr"
        for name in node.names
    ]


@pytest.mark.parametrize("path", LINKS)
def test_flower_still_has_every_name_that_a_link_imports(path: str) -> None:
    used = imported_from_flower(path)
    assert len(used) > 15
    gone = [f"{module}.{name}" for module, name in used if not hasattr(importlib.import_module(module), name)]
    assert not gone, f"{gone}: {MEND_LINKS}"


def test_no_other_file_of_the_roles_uses_private_names_of_flower() -> None:
    public = {"flwr.app", "flwr.serverapp", "flwr.clientapp"}
    for folder in ("client", "server"):
        for file in (Path(__file__).parents[2] / folder).glob("*.py"):
            if file.name != "flower_link.py":
                used = {module for module, _ in imported_from_flower(f"{folder}/{file.name}")}
                assert used <= public, (file.name, used - public)


@pytest.mark.parametrize(
    ("module", "name", "methods"),
    [
        ("flwr.supernode.fleet_http_client", "FleetHttpClient",
         "ActivateNode DeactivateNode PullMessages PullObject PushObject PushMessages GetRun SendNodeHeartbeat "
         "ConfirmMessageReceived from_server_address close"),
        ("flwr.supercore.control", "ControlHttpClient", "StartRun ListNodes RegisterNode from_server_address close"),
        ("flwr.supercore.runtime", "RuntimeHttpClient",
         "AcquireTask PullTaskInput PushTaskOutput GetNodes PushMessages PullMessages PushObject PullObject "
         "ConfirmMessageReceived SendTaskHeartbeat from_server_address close"),
    ],
)  # fmt: skip
def test_clients_still_have_the_routes_that_are_called(module: str, name: str, methods: str) -> None:
    client = getattr(importlib.import_module(module), name)
    gone = [method for method in methods.split() if not hasattr(client, method)]
    assert not gone, f"{name}.{gone}: {MEND_LINKS}"


@pytest.mark.parametrize(
    ("module", "name", "fields"),
    [
        ("fleet_pb2", "ActivateNodeRequest", {"public_key", "heartbeat_interval"}),
        ("fleet_pb2", "DeactivateNodeRequest", {"node_id"}),
        ("fleet_pb2", "PullMessagesRequest", {"node"}),
        ("fleet_pb2", "PullMessagesResponse", {"messages_list", "message_object_trees"}),
        ("fleet_pb2", "PushMessagesRequest",
         {"node", "messages_list", "message_object_trees", "clientapp_runtime_list"}),
        ("fleet_pb2", "PushMessagesResponse", {"objects_to_push", "session_id"}),
        ("message_pb2", "ConfirmMessageReceivedRequest", {"node", "run_id", "message_object_id"}),
        ("message_pb2", "PullObjectResponse", {"object_found", "object_available", "object_content"}),
        ("message_pb2", "PushObjectRequest", {"node", "run_id", "object_id", "object_content", "session_id"}),
        ("message_pb2", "PushObjectResponse", {"stored"}),
        ("runtime_pb2", "PushAppMessagesRequest", {"messages_list", "message_object_trees"}),
        ("runtime_pb2", "PushAppMessagesResponse", {"message_ids", "objects_to_push", "session_id"}),
        ("runtime_pb2", "PullAppMessagesResponse", {"messages_list", "message_object_trees"}),
        ("runtime_pb2", "AcquireTaskResponse", {"token", "task"}),
        ("runtime_pb2", "PullTaskInputResponse", {"task_id", "run", "context"}),
        ("runtime_pb2", "PushTaskOutputRequest", {"sub_status", "details"}),
        ("control_pb2", "StartRunRequest", {"fab"}),
        ("control_pb2", "ListNodesResponse", {"nodes_info"}),
        ("control_pb2", "RegisterNodeRequest", {"public_key", "name"}),
        ("node_pb2", "NodeInfo", {"node_id", "public_key", "status"}),
    ],
)  # fmt: skip
def test_messages_on_the_wire_still_have_the_fields_that_are_used(module: str, name: str, fields: set[str]) -> None:
    message = getattr(importlib.import_module(f"flwr.proto.{module}"), name)
    assert fields <= set(message.DESCRIPTOR.fields_by_name), MEND_LINKS


def test_the_number_of_a_part_is_still_the_digest_of_its_bytes(message: Message) -> None:
    from flwr.supercore.inflatable.inflatable_object import get_all_nested_objects

    parts = {number: part.deflate() for number, part in get_all_nested_objects(message).items()}
    assert parts
    assert all(hashlib.sha256(part).hexdigest() == number for number, part in parts.items()), MEND_LINKS


def test_a_superlink_still_takes_the_flags_that_are_given_to_it(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from flwr.superlink.cli.flower_superlink import _parse_superlink_lifespan_config

    given = [
        "flower-superlink", "--host", "127.0.0.1", "--port", "1", "--ssl-certfile", "a", "--ssl-keyfile", "b",
        "--ssl-ca-certfile", "c", "--database", ":flwr-in-memory:", "--isolation", "process",
        "--superexec-auth-secret-file", "d", "--enable-supernode-auth", "--disable-runtime-dependency-installation",
        "--health-server-address", "127.0.0.1:2",
    ]  # fmt: skip
    monkeypatch.setattr("sys.argv", [*given, "--no-such-flag"])
    with pytest.raises(SystemExit):
        _parse_superlink_lifespan_config()
    assert "unrecognized arguments: --no-such-flag\n" in capsys.readouterr().err, MEND_LINKS
