"""A server and a client app that an engine must run alike; importable by name, for Ray's actors load them so."""

from __future__ import annotations

from flwr.app import ConfigRecord, Context, Message, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid, ServerApp

PATIENT_FILE = "/data/patient_0042.nii.gz"

client_app = ClientApp()
server_app = ServerApp()


@client_app.train()
def train(message: Message, context: Context) -> Message:
    """Count the calls of this node, and fail on partition 1 when told to."""
    calls = int(str(context.state["log"]["calls"])) + 1 if "log" in context.state else 1
    context.state["log"] = ConfigRecord({"calls": calls})
    if message.content["m"]["fail"] and context.node_config["partition-id"] == 1:
        raise FileNotFoundError(PATIENT_FILE)
    seen = {**context.run_config, **context.node_config, "calls": calls}
    return Message(RecordDict({"m": ConfigRecord({key: seen[key] for key in seen})}), reply_to=message)


@server_app.main()
def main(grid: Grid, context: Context) -> None:
    """Three rounds, the second with a failing site; what was seen goes to the context."""
    seen: list[str] = []
    for fail in (False, True, False):
        content = RecordDict({"m": ConfigRecord({"fail": fail})})
        replies = grid.send_and_receive([Message(content, node_id, "train") for node_id in grid.get_node_ids()])
        seen += sorted(
            repr(sorted(reply.content["m"].items())) if reply.has_content() else str(reply.error.reason)
            for reply in replies
        )
    context.state["seen"] = ConfigRecord({"replies": seen, "config": repr(sorted(context.run_config.items()))})
