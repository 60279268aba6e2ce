"""The newest roster that this site has seen: what was signed under an older one is not approved here any more.

A roster's serial grows whenever a site joins, leaves or changes its keys, and a signed study says under which it was
signed. A study that was signed when a member was another, or had keys that were stolen since, stays well signed for
ever; whoever kept a copy could show it again. A study that is approved already keeps its approval: the hospital read
it, and takes it back with 'medfed site withdraw'.

Not guaranteed: that a site whose ``state`` was lost still knows what it saw.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from client.site_folder import SiteFolder
from medfed.canonical import canonical_bytes
from medfed.durable_file import replace_durably
from medfed.errors import ConsortiumError, SiteError
from medfed.signed_study import SignedStudy


class _NewestRoster(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    version: Literal[1] = 1
    serial: Annotated[int, Field(ge=1)]


def newest_serial(folder: SiteFolder) -> int:
    """Serial of the newest roster that this site has seen; 0 if it has seen none.

    Raises:
        SiteError: if the file is damaged: then nobody knows, and nothing is approved.
    """
    path = folder.newest_roster
    try:
        return _NewestRoster.model_validate_json(path.read_bytes()).serial
    except FileNotFoundError:
        return 0
    except (OSError, ValidationError):
        raise SiteError(
            f"Expected the serial of the newest roster at {path}, got a file that says none; restore it, or ask the "
            "coordinator for a study signed today, and remove it."
        ) from None


def refuse_older_roster(signed: SignedStudy, folder: SiteFolder) -> None:
    """Return if no newer roster was seen than the one that a study was signed under.

    Args:
        signed: verified, and of this site's consortium.
        folder: of the site.

    Raises:
        ConsortiumError: if one was.
        SiteError: as :func:`newest_serial`.
    """
    if signed.roster_serial < (newest := newest_serial(folder)):
        raise ConsortiumError(
            f"Expected a study signed under roster {newest} or a newer one, got {signed.study.name!r} under roster "
            f"{signed.roster_serial}: its sites or their keys may have changed since; ask the coordinator to sign it "
            "again."
        )


def note_roster(signed: SignedStudy, folder: SiteFolder) -> None:
    """Remember durably under which roster a study was signed; older ones are refused from now on.

    Raises:
        ConsortiumError: as :func:`refuse_older_roster`.
        SiteError: likewise, or if it cannot be written.
    """
    refuse_older_roster(signed, folder)
    if signed.roster_serial == newest_serial(folder):
        return
    said = _NewestRoster(serial=signed.roster_serial)
    try:
        replace_durably(folder.newest_roster, canonical_bytes(said.model_dump()), mode=0o600)
    except OSError as error:
        raise SiteError(f"Expected to write {folder.newest_roster}, got: {error}; make room.") from None
