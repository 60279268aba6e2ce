"""Approvals: which studies a hospital has read and allowed, each signed with the site's own key.

An approval is a file named by the study's digest. One that is damaged, that another key signed, or that lies under
another name allows nothing: the study then counts as not approved, and the log says so.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import ClassVar, Literal

from pydantic import AwareDatetime

from client.site_folder import SiteFolder
from medfed.durable_file import make_private_folder, replace_durably, sync_folder
from medfed.errors import ConsortiumError, DocumentError
from medfed.signed_document import DocumentBody, read_document, verify_document
from medfed.signed_study import SUFFIX
from medfed.study_sections import Digest, Name

_log = logging.getLogger("medfed.client.approvals")


class Approval(DocumentBody):
    """A hospital's word that a study may train on its patients.

    Attributes:
        version: of the format.
        consortium: in which it was signed.
        site: whose word it is.
        study: its name.
        study_digest: what was approved, exactly.
        approved_at: when.
    """

    kind: ClassVar[str] = "approval"

    version: Literal[1] = 1
    consortium: Name
    site: Name
    study: Name
    study_digest: Digest
    approved_at: AwareDatetime


@dataclass(frozen=True)
class Approvals:
    """What lies in a site's folder of approvals.

    Attributes:
        valid: in the order of their digests.
        refused: one line for each file that allows nothing.
    """

    valid: tuple[Approval, ...]
    refused: tuple[str, ...]

    @property
    def digests(self) -> tuple[str, ...]:
        """Of approved studies."""
        return tuple(approval.study_digest for approval in self.valid)


def read_approvals(folder: SiteFolder, *, signing_key: str) -> Approvals:
    """The approvals of a site, verified now.

    Args:
        folder: of the site.
        signing_key: its own public key, hexadecimal: of the identity, or of the enrolment that it signed.
    """
    valid, refused = [], []
    for path in sorted(folder.approvals.glob("*.json")):
        try:
            valid.append(_read(path, folder, signing_key))
        except ConsortiumError as error:
            refused.append(str(error))
    return Approvals(tuple(valid), tuple(refused))


def store_approval(folder: SiteFolder, study: str, study_digest: str) -> Approval:
    """Sign and keep an approval; one that is there and valid stays as it is.

    Raises:
        SiteError: if the site's identity cannot be used.
        OSError: if it cannot be written.
    """
    identity = folder.own_identity()
    path = _path(folder, study_digest)
    try:
        return _read(path, folder, identity.signing_key.hex())
    except DocumentError:
        pass  # none, or one that allows nothing
    approval = Approval(
        consortium=folder.kit.consortium,
        site=folder.kit.site,
        study=study,
        study_digest=study_digest,
        approved_at=datetime.now(UTC).replace(microsecond=0),
    )
    make_private_folder(folder.approvals)
    replace_durably(path, identity.signed_document(approval), mode=0o600)
    _log.info("event=approved study=%s digest=%s", study, study_digest)
    return approval


def keep_study(folder: SiteFolder, study_digest: str, signed: bytes) -> None:
    """Keep what was approved beside its approval, as the coordinator signed it.

    Raises:
        OSError: if it cannot be written.
    """
    make_private_folder(folder.approvals)
    replace_durably(folder.approvals / f"{study_digest}{SUFFIX}", signed, mode=0o600)


def remove_approval(folder: SiteFolder, study_digest: str) -> str:
    """Take an approval back, durably: the study is refused from the next request on.

    Args:
        folder: of the site.
        study_digest: the digest, or enough of its first digits to tell it from the others.

    Returns:
        The whole digest.

    Raises:
        ConsortiumError: if there is no such approval, or there are several.
    """
    found = [path for path in sorted(folder.approvals.glob("*.json")) if path.stem.startswith(study_digest)]
    if len(found) != 1 or not study_digest:
        known = ", ".join(path.stem[:12] for path in folder.approvals.glob("*.json")) or "none"
        raise ConsortiumError(
            f"Expected the digest of one approved study, got {study_digest!r}, which fits {len(found)}; approved: "
            f"{known}."
        )
    found[0].unlink()
    sync_folder(folder.approvals)
    _log.info("event=withdrawn digest=%s", found[0].stem)
    return found[0].stem


def _path(folder: SiteFolder, study_digest: str) -> Path:
    return folder.approvals / f"{study_digest}.json"


def _read(path: Path, folder: SiteFolder, signing_key: str) -> Approval:
    approval = verify_document(read_document(path), Approval, public_key=signing_key, origin=str(path))
    kit = folder.kit
    expected = (kit.consortium, kit.site, path.stem)
    if (approval.consortium, approval.site, approval.study_digest) != expected:
        raise DocumentError(
            f"{path}: expected the approval of study {path.stem[:12]} by {kit.site!r} in {kit.consortium!r}, got one "
            f"of {approval.study_digest[:12]} by {approval.site!r} in {approval.consortium!r}; approve the study."
        )
    return approval
