"""How every simulation engine calls the client app: isolated, and with errors that tell nothing.

Virtual hospitals share a process, real ones do not. Two things keep that difference from showing:

* nothing that one side may change is shared: a message is copied on its way in and on its way out;
* an exception becomes an error reply that carries the *type* of the exception alone. Its text and its
  traceback may name patients' files (``deployment.md``); the traceback goes to the log, at DEBUG.
"""

from __future__ import annotations

import logging

from simulation.flower_private import CLIENT_APP_RAISED, Record, message_like, record_dict_like

# isort: split
from flwr.app import Array, ArrayRecord, Context, Error, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp

logger = logging.getLogger("medfed.simulation.grid")


class GuardedClientApp(ClientApp):
    """A client app whose errors leave it as error replies, for an engine that would send their text.

    Args:
        inner: the client app to call.
    """

    def __init__(self, inner: ClientApp) -> None:
        super().__init__()
        self._inner = inner

    def __call__(self, message: Message, context: Context) -> Message:
        """Return what :func:`call_client` returns for the inner app."""
        return call_client(self._inner, message, context)


def call_client(client_app: ClientApp, message: Message, context: Context) -> Message:
    """Return the reply of ``client_app``, or an error reply; the reply shares no mutable object with it.

    A call that fails leaves ``context.state`` as it was, as if the call had not been made.

    Args:
        client_app: any Flower client app.
        message: what the server sent, already isolated from it. The app may change it.
        context: the node's context; the app changes its ``state`` in place or replaces it.

    Returns:
        | the app ...                                   | reply                                          |
        |-----------------------------------------------|------------------------------------------------|
        | returns a reply to this message               | an equal message                               |
        | raises ``E`` (``SystemExit`` included)        | ``Error``, reason ``"E"``                      |
        | returns anything else                         | ``Error``, reason ``"TypeError"``              |

        ``KeyboardInterrupt`` is the person at the keyboard, not the client: it passes through.
    """
    state_before = copy_records(context.state)
    message_id = message.metadata.message_id
    try:
        reply = _checked(client_app(message=message, context=context), message_id)
    except (Exception, SystemExit) as failure:
        context.state = state_before
        reason = type(failure).__name__
        logger.warning("client app failed node_id=%d error=%s", context.node_id, reason)
        logger.debug("client app traceback node_id=%d", context.node_id, exc_info=True)
        return error_reply(message, code=CLIENT_APP_RAISED, reason=reason)
    return isolated(reply)


def _checked(reply: object, message_id: str) -> Message:
    if isinstance(reply, Message) and reply.metadata.reply_to_message_id == message_id:
        return reply
    raise TypeError("Expected the client app to return Message(..., reply_to=message), got something else.")


def error_reply(message: Message, *, code: int, reason: str) -> Message:
    """Return the error reply to ``message``; ``reason`` must be free of anything a site keeps to itself."""
    return Message(Error(code=code, reason=reason), reply_to=message)


def isolated(message: Message) -> Message:
    """Return an equal message that shares nothing mutable with ``message``; payload bytes are not copied."""
    if message.has_error():
        return message_like(message, content=None, error=message.error)
    return message_like(message, content=copy_records(message.content), error=None)


def copy_records(records: RecordDict) -> RecordDict:
    """Return an equal ``RecordDict`` that shares only immutable values (scalars, text, bytes) with ``records``.

    Copies are shallow wherever the values are immutable, so the cost does not depend on the payload's size:
    about 2 us for a record with one payload, 4 us per array.
    """
    return record_dict_like(records, {name: _copy_record(record) for name, record in records.items()})


def _copy_record(record: Record) -> Record:
    if isinstance(record, ArrayRecord):
        # Built anew: an Array caches its chunks as memoryviews, which can be neither pickled nor deep-copied.
        return ArrayRecord(
            {name: Array(array.dtype, tuple(array.shape), array.stype, array.data) for name, array in record.items()}
        )
    if isinstance(record, MetricRecord):
        metrics = record.copy()
        for name, metric in record.items():
            if isinstance(metric, list):
                metrics[name] = metric.copy()
        return metrics
    config = record.copy()
    for name, setting in record.items():
        if isinstance(setting, list):
            config[name] = setting.copy()
    return config
