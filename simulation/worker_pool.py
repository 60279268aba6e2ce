"""Processes that answer requests with a function they inherited by fork.

Why not ``concurrent.futures.ProcessPoolExecutor``: when one of its processes dies, every request in the
pool fails alike and the pool is gone, so nobody can tell whose client killed it; and what it started can
neither be counted nor killed by a public name. It also takes twice as long (0.30 ms against 0.14 ms for a
155 KB message and back, 2-core machine).
"""

from __future__ import annotations

import logging
import multiprocessing
import signal
import sys
import threading
import time
import warnings
from collections.abc import Callable
from contextlib import suppress
from multiprocessing.connection import Connection
from multiprocessing.context import ForkProcess
from typing import Generic, TypeVar, cast

from medfed.errors import MedfedError

logger = logging.getLogger("medfed.simulation.grid")

Request = TypeVar("Request")
Reply = TypeVar("Reply")

# Forks are made one at a time, so that no worker inherits the child's end of another's pipe: a pipe whose
# child's end is held by its worker alone reads end-of-file the moment that worker dies, however it dies.
_fork_lock = threading.Lock()

_GOODBYE = None


class WorkerDiedError(MedfedError):
    """A worker process ended while it held a request: killed, out of memory, or ``os._exit``."""

    public = "a simulated site's process died"


class ForkedWorker(Generic[Request, Reply]):
    """One child process that answers requests in turn with ``function(request)``.

    The function, and all it can reach (the client app, a loaded backbone), comes to the child by fork and is
    shared copy-on-write; only requests and replies are pickled, between a process and its own child. A worker
    that has died is forked again for the next request. One thread at a time may call :meth:`ask`.

    The child ignores SIGINT (its parent decides), ends with its parent, however that ends, runs torch on one
    thread (an OpenMP pool does not survive a fork) and, as a daemon, may not start ``multiprocessing`` children.

    Args:
        function: what to answer requests with; should return, not raise. Raising ends the child.
    """

    def __init__(self, function: Callable[[Request], Reply]) -> None:
        self._function = function
        self._process: ForkProcess | None = None
        self._connection: Connection | None = None

    @property
    def pid(self) -> int | None:
        """Process id of the child, or None when there is none."""
        return self._process.pid if self._process is not None else None

    def start(self) -> None:
        """Fork the child from the calling thread; everything loaded so far is shared with it.

        Raises:
            MedfedError: this platform cannot fork, or CUDA is in use (its context does not survive a fork).
        """
        refuse_unsafe_fork()
        with _fork_lock, warnings.catch_warnings():
            # From Python 3.12, forking a process with threads warns: a lock that another thread holds stays
            # held in the child. Python renews its own (import, logging, threading), and what the grid holds
            # the child never takes.
            warnings.filterwarnings("ignore", message=".*multi-threaded.*fork", category=DeprecationWarning)
            context = multiprocessing.get_context("fork")
            ours, theirs = context.Pipe()
            process = context.Process(
                target=_answer_requests,
                args=(theirs, ours, self._function),
                daemon=True,
                name="medfed-worker",
            )
            try:
                process.start()
            finally:
                theirs.close()
        self._process, self._connection = process, ours

    def ask(self, request: Request) -> Reply:
        """Return the child's reply to ``request``.

        Raises:
            WorkerDiedError: the child ended while it held the request. The next call forks a new one.
        """
        connection = self._deliver(request)
        try:
            return cast(Reply, connection.recv())
        except (EOFError, OSError) as broken:
            self.stop(deadline_s=0.0)
            raise WorkerDiedError("Expected a reply, got a dead worker: look at memory and exit calls.") from broken

    def stop(self, *, deadline_s: float) -> None:
        """End the child when it has answered; it is killed at ``deadline_s`` (monotonic clock)."""
        process, connection = self._process, self._connection
        self._process = self._connection = None
        if connection is not None:
            # Closing is not enough: workers forked later hold our end of this pipe too.
            with suppress(OSError):
                connection.send(_GOODBYE)
            connection.close()
        if process is not None:
            _join_or_kill(process, deadline_s=deadline_s)

    def kill(self) -> None:
        """Kill the child now; a thread waiting in :meth:`ask` gets :class:`WorkerDiedError`."""
        if (process := self._process) is not None:
            process.kill()

    def _deliver(self, request: Request) -> Connection:
        if self._connection is not None:
            try:
                self._connection.send(request)
            except OSError:
                # It died between two requests, before it could read this one: nothing has been done twice.
                self.stop(deadline_s=0.0)
            else:
                return self._connection
        self.start()
        assert self._connection is not None
        try:
            self._connection.send(request)
        except OSError as broken:
            self.stop(deadline_s=0.0)
            raise WorkerDiedError("Expected a new worker to take the request, got a dead one.") from broken
        return self._connection


def refuse_unsafe_fork() -> None:
    """Raise when a worker forked from here could not work.

    Raises:
        MedfedError: this platform cannot fork, or CUDA is in use (its context does not survive a fork).
    """
    if "fork" not in multiprocessing.get_all_start_methods():
        raise MedfedError(f"Expected a platform that can fork, got {sys.platform}: use workers=0.")
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_initialized():
        raise MedfedError(
            "Expected to fork workers before CUDA is used, got a process with CUDA initialised: use workers=0 on a GPU."
        )


def _join_or_kill(process: ForkProcess, *, deadline_s: float) -> None:
    process.join(max(0.0, deadline_s - time.monotonic()))
    if process.exitcode is None:
        process.kill()
        process.join()


def _answer_requests(connection: Connection, parents_end: Connection, function: Callable[[Request], Reply]) -> None:
    """Body of the child: reply to each request until told goodbye, or the pipe closes with the parent."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    parents_end.close()
    if (torch := sys.modules.get("torch")) is not None:
        torch.set_num_threads(1)
    while True:
        try:
            request = connection.recv()
        except EOFError:
            return
        if request is _GOODBYE:
            return
        reply = function(request)
        try:
            connection.send(reply)
        except BrokenPipeError:
            return
