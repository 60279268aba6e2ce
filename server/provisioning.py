"""``medfed provision``: makes what a consortium needs, keeps what is there, and takes enrolments in.

Run as often as wanted: keys are made once, a certificate is replaced only when that is asked for, a kit only when what
it says has changed. Hospitals' private keys are not made here: they never leave the hospitals.
"""

from __future__ import annotations

import fcntl
import os
import secrets
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path

from cryptography import x509
from pydantic import BaseModel, ConfigDict, ValidationError

from medfed.consortium_documents import EnrolmentRequest, Member, Roster, StartupKit
from medfed.durable_file import make_private_folder, replace_durably
from medfed.errors import ConsortiumError, DocumentError
from medfed.private_file import create_private, read_private
from medfed.signed_document import read_document, sign_document
from medfed.signing import create_key, fingerprint, public_pem
from server.certificates import (
    certificate_pem,
    check_authority,
    check_server_certificate,
    is_ending,
    key_pem,
    make_authority,
    make_server_certificate,
    new_key,
    read_certificate,
    read_key_pem,
)
from server.consortium_config import parse_consortium, read_consortium_file
from server.consortium_folder import ConsortiumFolder

_SECRET_BYTES = 32

_README = """\
For {site}: how to join the consortium {consortium}
{underline}
Nothing in this folder is secret. Ask the coordinator by telephone for the fingerprint of their key, then run

    medfed site init KIT_DIR SITE_DIR --data MANIFEST --expect-fingerprint FINGERPRINT

where KIT_DIR is the folder that holds startup/ and local/, SITE_DIR is a new folder that the hospital alone can read,
and MANIFEST lists its images. It makes the site's keys, which never leave SITE_DIR, and SITE_DIR/enrolment.json, which
you send to the coordinator. What lies in SITE_DIR/local/ is the hospital's to decide: which studies train, on how many
patients at least, and what all of them together may spend.
"""


class ProvisionedSite(BaseModel):
    """A hospital of a consortium.

    Attributes:
        site: name in studies.
        kit: folder to hand out.
        is_new: whether its kit was written, or written anew, by this call.
        fingerprint: of the key it enrolled with; None before that.
    """

    model_config = ConfigDict(frozen=True)

    site: str
    kit: Path
    is_new: bool
    fingerprint: str | None


class Provisioned(BaseModel):
    """What a consortium has.

    Attributes:
        consortium: name.
        folder: of the coordinator.
        server: ``host:port``.
        fingerprint: of the coordinator's key; what hospitals compare.
        server_certificate_until: its end, ISO 8601 in UTC.
        renew_server_certificate: whether that is soon.
        authority_until: end of the authority's certificate, likewise.
        sites: in the order of CONSORTIUM.toml.
        left: sites that have a kit or an enrolment and are invited no more; not in the roster.
    """

    model_config = ConfigDict(frozen=True)

    consortium: str
    folder: Path
    server: str
    fingerprint: str
    server_certificate_until: datetime
    renew_server_certificate: bool
    authority_until: datetime
    sites: tuple[ProvisionedSite, ...]
    left: tuple[str, ...]


