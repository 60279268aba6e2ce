"""A hospital's folder of one consortium: where everything lies, and the site that it makes.

::

    startup/kit.json          from the coordinator, signed; where the server is and by what it is believed
    local/site.toml           the hospital's: its images, its device, the name of its cohort
    local/policy.toml         the hospital's: what may train, and what all studies together may spend
    local/approvals/          one signed approval for each study
    keys/                     node.key, identity, ledger.key, feature-cache.key; made here, and never leave
    state/                    ledger.sqlite, journals/, memories/, replies/, inflight/, features/, audit-log.jsonl,
                              newest-roster.json
    enrolment.json            what the coordinator is sent

All of it is for its owner alone. Back up ``keys``, ``local`` and the ledger; never restore ``state/journals``.
"""

from __future__ import annotations

import logging
import tomllib
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from client.policy import SitePolicy, read_policy
from medfed.consortium_documents import EnrolmentRequest, StartupKit
from medfed.device import DeviceChoice
from medfed.durable_file import make_private_folder
from medfed.errors import SiteError
from medfed.private_file import require_private
from medfed.signed_document import read_document, verify_self_signed
from medfed.study_sections import FilePath, Name
from medfed.toml_file import parse_toml
from privacy.secure_aggregation.identity import Identity, read_identity

_log = logging.getLogger("medfed.client.site_folder")


class SiteSettings(BaseModel):
    """local/site.toml: what a hospital says of itself to its own machine.

    Attributes:
        data: manifest of its images; relative to ``local/`` if not absolute.
        device: where it computes.
        num_threads: of the processor.
        cohort: name of the patients in the privacy ledger: the same for as long as they are the same patients.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    data: FilePath
    device: DeviceChoice = "auto"
    num_threads: Annotated[int, Field(ge=1)] = 1
    cohort: Name


@dataclass(frozen=True)
class SiteFolder:
    """The folder of one site.

    Attributes:
        root: the folder.
    """

    root: Path

    @property
    def kit_file(self) -> Path:
        """What the coordinator handed out."""
        return self.root / "startup" / "kit.json"

    @property
    def enrolment_file(self) -> Path:
        """What the coordinator is sent; the last file that is made."""
        return self.root / "enrolment.json"

    @property
    def settings_file(self) -> Path:
        """The hospital's settings."""
        return self.root / "local" / "site.toml"

    @property
    def policy_file(self) -> Path:
        """The hospital's policy."""
        return self.root / "local" / "policy.toml"

    @property
    def approvals(self) -> Path:
        """Folder of signed approvals."""
        return self.root / "local" / "approvals"

    @property
    def node_key(self) -> Path:
        """P-384 private key by which the server knows the connection; OpenSSH's form."""
        return self.root / "keys" / "node.key"

    @property
    def identity(self) -> Path:
        """By which other sites know this one; signs the enrolment and approvals."""
        return self.root / "keys" / "identity"

    @property
    def ledger_key(self) -> Path:
        """Signs the privacy ledger."""
        return self.root / "keys" / "ledger.key"

    @property
    def feature_key(self) -> Path:
        """Encrypts cached features."""
        return self.root / "keys" / "feature-cache.key"

    @property
    def state(self) -> Path:
        """Folder of what the site notes while it works."""
        return self.root / "state"

    @property
    def ledger(self) -> Path:
        """The privacy ledger; made when the first private round comes."""
        return self.state / "ledger.sqlite"

    @property
    def journals(self) -> Path:
        """What it answered in secure aggregation; in no backup."""
        return self.state / "journals"

    @property
    def memories(self) -> Path:
        """What it remembers between rounds."""
        return self.state / "memories"

    @property
    def replies(self) -> Path:
        """Replies that may be asked for again."""
        return self.state / "replies"

    @property
    def inflight(self) -> Path:
        """The message that it works on."""
        return self.state / "inflight"

    @property
    def features(self) -> Path:
        """The encrypted feature cache."""
        return self.state / "features"

    @property
    def audit_log(self) -> Path:
        """What left the site."""
        return self.state / "audit-log.jsonl"

    @property
    def newest_roster(self) -> Path:
        """Serial of the newest roster it has seen."""
        return self.state / "newest-roster.json"

    @property
    def private_folders(self) -> tuple[Path, ...]:
        """Every folder, in the order in which they are made."""
        inside = (self.journals, self.memories, self.replies, self.inflight, self.features)
        local = self.root / "local"
        return (self.root, self.root / "startup", local, self.approvals, self.root / "keys", self.state, *inside)

    @cached_property
    def kit(self) -> StartupKit:
        """What the coordinator handed out.

        Raises:
            DocumentError: if it is not as it was signed.
        """
        return verify_self_signed(read_document(self.kit_file), StartupKit, origin=str(self.kit_file))

    def enrolment(self) -> EnrolmentRequest:
        """What the coordinator is sent.

        Raises:
            DocumentError: if it is not as it was signed.
        """
        path = self.enrolment_file
        return verify_self_signed(read_document(path), EnrolmentRequest, origin=str(path))

    def own_identity(self) -> Identity:
        """The identity that signs for this site.

        Raises:
            SiteError: if it is missing, damaged, or anybody but the owner may read it.
        """
        return read_identity(self.identity)

    def settings(self) -> SiteSettings:
        """The hospital's settings; the manifest's path is absolute.

        Raises:
            SiteError: one line that names the file and the key.
        """
        path = self.settings_file
        try:
            settings = SiteSettings.model_validate(parse_toml(path.read_text(encoding="utf-8")))
        except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
            raise SiteError(f"Expected readable settings in TOML at {path}, got: {error}; correct them.") from None
        except ValidationError as error:
            first = error.errors(include_url=False)[0]
            raise SiteError(f"{path}: {'.'.join(map(str, first['loc']))}: {first['msg']}; correct it.") from None
        return settings.model_copy(update={"data": (path.parent / settings.data).resolve()})

    def written_policy(self) -> SitePolicy:
        """What the policy file says, without the approvals beside it.

        Raises:
            SiteError: one line that names the file and the key.
        """
        return read_policy(self.policy_file)


