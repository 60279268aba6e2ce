"""A hospital's process from its folder: opens the site, connects, and serves until it is told to stop."""

from __future__ import annotations

import logging
import os
import signal
import threading
import time
from pathlib import Path

from cryptography.hazmat.primitives.asymmetric.ec import EllipticCurvePrivateKey
from cryptography.hazmat.primitives.serialization import load_ssh_private_key

from client.site_folder import SiteFolder, existing_site, make_folders
from client.site_lock import only_process
from medfed.durable_file import replace_durably
from medfed.errors import SiteError
from medfed.private_file import read_private
from medfed.process_log import log_to_stderr
from medfed.signing import read_key

_log = logging.getLogger("medfed.client.run_site")


class SessionFile:
    """Remembers the number of the session at the server, so that the next process can end one that was left open.

    Args:
        path: of the file.
    """

    def __init__(self, path: Path) -> None:
        self._path = path

    def unended(self) -> int | None:
        """The session that was begun last and not ended, if there is one."""
        try:
            return int(self._path.read_text())
        except (OSError, ValueError):
            return None

    def begun(self, node_id: int) -> None:
        """Remember a session."""
        if self.unended() != node_id:
            replace_durably(self._path, str(node_id).encode(), mode=0o600)

    def ended(self) -> None:
        """Forget it: the server was told goodbye."""
        self._path.unlink(missing_ok=True)


def run_site(root: Path, *, verbose: bool = False) -> None:
    """Serve the site of a folder until SIGTERM or SIGINT.

    A message in work is finished first; whoever cannot wait may kill the process, and nothing is lost.

    Args:
        root: folder of the site.
        verbose: log details.

    Raises:
        MedfedError: if the site cannot be opened, is served already, or cannot write down what it does.
    """
    log_to_stderr(verbose=verbose)
    folder = existing_site(root)
    make_folders(folder)
    os.environ["MEDFED_SITE"] = str(folder.root)
    from client.app import app
    from client.audit_log import AuditLog
    from client.flower_link import FleetLink
    from client.inbox import Inbox
    from client.site import site_of
    from client.worker import SiteWorker

    with only_process(folder.root):
        began_s = time.monotonic()
        site = site_of({})
        audit_log = AuditLog(folder.state, read_key(folder.ledger_key))
        stop = stopped_by_signals()
        session = SessionFile(folder.state / "session")
        kit = folder.kit
        link = FleetLink(str(kit.server), kit.ca_certificate.encode(), node_key_of(folder))
        _log.info("event=started site=%s server=%s seconds=%.1f", site.name, kit.server, time.monotonic() - began_s)
        with link:
            SiteWorker(
                link,
                app,
                inbox=Inbox(folder.inflight),
                audit_log=audit_log,
                session=session,
                epsilon_after=site.spent_in_all,
                stop=stop,
            ).run()
        session.ended()
    _log.info("event=stopped site=%s", site.name)


def node_key_of(folder: SiteFolder) -> EllipticCurvePrivateKey:
    """The key by which the server knows this site.

    Raises:
        SiteError: if there is no such key, or one of another kind.
    """
    data = read_private(folder.node_key, "node key")
    try:
        key = load_ssh_private_key(data, None)
    except ValueError as error:
        raise SiteError(f"Expected this site's node key at {folder.node_key}, got: {error}; restore it.") from None
    if not isinstance(key, EllipticCurvePrivateKey):
        raise SiteError(f"Expected a P-384 key at {folder.node_key}, got another kind; restore it.")
    return key


def stopped_by_signals() -> threading.Event:
    """Set when this process is asked to end, by SIGTERM or Ctrl-C; the message in work is finished first."""
    stop = threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: stop.set())
    return stop
