"""An in-process Flower Grid: an unmodified ServerApp and ClientApp, no network, no Ray, no polling.

Messages run in the thread that sends them (``workers=0``) or in processes forked after the backbone is
loaded. Either way a message's path is the same: copied, given to the client app with the node's context,
and the copied reply handed to whoever sent it.

Who may touch what, when several round loops share one grid::

    round loop A --+                    +-- carrier thread 1 -- pipe -- worker process 1
                   +-- ready (a queue --+
    round loop B --+    of nodes)       +-- carrier thread 2 -- pipe -- worker process 2

A node with mail is in ``ready`` once, and only there until a carrier takes it; so one message per node runs
at a time, in the order sent, and no carrier waits for a node while another has work. A reply is a ``Future``
that only its sender holds: a reply nobody waits for any more is dropped with it.
"""

from __future__ import annotations

import gc
import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import Future, wait
from dataclasses import dataclass, field
from itertools import count
from queue import SimpleQueue
from types import TracebackType
from typing import Self

from medfed.errors import MedfedError
from simulation.client_call import call_client, copy_records, error_reply, isolated
from simulation.flower_private import (
    CLIENT_APP_CRASHED,
    NUM_PARTITIONS_KEY,
    PARTITION_ID_KEY,
    SERVER_NODE_ID,
    Run,
    empty_run,
    set_task_identity,
    stamp,
)
from simulation.worker_pool import ForkedWorker, WorkerDiedError, refuse_unsafe_fork

# isort: split
from flwr.app import Context, Message, RecordDict, UserConfig
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid, ServerApp

__all__ = ["FIRST_NODE_ID", "WORKER_DIED", "InProcessGrid"]

logger = logging.getLogger("medfed.simulation.grid")

FIRST_NODE_ID = 1000
"""Node id of the first site when sites are given as a sequence; site ``i`` is ``FIRST_NODE_ID + i``."""

WORKER_DIED = "worker died"
"""Reason of the error reply to a message whose worker process ended while it held the message."""

# What goes to a worker: a message and its node's state; what comes back: the reply and the new state.
_Work = tuple[Message, RecordDict]

_RUN_ID = 1
_CLOSE_GRACE_S = 5.0
_KILL_INTERVAL_S = 0.1


@dataclass(slots=True, eq=False)
class _Errand:
    """A message on its way, and the place where its reply will be."""

    message: Message
    reply: Future[Message] = field(default_factory=Future)


@dataclass(slots=True, eq=False)
class _Node:
    """A virtual site: what it knows, what it keeps, and what waits for it."""

    node_id: int
    node_config: UserConfig
    state: RecordDict = field(default_factory=RecordDict)
    turn: threading.Lock = field(default_factory=threading.Lock)  # held while a message runs in its sender
    mail: deque[_Errand] = field(default_factory=deque)  # workers only; guarded by the grid's lock
    scheduled: bool = False  # in the ready queue or with a carrier; guarded by the grid's lock


