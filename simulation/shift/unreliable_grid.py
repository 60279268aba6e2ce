"""A Grid some of whose nodes miss rounds: it asks another one, without them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from simulation.flower_private import Run
from simulation.shift.availability import Absence, Attendance

# isort: split
from flwr.app import Message, RecordDict
from flwr.serverapp import Grid

_TRAIN = "train"


class UnreliableGrid(Grid):
    """What one federation sees of a grid when sites miss rounds of training.

    A message to a site that is away is never sent. A message to one that is late is sent and answered, and the answer
    is not handed on. Either way the server gets no reply, and its quorum decides. Everything but training goes
    through: sites describe themselves, evaluate, and help to open sums; so under secure aggregation a missing site is
    one that drops out after keys were exchanged.

    Only :meth:`send_and_receive` does so, which is what the round loop uses.

    Args:
        inner: the grid that carries messages; may serve other federations meanwhile.
        site_of: name of the site at each node.
        missing: who is missing from which round.
    """

    def __init__(self, inner: Grid, *, site_of: Mapping[int, str], missing: Attendance) -> None:
        self._inner = inner
        self._site_of = site_of
        self._missing = missing

    def send_and_receive(self, messages: Iterable[Message], *, timeout: float | None = None) -> list[Message]:
        """Send what is not for a site that is away, and return the replies that are not late."""
        sent = [message for message in messages if self._absence(message) != "away"]
        late = {message.metadata.dst_node_id for message in sent if self._absence(message) == "late"}
        replies = self._inner.send_and_receive(sent, timeout=timeout)
        return [reply for reply in replies if reply.metadata.src_node_id not in late]

    def _absence(self, message: Message) -> Absence | None:
        if message.metadata.message_type != _TRAIN:
            return None
        return self._missing.get((int(message.metadata.group_id), self._site_of.get(message.metadata.dst_node_id, "")))

    def set_run(self, run: Run) -> None:
        """As the inner grid."""
        self._inner.set_run(run)

    @property
    def run(self) -> Run:
        """As the inner grid."""
        return self._inner.run

    def create_message(
        self, content: RecordDict, message_type: str, dst_node_id: int, group_id: str, ttl: float | None = None
    ) -> Message:
        """As the inner grid."""
        return self._inner.create_message(content, message_type, dst_node_id, group_id, ttl)

    def get_node_ids(self) -> Iterable[int]:
        """As the inner grid."""
        return self._inner.get_node_ids()

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        """As the inner grid."""
        return self._inner.push_messages(messages)

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        """As the inner grid."""
        return self._inner.pull_messages(message_ids)