def provision(
    consortium_file: Path, root: Path, *, enrolments: Sequence[Path] = (), renew_server_certificate: bool = False
) -> Provisioned:
    """Make or complete a consortium's folder.

    Args:
        consortium_file: CONSORTIUM.toml.
        root: the folder; made with mode 0700.
        enrolments: what hospitals sent back.
        renew_server_certificate: whether to replace the server's certificate, and its key.

    Raises:
        ConsortiumError: if the file is wrong, the folder another consortium's, a certificate not as it must be, or an
            enrolment for somebody else or not the one that was taken in before. Nothing of the enrolments is then kept.
        SiteError: if a key of the folder cannot be used.
    """
    text = read_consortium_file(consortium_file)
    config = parse_consortium(text, str(consortium_file))
    folder = ConsortiumFolder(root.resolve())
    make_private_folder(folder.root)
    with _alone_in(folder):
        if folder.consortium_file.is_file() and folder.config.name != config.name:
            raise ConsortiumError(
                f"Expected consortium {folder.config.name!r}, whose folder {root} is, got {config.name!r}; name "
                "another folder with --out."
            )
        _refuse_foreign_files(folder)
        _replace_if_other(folder.consortium_file, text)
        for place in (folder.studies, folder.runs, folder.root / "enrolments", folder.root / "kits"):
            make_private_folder(place)
        if not folder.coordinator_key_file.exists():
            create_key(folder.coordinator_key_file)
        _replace_if_other(folder.coordinator_public_file, public_pem(folder.coordinator_key().public_key()))
        authority, certificate = _certificates(folder, renew=renew_server_certificate)
        if not folder.superexec_secret.exists():
            # Hexadecimal, since it is handed to programs that may read it as text.
            create_private(folder.superexec_secret, secrets.token_hex(_SECRET_BYTES).encode(), "secret")
        written = {site: _write_kit(folder, site, authority) for site in config.site_names}
        roster = _take_in(folder, enrolments)
    keys = {member.site: member.signing_key for member in roster.members}
    return Provisioned(
        consortium=config.name,
        folder=folder.root,
        server=str(config.server),
        fingerprint=fingerprint(folder.coordinator_public_key),
        server_certificate_until=certificate.not_valid_after_utc,
        renew_server_certificate=is_ending(certificate),
        authority_until=authority.not_valid_after_utc,
        sites=tuple(
            ProvisionedSite(
                site=site,
                kit=folder.kit(site),
                is_new=written[site],
                fingerprint=fingerprint(keys[site]) if site in keys else None,
            )
            for site in config.site_names
        ),
        left=_left(folder),
    )


@contextmanager
def _alone_in(folder: ConsortiumFolder) -> Iterator[None]:
    """One process at a time makes or changes a consortium's folder."""
    descriptor = os.open(folder.root / ".lock", os.O_RDWR | os.O_CREAT, 0o600)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def _refuse_foreign_files(folder: ConsortiumFolder) -> None:
    """A folder that holds other things is not made into a consortium's."""
    others = sorted(path.name for path in folder.root.iterdir() if path.name != ".lock")
    if others and not folder.consortium_file.is_file():
        raise ConsortiumError(
            f"Expected a consortium's folder or an empty one at {folder.root}, got one with {others[0]!r}; name "
            "another with --out."
        )


def _certificates(folder: ConsortiumFolder, *, renew: bool) -> tuple[x509.Certificate, x509.Certificate]:
    """The authority's certificate and the server's, made if they are missing, checked if not."""
    host = folder.config.server.host
    if not folder.ca_key.exists():
        create_private(folder.ca_key, key_pem(new_key()), "authority key")
    authority_key = read_key_pem(read_private(folder.ca_key, "authority key"), str(folder.ca_key))
    if not folder.ca_certificate.exists():
        made = make_authority(folder.config.name, authority_key)
        replace_durably(folder.ca_certificate, certificate_pem(made), mode=0o644)
    authority = read_certificate(folder.ca_certificate.read_bytes(), str(folder.ca_certificate))
    check_authority(authority, authority_key, str(folder.ca_certificate))

    make_private_folder(folder.server_key.parent)
    if renew or not folder.server_certificate.exists():
        key = new_key()
        made = make_server_certificate(host, key.public_key(), authority=authority, authority_key=authority_key)
        folder.server_certificate.unlink(missing_ok=True)  # a crash in between leaves none, not one of another key
        replace_durably(folder.server_key, key_pem(key), mode=0o600)
        replace_durably(folder.server_certificate, certificate_pem(made), mode=0o644)
    return authority, check_server(folder)


def check_server(folder: ConsortiumFolder) -> x509.Certificate:
    """The server's certificate, if hospitals would believe it for the host that CONSORTIUM.toml names.

    Raises:
        ConsortiumError: names what is wrong: its key, its authority, its host, or its end.
    """
    certificate = read_certificate(folder.server_certificate.read_bytes(), str(folder.server_certificate))
    check_server_certificate(
        certificate,
        read_key_pem(read_private(folder.server_key, "server key"), str(folder.server_key)),
        authority=read_certificate(folder.ca_certificate.read_bytes(), str(folder.ca_certificate)),
        host=folder.config.server.host,
        origin=str(folder.server_certificate),
    )
    return certificate


