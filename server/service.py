"""The consortium's service: the SuperLink behind its guard, and the roster's sites registered at it."""

from __future__ import annotations

import ipaddress
import logging
import threading
from pathlib import Path

from medfed.consortium_documents import Roster
from medfed.errors import ConsortiumError, DocumentError, LinkError, SiteError
from medfed.private_file import read_private
from medfed.process_log import log_to_stderr
from server.consortium_folder import ConsortiumFolder, open_consortium
from server.flower_link import SuperLinkAddress, SuperLinkFiles, register_sites, serve_superlink
from server.provisioning import check_server

_log = logging.getLogger("medfed.server.service")

_LOOK_EVERY_S = 15.0


def superlink_of(
    folder: ConsortiumFolder, address: str | None = None, *, patience_s: float = 120.0
) -> SuperLinkAddress:
    """Where the consortium's SuperLink is, and how its own processes are known there.

    Args:
        folder: of the consortium.
        address: ``host:port``, if not as sites reach it.
        patience_s: how long a request is tried again while it is away.

    Raises:
        SiteError: if the secret may be read by others.
        ConsortiumError: if the configuration cannot be read.
    """
    server = folder.config.server
    return SuperLinkAddress(
        address=address or f"{server.host}:{server.port}",
        ca_certificate=folder.ca_certificate.read_bytes(),
        secret=read_private(folder.superexec_secret, "SuperLink secret").strip(),
        patience_s=patience_s,
    )


def serve_consortium(root: Path, *, listen: str | None = None, health_address: str | None = None) -> None:
    """Serve until stopped.

    Args:
        root: the consortium's folder.
        listen: address; None listens at all, or at the loopback address that CONSORTIUM.toml names.
        health_address: of a gRPC health service.

    Raises:
        ConsortiumError: if there is no consortium.
        LinkError: if another version of Flower is installed.
    """
    log_to_stderr()
    folder = open_consortium(root)
    server = folder.config.server
    check_server(folder)
    host = listen or (server.host if _is_loopback(server.host) else "0.0.0.0")  # noqa: S104 - sites connect from afar
    files = SuperLinkFiles(
        certificate=folder.server_certificate,
        private_key=folder.server_key,
        ca_certificate=folder.ca_certificate,
        secret=folder.superexec_secret,
        database=folder.state_database,
    )
    threading.Thread(target=_keep_registered, args=(folder,), name="registration", daemon=True).start()
    _log.info("event=serving consortium=%s host=%s port=%d", folder.config.name, host, server.port)
    serve_superlink(files, host=host, port=server.port, health_address=health_address)


def _keep_registered(folder: ConsortiumFolder) -> None:
    """Register the roster's sites, now and whenever it changes; what goes wrong is said, and tried again."""
    server = folder.config.server
    host = server.host if _is_loopback(server.host) else "127.0.0.1"
    superlink, seen, told = superlink_of(folder, f"{host}:{server.port}"), b"", ""
    newest = 0
    pause = threading.Event()
    while True:
        try:
            if folder.roster_file.exists() and (data := folder.roster_file.read_bytes()) != seen:
                roster = newer_roster(folder.roster(), newest)
                keys = {member.site: member.public_node_key for member in roster.members}
                register_sites(superlink, keys, and_no_others=True)
                seen, newest = data, roster.serial
                _log.info("event=roster sites=%s", ",".join(keys))
        except (ConsortiumError, DocumentError, LinkError, SiteError, OSError) as error:
            if str(error) != told:
                told = str(error)
                _log.warning("event=not_registered why=%s", told)
        pause.wait(_LOOK_EVERY_S)


def newer_roster(roster: Roster, newest: int) -> Roster:
    """The roster, if this process has registered none that is newer.

    Args:
        roster: as the coordinator signed it.
        newest: serial of the newest that was registered; 0 for none.

    Raises:
        ConsortiumError: if it has: an old file was put back, and with it sites that have left or their old keys.
    """
    if roster.serial < newest:
        raise ConsortiumError(
            f"Expected roster {newest} or a newer one, got roster {roster.serial}: an old file was put back; remove it "
            "and run 'medfed provision' again."
        )
    return roster


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