def make_folders(folder: SiteFolder) -> None:
    """Make those of the site's folders that are missing, as after a restore, where journals are in no backup.

    Raises:
        SiteError: if one cannot be made, or others than its owner may use one.
    """
    for place in folder.private_folders:
        try:
            if not place.is_dir():
                _log.warning("event=folder_made_anew folder=%s", place)
            make_private_folder(place)
            require_private(place, 0o700)
        except OSError as error:
            raise SiteError(f"Expected to make the site's folder {place}, got: {error}; mend it.") from None


def existing_site(root: Path) -> SiteFolder:
    """The site in a folder that ``medfed site init`` made whole; kit and enrolment belong together.

    Raises:
        SiteError: if there is none, or it is not whole.
        DocumentError: if its kit or enrolment is not as it was signed.
    """
    folder = SiteFolder(root.resolve())
    if not folder.enrolment_file.is_file():
        raise SiteError(f"Expected a site's folder at {root}, got none; run 'medfed site init' first.")
    kit, enrolment = folder.kit, folder.enrolment()
    if (enrolment.consortium, enrolment.coordinator_key, enrolment.site) != (
        kit.consortium,
        kit.coordinator_key,
        kit.site,
    ):
        raise SiteError(
            f"Expected the kit with which this site enrolled ({enrolment.site!r} in {enrolment.consortium!r}) at "
            f"{folder.kit_file}, got one of {kit.site!r} in {kit.consortium!r}"
            f"{'' if enrolment.coordinator_key == kit.coordinator_key else ' by another coordinator'}; restore it."
        )
    if folder.own_identity().signing_key.hex() != enrolment.signing_key:
        raise SiteError(
            f"Expected the identity with which this site enrolled at {folder.identity}, got another; restore it."
        )
    return folder
