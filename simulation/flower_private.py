"""The only place that touches names which Flower 1.41 does not promise to keep.

Everything else in ``simulation`` uses ``flwr.app``, ``flwr.clientapp`` and ``flwr.serverapp``. When Flower
moves one of the names below, ``tests/contracts/test_flower_private_names.py`` says which, and the mending
ends here.

Flower reads its two switches when it is imported (``flwr.supercore.telemetry`` keeps the value in a module
constant, and posts an event per simulated run unless it is "0"), so this module sets them first. A process
that imported ``flwr`` before ``simulation`` sets them itself.
"""

from __future__ import annotations

import os

os.environ.setdefault("FLWR_TELEMETRY_ENABLED", "0")
os.environ.setdefault("FLWR_DISABLE_UPDATE_CHECK", "1")

from typing import TYPE_CHECKING

from flwr.app import ArrayRecord, ConfigRecord, Error, Message, Metadata, MetricRecord, RecordDict
from flwr.common.constant import NUM_PARTITIONS_KEY, PARTITION_ID_KEY, SUPERLINK_NODE_ID, ErrorCode
from flwr.supercore.run import Run
from flwr.supercore.task_identity import TaskIdentity

if TYPE_CHECKING:
    from flwr.app import Context
    from flwr.clientapp import ClientApp
    from flwr.serverapp import ServerApp

__all__ = [
    "CLIENT_APP_CRASHED",
    "CLIENT_APP_RAISED",
    "NUM_PARTITIONS_KEY",
    "PARTITION_ID_KEY",
    "SERVER_NODE_ID",
    "Record",
    "Run",
    "empty_run",
    "message_like",
    "record_dict_like",
    "run_on_simulation_engine",
    "set_task_identity",
    "stamp",
]

Record = ArrayRecord | MetricRecord | ConfigRecord

SERVER_NODE_ID: int = SUPERLINK_NODE_ID
CLIENT_APP_RAISED: int = ErrorCode.CLIENT_APP_RAISED_EXCEPTION
CLIENT_APP_CRASHED: int = ErrorCode.CLIENT_APP_CRASHED

# Flower numbers the tasks of a run; its own single-process engine uses 1 for all of them, and so do we.
_ONLY_TASK_ID = 1


def set_task_identity(*, run_id: int, node_id: int) -> None:
    """Tell Flower who creates messages in this process from now on.

    ``Message(content, dst_node_id, message_type)`` takes its run, source node and task from this identity
    and raises ``RuntimeError`` without it; replies (``reply_to=``) take theirs from the message they answer.
    The identity is one per *process*, so in a process with several threads it is the server's.
    """
    TaskIdentity.run_id = run_id
    TaskIdentity.task_id = _ONLY_TASK_ID
    TaskIdentity.node_id = node_id


def stamp(message: Message, *, message_id: str, run_id: int) -> None:
    """Give ``message`` its id and run, which no public setter reaches; a SuperLink does the same."""
    metadata = message.metadata.__dict__
    metadata["_message_id"] = message_id
    metadata["_run_id"] = run_id


def message_like(message: Message, *, content: RecordDict | None, error: Error | None) -> Message:
    """Return a new message with a copy of the metadata of ``message`` and the content or error given."""
    # Field by field: the constructor's own checks take longer than all of this.
    metadata = Metadata.__new__(Metadata)
    metadata.__dict__.update(message.metadata.__dict__)
    twin = Message.__new__(Message)
    twin.__dict__.update(_metadata=metadata, _content=content, _error=error)
    return twin


def record_dict_like(records: RecordDict, content: dict[str, Record]) -> RecordDict:
    """Return a new ``RecordDict`` that holds ``content``: copies of what ``records`` holds, by the same names.

    Setting them one by one would check again the types of names and records that have passed the check.
    """
    twin = records.copy()
    twin.__dict__["_data"] = content
    return twin


def empty_run(run_id: int) -> Run:
    """Return the description of a run that has no application bundle: only its id means anything."""
    return Run.create_empty(run_id)


def run_on_simulation_engine(
    server_app: ServerApp,
    client_app: ClientApp,
    *,
    num_nodes: int,
    server_context: Context,
    app_directory: str,
    backend_config: dict[str, dict[str, str | int | float | bool]],
) -> Context:
    """Run both apps on Flower's own (Ray) engine and return the server's context.

    The public ``run_simulation`` cannot pass a run-config. The engine behind it can, in two pieces: the
    server's context is an argument, and every client reads ``[tool.flwr.app.config]`` of the
    ``pyproject.toml`` in ``app_directory`` (``is_app=True``), whether or not the apps come from there.
    """
    # Imported late: this module of Flower's pulls in its whole command line (0.5 s).
    from flwr.simulation.run_simulation import _run_simulation
    from flwr.supercore import telemetry
    from flwr.supercore.constant import NOOP_FEDERATION_ID

    telemetry.FLWR_TELEMETRY_ENABLED = "0"  # also where flwr was imported before the switch above was set

    run = empty_run(server_context.run_id)
    run.primary_task_id = _ONLY_TASK_ID
    run.federation_id = NOOP_FEDERATION_ID
    set_task_identity(run_id=run.run_id, node_id=SERVER_NODE_ID)
    result = _run_simulation(
        num_supernodes=num_nodes,
        exit_event=telemetry.EventType.PYTHON_API_RUN_SIMULATION_LEAVE,
        client_app=client_app,
        server_app=server_app,
        backend_name="ray",
        backend_config=backend_config,  # type: ignore[arg-type]  # its alias leaves out bool
        server_app_context=server_context,
        app_dir=app_directory,
        run=run,
        is_app=True,
    )
    return result.context