class InProcessGrid(Grid):
    """A Grid whose nodes live in this process or in forks of it; one instance may serve several threads.

    Results do not depend on ``workers``: replies come in the order of the messages, every node's
    ``Context.state`` is kept here, and workers compute as this process does. (Torch excepted where it is given
    several threads: workers use one, so run with ``OMP_NUM_THREADS=1`` to compare bits.)

    Flower's task identity is one per process: in a worker it is the node's, with ``workers=0`` the server's
    (replies do not use it).

    Not guaranteed: a client that keeps state outside its context (a global, a file) sees it shared by all
    nodes with ``workers=0`` and split at random over processes otherwise.

    Args:
        client_app: the app every node runs.
        node_configs: ``Context.node_config`` of each node, by node id or in site order. Flower's
            ``partition-id`` (position) and ``num-partitions`` are added.
        run_config: ``Context.run_config`` of the server and of every node.
        workers: 0 runs each message in the thread that sends it; N forks N processes at the first message,
            or at :meth:`start`. Load the backbone before that, and use it on no other thread meanwhile.
        on_reply: is called with every reply as it comes, from any thread, for progress; must not change it.

    Raises:
        ValueError: no nodes, a node id that is not above the server's, or ``workers < 0``.
    """

    def __init__(
        self,
        client_app: ClientApp,
        *,
        node_configs: Mapping[int, UserConfig] | Sequence[UserConfig],
        run_config: UserConfig,
        workers: int = 0,
        on_reply: Callable[[Message], None] | None = None,
    ) -> None:
        if workers < 0:
            raise ValueError(f"Expected workers >= 0, got {workers}.")
        self._client_app = client_app
        self._nodes = _nodes_from(node_configs)
        self._run_config = dict(run_config)
        self._num_workers = workers
        self._on_reply = on_reply
        self._workers: list[ForkedWorker[_Work, _Work]] = []
        self._carriers: list[threading.Thread] = []
        self._ready: SimpleQueue[_Node | None] = SimpleQueue()
        self._pushed: dict[str, _Errand] = {}
        self._message_ids = count(1)  # only drawn from in this process, where `next` is atomic
        self._lock = threading.Lock()
        self._closed = False
        self._frozen = False
        self.set_run(empty_run(_RUN_ID))

    # -- Flower's Grid contract --------------------------------------------------------------------------

    def set_run(self, run: Run) -> None:
        """Make ``run`` the run of all messages created in this process from now on."""
        self._run = run
        set_task_identity(run_id=run.run_id, node_id=SERVER_NODE_ID)

    @property
    def run(self) -> Run:
        """A copy of the run's description."""
        return Run(**vars(self._run))

    def create_message(
        self,
        content: RecordDict,
        message_type: str,
        dst_node_id: int,
        group_id: str,
        ttl: float | None = None,
    ) -> Message:
        """Return a new message; Flower keeps this method for old apps, ``Message(...)`` is the way."""
        return Message(content, dst_node_id, message_type, ttl=ttl, group_id=group_id)

    def get_node_ids(self) -> list[int]:
        """Return all node ids, in site order."""
        return list(self._nodes)

    def push_messages(self, messages: Iterable[Message]) -> list[str]:
        """Accept messages and return their new ids.

        With workers they start at once. Without, nothing runs before :meth:`pull_messages` asks for it.

        Raises:
            ValueError: a message is for an unknown node; no message of this call has started.
            MedfedError: the grid is closed, or workers cannot be forked here.
        """
        errands = [_Errand(message) for message in self._accept(messages)]
        with self._lock:
            self._pushed.update({errand.message.metadata.message_id: errand for errand in errands})
        if self._num_workers:
            self._hand_to_workers(errands)
        return [errand.message.metadata.message_id for errand in errands]

    def pull_messages(self, message_ids: Iterable[str]) -> list[Message]:
        """Return the finished replies to ``message_ids``, in that order and each once; never waits for workers.

        Without workers, messages that have not run yet run now. Unknown ids, and ids whose reply has been
        pulled, are passed over.
        """
        replies = []
        for message_id in message_ids:
            with self._lock:
                errand = self._pushed.get(message_id)
                if errand is None or (self._num_workers and not errand.reply.done()):
                    continue
                del self._pushed[message_id]
            reply = errand.reply.result() if self._num_workers else self._run_here(errand.message, deadline_s=None)
            assert reply is not None  # without a deadline none is late
            replies.append(reply)
        return replies

    def send_and_receive(self, messages: Iterable[Message], *, timeout: float | None = None) -> list[Message]:
        """Return the replies that came in time, in the order of their messages.

        Args:
            messages: what to send; a generator may reuse one ``RecordDict``, for each message is copied at once.
            timeout: seconds; None waits for all replies.

        Returns:
            | a message that, at the deadline, ...  | its reply        | the node's state |
            |---------------------------------------|------------------|------------------|
            | is done                               | returned         | kept             |
            | is running                            | dropped, later   | kept, later      |
            | has not started (or timeout <= 0)     | it is never run  | unchanged        |

            Where the client app failed, or its worker died, the reply carries an ``Error``.

        Raises:
            ValueError: a message is for an unknown node; nothing has run.
            MedfedError: the grid is closed, also while this call waits; or workers cannot be forked here.
        """
        self.start()
        deadline_s = None if timeout is None else time.monotonic() + timeout
        accepted = self._accept(messages)
        if not self._num_workers:
            replies = [self._run_here(message, deadline_s=deadline_s) for message in accepted]
            return [reply for reply in replies if reply is not None]
        errands = [_Errand(message) for message in accepted]
        self._hand_to_workers(errands)
        wait([errand.reply for errand in errands], timeout=_seconds_until(deadline_s))
        self._refuse_if_closed()  # closed meanwhile: what is missing was not late, it was given up
        for errand in errands:
            errand.reply.cancel()  # has an effect on those that have not started
        return [e.reply.result() for e in errands if e.reply.done() and not e.reply.cancelled()]

    # -- What Flower's Grid does not have ----------------------------------------------------------------

    def run_server_app(self, server_app: ServerApp) -> Context:
        """Run ``server_app`` on this grid and return its context; it has the run-config of the nodes."""
        context = Context(
            run_id=self._run.run_id,
            node_id=SERVER_NODE_ID,
            node_config={},
            state=RecordDict(),
            run_config=dict(self._run_config),
        )
        server_app(grid=self, context=context)
        return context

    def state_of(self, node_id: int) -> RecordDict:
        """Return a copy of what node ``node_id`` kept in ``Context.state`` after its last message."""
        return copy_records(self._node(node_id).state)

    def worker_pids(self) -> list[int]:
        """Return the process ids of the workers that run."""
        return [pid for worker in self._workers if (pid := worker.pid) is not None]

    def start(self) -> None:
        """Fork the workers now, from the calling thread; does nothing the second time.

        Call it after loading what the client app needs and before starting other threads. What exists by now
        is left out of garbage collections until :meth:`close`: visiting it again and again takes longer than
        many a message.

        Raises:
            MedfedError: the grid is closed, this platform cannot fork, or CUDA is in use.
        """
        with self._lock:
            self._refuse_if_closed()
            if not self._frozen:
                gc.freeze()
                self._frozen = True
            if self._carriers or not self._num_workers:
                return
            refuse_unsafe_fork()
            self._workers = [ForkedWorker(self._answer_in_worker) for _ in range(self._num_workers)]
            try:
                for worker in self._workers:
                    worker.start()
            except BaseException:
                for worker in self._workers:
                    worker.stop(deadline_s=0.0)
                self._workers = []
                raise
            self._carriers = [
                threading.Thread(target=self._carry, args=(worker,), name="medfed-carrier", daemon=True)
                for worker in self._workers
            ]
            for carrier in self._carriers:
                carrier.start()

    def close(self) -> None:
        """End the workers and wait for them; one that is still busy after a grace time is killed.

        Messages that have not started are never run and get no reply; a message whose worker is killed gets an
        error reply. Closing twice does nothing.
        """
        with self._lock:
            if self._closed:
                return
            self._closed = True
            if self._frozen:
                gc.unfreeze()
            self._pushed.clear()
            for node in self._nodes.values():
                while node.mail:
                    abandoned = node.mail.popleft().reply
                    abandoned.cancel()
                    abandoned.set_running_or_notify_cancel()  # wakes who waits for it
        for _ in self._carriers:
            self._ready.put(None)
        grace_ends_s = time.monotonic() + _CLOSE_GRACE_S
        for carrier in self._carriers:
            carrier.join(max(0.0, grace_ends_s - time.monotonic()))
        for worker, carrier in zip(self._workers, self._carriers, strict=True):
            while carrier.is_alive():
                worker.kill()
                carrier.join(_KILL_INTERVAL_S)
            worker.stop(deadline_s=grace_ends_s)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    # -- A message's path --------------------------------------------------------------------------------

    def _accept(self, messages: Iterable[Message]) -> list[Message]:
        """Return numbered copies of ``messages``, so that senders may change theirs at once."""
        self._refuse_if_closed()
        accepted = []
        for message in messages:
            self._node(message.metadata.dst_node_id)
            self._number(message, run_id=self._run.run_id)
            accepted.append(isolated(message))
        return accepted

    def _run_here(self, message: Message, *, deadline_s: float | None) -> Message | None:
        """Return the reply to the message, run in this thread; past the deadline do not run it, or drop the reply."""
        node = self._node(message.metadata.dst_node_id)
        patience_s = _seconds_until(deadline_s)
        if not node.turn.acquire(timeout=-1 if patience_s is None else patience_s):
            return None
        try:
            if deadline_s is not None and time.monotonic() >= deadline_s:
                return None
            reply, node.state = self._answer(message, node.state)
        finally:
            node.turn.release()
        if deadline_s is not None and time.monotonic() > deadline_s:
            return None
        self._announce(reply, run_id=message.metadata.run_id)
        return reply

    def _hand_to_workers(self, errands: list[_Errand]) -> None:
        self.start()
        with self._lock:
            self._refuse_if_closed()
            for errand in errands:
                node = self._node(errand.message.metadata.dst_node_id)
                node.mail.append(errand)
                if not node.scheduled:
                    node.scheduled = True
                    self._ready.put(node)

    def _carry(self, worker: ForkedWorker[_Work, _Work]) -> None:
        """Body of a carrier thread: take a node that has mail, have one message answered, put it back."""
        while (node := self._ready.get()) is not None:
            with self._lock:
                errand = node.mail.popleft() if node.mail else None  # close() empties mailboxes
            if errand is not None and errand.reply.set_running_or_notify_cancel():
                self._carry_one(errand, node, worker)
            with self._lock:
                node.scheduled = bool(node.mail)
                if node.scheduled:
                    self._ready.put(node)

    def _carry_one(
        self,
        errand: _Errand,
        node: _Node,
        worker: ForkedWorker[_Work, _Work],
    ) -> None:
        try:
            reply, node.state = worker.ask((errand.message, node.state))
        except WorkerDiedError:
            logger.warning("worker died node_id=%d", node.node_id)
            reply = error_reply(errand.message, code=CLIENT_APP_CRASHED, reason=WORKER_DIED)
        except BaseException as failure:  # ours (a fork refused, a bug): for the sender to see, not this thread
            errand.reply.set_exception(failure)
            return
        self._announce(reply, run_id=errand.message.metadata.run_id)
        errand.reply.set_result(reply)

    def _number(self, message: Message, *, run_id: int) -> None:
        """Give the message the next id of this grid."""
        stamp(message, message_id=str(next(self._message_ids)), run_id=run_id)

    def _announce(self, reply: Message, *, run_id: int) -> None:
        """Number a reply, and tell of it."""
        self._number(reply, run_id=run_id)
        if self._on_reply is not None:
            self._on_reply(reply)

    def _answer_in_worker(self, request: _Work) -> _Work:
        message, state = request
        set_task_identity(run_id=message.metadata.run_id, node_id=message.metadata.dst_node_id)
        return self._answer(message, state)

    def _answer(self, message: Message, state: RecordDict) -> _Work:
        """Return the client app's reply and the node's new state; runs here or in a worker."""
        node = self._node(message.metadata.dst_node_id)
        context = Context(
            run_id=message.metadata.run_id,
            node_id=node.node_id,
            node_config=dict(node.node_config),
            state=state,
            run_config=dict(self._run_config),
        )
        reply = call_client(self._client_app, message, context)
        return reply, context.state

    def _refuse_if_closed(self) -> None:
        if self._closed:
            raise MedfedError("Expected an open InProcessGrid, got a closed one: make a new one.")

    def _node(self, node_id: int) -> _Node:
        try:
            return self._nodes[node_id]
        except KeyError:
            raise ValueError(
                f"Expected one of the grid's {len(self._nodes)} node ids, got {node_id}: use get_node_ids()."
            ) from None


def _nodes_from(node_configs: Mapping[int, UserConfig] | Sequence[UserConfig]) -> dict[int, _Node]:
    by_id = node_configs if isinstance(node_configs, Mapping) else dict(enumerate(node_configs, start=FIRST_NODE_ID))
    if not by_id:
        raise ValueError("Expected at least one node config, got none.")
    if min(by_id) <= SERVER_NODE_ID:
        raise ValueError(f"Expected node ids > {SERVER_NODE_ID} (the server's), got {min(by_id)}.")
    return {
        node_id: _Node(node_id, {**config, PARTITION_ID_KEY: index, NUM_PARTITIONS_KEY: len(by_id)})
        for index, (node_id, config) in enumerate(by_id.items())
    }


def _seconds_until(deadline_s: float | None) -> float | None:
    return None if deadline_s is None else max(0.0, deadline_s - time.monotonic())
