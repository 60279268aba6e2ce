"""The Flower ClientApp: the same object in the simulator, under Ray and at a hospital."""

from __future__ import annotations

import logging
from collections.abc import Callable

from flwr.app import ConfigRecord, Context, Message, RecordDict
from flwr.clientapp import ClientApp

from client import secure_round, serve
from client.reply_store import question_digest
from client.request import approved_study
from client.site import Site, site_of
from medfed.errors import DataError, MedfedError, MessageError
from medfed.messages import (
    INSTRUCTION_FIELDS,
    RECORD_KEY,
    Fields,
    Refusal,
    RoundInstruction,
    RoundReply,
    exact_fields,
    told,
)

_log = logging.getLogger("medfed.client.app")

_LOGGED_CHARACTERS = 1000

app = ClientApp()


@app.query("describe")
def describe(message: Message, context: Context) -> Message:
    """Can this site serve the study?"""
    return _answer(message, context, serve.describe)


@app.train()
def train(message: Message, context: Context) -> Message:
    """Train for one round."""
    return _answer(message, context, serve.train)


@app.evaluate()
def evaluate(message: Message, context: Context) -> Message:
    """Evaluate on held-out patients."""
    return _answer(message, context, serve.evaluate)


@app.query("secure_advertise")
def secure_advertise(message: Message, context: Context) -> Message:
    """Take part in an epoch of secure sums."""
    return _answer(message, context, secure_round.advertise)


@app.query("secure_setup")
def secure_setup(message: Message, context: Context) -> Message:
    """Make keys for an epoch of secure sums, and share them out."""
    return _answer(message, context, secure_round.setup)


@app.query("secure_accept")
def secure_accept(message: Message, context: Context) -> Message:
    """Check the keys of all sites."""
    return _answer(message, context, secure_round.accept)


@app.query("secure_vote")
def secure_vote(message: Message, context: Context) -> Message:
    """Agree to who is in a sum."""
    return _answer(message, context, secure_round.vote)


@app.query("secure_open")
def secure_open(message: Message, context: Context) -> Message:
    """Help to open a sum."""
    return _answer(message, context, secure_round.open_sum)


def _answer(message: Message, context: Context, action: Callable[[RoundInstruction, Fields, Site], Fields]) -> Message:
    """Run an action; an error travels as its kind and a public sentence, never as its text.

    A message that cannot be read, or a process that is no site, has nobody to answer for it: Flower is told
    the kind of error and nothing else.
    """
    try:
        fields = _fields_of(message)
        instruction = RoundInstruction.parse(fields)
        site = site_of(context.node_config)
        site.turn_to(instruction.round, instruction.scope)
    except Exception as error:
        raise RuntimeError(type(error).__name__) from None
    try:
        reply = _answered(message.metadata.message_type, action, instruction, fields, site)
    except Exception as error:  # whatever it is, its text may name files, and must not travel
        _log.error("event=refused round=%d kind=%s why=%s", instruction.round, type(error).__name__, _why(error))
        _log.debug("event=traceback round=%d", instruction.round, exc_info=True)
        reply = RoundReply(
            site=site.name,
            study_digest=instruction.study_digest,
            round=instruction.round,
            attempt=instruction.attempt,
            refusal=Refusal.of(error),
        ).to_fields()
    return Message(RecordDict({RECORD_KEY: ConfigRecord(dict(reply))}), reply_to=message)


def _why(error: Exception) -> str:
    """For this machine's own log: what to do. What is wrong with data may name a patient, and is not in it.

    Errors quote what the server sent, so the line is bounded and printable.
    """
    is_ours = isinstance(error, MedfedError) and not isinstance(error, DataError)
    return told(" ".join(str(error).split()), most=_LOGGED_CHARACTERS) if is_ours else Refusal.of(error).reason


def _answered(
    asked: str,
    action: Callable[[RoundInstruction, Fields, Site], Fields],
    instruction: RoundInstruction,
    fields: Fields,
    site: Site,
) -> Fields:
    """What the action replies; for a question that was answered before, those very bytes.

    A refusal is not kept: its reason may be mended. Nor is what a site says of itself, which may change.
    """
    if site.replies is None or action is serve.describe:
        return action(instruction, fields, site)
    question = question_digest(asked, fields)
    if (stored := site.replies.stored(question)) is not None:
        approved_study(instruction, fields, site)  # a hospital that has withdrawn sends nothing again
        _log.info("event=answered_again round=%d", instruction.round)
        return stored
    reply = action(instruction, fields, site)
    site.replies.keep(question, reply)
    return reply


def _fields_of(message: Message) -> Fields:
    if set(message.content) != {RECORD_KEY}:
        raise MessageError(f"Expected one record {RECORD_KEY!r} in a message, got {sorted(message.content)}.")
    record = message.content[RECORD_KEY]
    return exact_fields(record, INSTRUCTION_FIELDS)
