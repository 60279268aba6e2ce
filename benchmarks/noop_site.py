"""A site of the latency benchmark: the production worker, with an app that sends back what it got.

Inbox, audit log, reply store, session file and connection are those of ``medfed site start``; only the app is another.
It sleeps for as many seconds as the instruction's ``attempt`` is above 1, so that it can be killed at work.

    python benchmarks/noop_site.py SITE_DIR [HOST:PORT]
"""

from __future__ import annotations

import sys
import time
from pathlib import Path

from flwr.app import ConfigRecord, Context, Message, RecordDict
from flwr.clientapp import ClientApp

from client.audit_log import AuditLog
from client.flower_link import FleetLink
from client.inbox import Inbox
from client.reply_store import ReplyStore, question_digest
from client.run_site import SessionFile, node_key_of, stopped_by_signals
from client.site_folder import SiteFolder, existing_site
from client.worker import SiteWorker
from medfed.messages import INSTRUCTION_FIELDS, RECORD_KEY, RoundInstruction, RoundReply, bytes_field, exact_fields
from medfed.process_log import log_to_stderr
from medfed.signing import read_key


def echo_app(folder: SiteFolder, site: str) -> ClientApp:
    """Answers a training message with its adapter, which is stored first, as the product stores replies."""
    app = ClientApp()
    replies = ReplyStore(folder.replies)

    @app.train()
    def train(message: Message, _: Context) -> Message:
        record = message.content[RECORD_KEY]
        assert isinstance(record, ConfigRecord)
        fields = exact_fields(record, INSTRUCTION_FIELDS)
        asked = RoundInstruction.parse(fields)
        time.sleep(asked.attempt - 1)
        reply = RoundReply(site=site, study_digest=asked.study_digest, round=asked.round, attempt=asked.attempt)
        said = reply.to_fields(adapter=bytes_field(fields, "adapter"))
        replies.keep(question_digest("train", fields), said)
        return Message(RecordDict({RECORD_KEY: ConfigRecord(dict(said))}), reply_to=message)

    return app


def main() -> None:
    """Serve until stopped."""
    log_to_stderr()
    folder = existing_site(Path(sys.argv[1]))
    kit = folder.kit
    server = sys.argv[2] if len(sys.argv) > 2 else str(kit.server)
    session = SessionFile(folder.state / "session")
    with FleetLink(server, kit.ca_certificate.encode(), node_key_of(folder)) as link:
        SiteWorker(
            link,
            echo_app(folder, kit.site),
            inbox=Inbox(folder.inflight),
            audit_log=AuditLog(folder.state, read_key(folder.ledger_key)),
            session=session,
            epsilon_after=lambda _: 0.0,
            stop=stopped_by_signals(),
        ).run()
    session.ended()


if __name__ == "__main__":
    main()