def _write_kit(folder: ConsortiumFolder, site: str, authority: x509.Certificate) -> bool:
    """Whether a hospital's kit had to be written."""
    config = folder.config
    kit = StartupKit(
        consortium=config.name,
        site=site,
        server=config.server,
        ca_certificate=certificate_pem(authority).decode(),
        coordinator_key=folder.coordinator_public_key,
    )
    title = f"For {site}: how to join the consortium {config.name}"
    readme = _README.format(site=site, consortium=config.name, underline="=" * len(title))
    for path in (folder.kit_document(site), folder.kit(site) / "local" / "README.txt"):
        path.parent.mkdir(parents=True, exist_ok=True)
    _replace_if_other(folder.kit(site) / "local" / "README.txt", readme.encode())
    return _replace_if_other(folder.kit_document(site), sign_document(kit, folder.coordinator_key()))


def _take_in(folder: ConsortiumFolder, enrolments: Sequence[Path]) -> Roster:
    """The roster with what hospitals sent back; all of it or nothing is taken in."""
    arrived: dict[str, tuple[bytes, EnrolmentRequest]] = {}
    for path in enrolments:
        data = read_document(path)
        request = folder.enrolled(data, str(path))
        if request.site in arrived and arrived[request.site][0] != data:
            raise ConsortiumError(
                f"Expected one enrolment of {request.site!r}, got two different ones; ask which is theirs."
            )
        arrived[request.site] = (data, request)
    members = []
    for site in folder.config.site_names:
        stored = folder.enrolment(site)
        known = folder.enrolled(read_document(stored), str(stored)) if stored.exists() else None
        if known is not None and known.site != site:
            raise ConsortiumError(
                f"Expected the enrolment of {site!r} at {stored}, got the one of {known.site!r}; remove it."
            )
        enrolled = arrived[site][1] if site in arrived else known
        if enrolled is None:
            continue
        if known is not None and enrolled != known:
            raise ConsortiumError(
                f"Expected the keys with which {site!r} has enrolled ({fingerprint(known.signing_key)}), got others "
                f"({fingerprint(enrolled.signing_key)}); ask the hospital by telephone, and remove {stored} if the new "
                "ones are theirs."
            )
        members.append(Member(site=site, node_key=enrolled.node_key, signing_key=enrolled.signing_key))
    try:
        roster = Roster(consortium=folder.config.name, serial=_serial(folder, tuple(members)), members=tuple(members))
    except ValidationError as error:
        said = str(error.errors(include_url=False)[0]["msg"]).removeprefix("Value error, ")
        raise ConsortiumError(f"Expected keys of its own for each site, got: {said}; ask the hospitals.") from None
    for site, (data, _) in arrived.items():
        _replace_if_other(folder.enrolment(site), data)
    _replace_if_other(folder.roster_file, sign_document(roster, folder.coordinator_key()))
    return roster


def _serial(folder: ConsortiumFolder, members: tuple[Member, ...]) -> int:
    """Serial of the roster with these members: the old one's if they are the same, and a later one if not."""
    now = int(time.time())
    try:
        before = folder.roster()
    except DocumentError:  # there is none yet, or it cannot be read: the clock is later than any that was
        return now
    return before.serial if before.members == members else max(before.serial + 1, now)


def _left(folder: ConsortiumFolder) -> tuple[str, ...]:
    kits = {path.name for path in (folder.root / "kits").iterdir()}
    enrolled = {path.stem for path in (folder.root / "enrolments").glob("*.json")}
    return tuple(sorted((kits | enrolled) - set(folder.config.site_names)))


def _replace_if_other(path: Path, data: bytes) -> bool:
    """Whether a public file had other content, and has this now."""
    if path.is_file() and path.read_bytes() == data:
        return False
    replace_durably(path, data, mode=0o644)
    return True
