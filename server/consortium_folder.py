"""A coordinator's folder of a consortium: where everything lies, and how it is read.

::

    consortium.toml        as it was given
    coordinator.key        signs kits, the roster and studies; for its owner alone, and never leaves the machine
    coordinator.pub        its public half
    ca/                    ca.key, ca.crt: the authority of the server's certificate
    server/                server.key, server.crt, superexec.secret, state.db (the SuperLink's)
    kits/<site>/           startup/kit.json and an empty local/: what a hospital gets; holds no secret
    enrolments/<site>.json what it sent back
    roster.json            who has enrolled
    studies/               signed studies
    runs/                  run folders
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from medfed.consortium_documents import EnrolmentRequest, Roster, StartupKit
from medfed.errors import ConsortiumError
from medfed.signed_document import read_document, verify_document, verify_self_signed
from medfed.signed_study import SignedStudy, read_signed_study
from medfed.signing import public_hex, read_key
from server.consortium_config import ConsortiumConfig, parse_consortium, read_consortium_file


@dataclass(frozen=True)
class ConsortiumFolder:
    """The folder of one consortium; nothing of it is kept in memory but its key.

    Attributes:
        root: the folder.
    """

    root: Path

    @property
    def consortium_file(self) -> Path:
        """CONSORTIUM.toml, as it was given last."""
        return self.root / "consortium.toml"

    @property
    def coordinator_key_file(self) -> Path:
        """The coordinator's private key."""
        return self.root / "coordinator.key"

    @property
    def coordinator_public_file(self) -> Path:
        """Its public half, PEM."""
        return self.root / "coordinator.pub"

    @property
    def ca_key(self) -> Path:
        """The authority's private key."""
        return self.root / "ca" / "ca.key"

    @property
    def ca_certificate(self) -> Path:
        """The authority's certificate: what hospitals believe."""
        return self.root / "ca" / "ca.crt"

    @property
    def server_key(self) -> Path:
        """The server's private key."""
        return self.root / "server" / "server.key"

    @property
    def server_certificate(self) -> Path:
        """The server's certificate."""
        return self.root / "server" / "server.crt"

    @property
    def superexec_secret(self) -> Path:
        """Without which nobody can claim the server's tasks at the SuperLink; raw bytes."""
        return self.root / "server" / "superexec.secret"

    @property
    def state_database(self) -> Path:
        """The SuperLink's database."""
        return self.root / "server" / "state.db"

    @property
    def roster_file(self) -> Path:
        """Who has enrolled, signed."""
        return self.root / "roster.json"

    @property
    def studies(self) -> Path:
        """Folder of signed studies."""
        return self.root / "studies"

    @property
    def runs(self) -> Path:
        """Folder of run folders."""
        return self.root / "runs"

    def kit(self, site: str) -> Path:
        """Folder that a hospital gets."""
        return self.root / "kits" / site

    def kit_document(self, site: str) -> Path:
        """The signed part of it."""
        return self.kit(site) / "startup" / "kit.json"

    def enrolment(self, site: str) -> Path:
        """What the hospital sent back."""
        return self.root / "enrolments" / f"{site}.json"

    @property
    def config(self) -> ConsortiumConfig:
        """The consortium as it was given last.

        Raises:
            ConsortiumError: if the file is missing or wrong.
        """
        return parse_consortium(read_consortium_file(self.consortium_file), str(self.consortium_file))

    @cached_property
    def _key(self) -> Ed25519PrivateKey:
        return read_key(self.coordinator_key_file)

    def coordinator_key(self) -> Ed25519PrivateKey:
        """The key that signs for the coordinator.

        Raises:
            SiteError: if it is missing, damaged, or others may read it.
        """
        return self._key

    @property
    def coordinator_public_key(self) -> str:
        """Its public half, raw, hexadecimal.

        Raises:
            SiteError: as :meth:`coordinator_key`.
        """
        return public_hex(self._key)

    def roster(self) -> Roster:
        """The sites that have enrolled.

        Raises:
            DocumentError: if the roster is not as this coordinator signed it.
            ConsortiumError: if it is another consortium's.
        """
        data = read_document(self.roster_file)
        roster = verify_document(data, Roster, public_key=self.coordinator_public_key, origin=str(self.roster_file))
        if roster.consortium != self.config.name:
            raise ConsortiumError(
                f"Expected the roster of {self.config.name!r} at {self.roster_file}, got the one of "
                f"{roster.consortium!r}; run 'medfed provision' again."
            )
        return roster

    def signed_study(self, path: Path) -> SignedStudy:
        """A study that this coordinator signed for this consortium.

        Raises:
            DocumentError: if it is damaged, or somebody else signed it.
            ConsortiumError: if it was signed for another consortium.
        """
        signed = read_signed_study(path, public_key=self.coordinator_public_key)
        if signed.consortium != self.config.name:
            raise ConsortiumError(
                f"Expected a study signed for {self.config.name!r} at {path}, got one for {signed.consortium!r}; "
                "sign it here."
            )
        return signed

    def startup_kit(self, site: str) -> StartupKit:
        """The signed part of a hospital's kit.

        Raises:
            DocumentError: if it is not as this coordinator signed it.
        """
        path = self.kit_document(site)
        return verify_document(
            read_document(path), StartupKit, public_key=self.coordinator_public_key, origin=str(path)
        )

    def enrolled(self, data: bytes, origin: str) -> EnrolmentRequest:
        """What a hospital sent back, if it is for this consortium and one of its sites.

        Raises:
            DocumentError: if it is damaged.
            ConsortiumError: if it is for another consortium, another coordinator, or a site that is not invited.
        """
        request = verify_self_signed(data, EnrolmentRequest, origin=origin)
        expected = (self.config.name, self.coordinator_public_key)
        if (request.consortium, request.coordinator_key) != expected:
            raise ConsortiumError(
                f"{origin}: expected an enrolment in {self.config.name!r} with this coordinator, got one in "
                f"{request.consortium!r}{'' if request.consortium != self.config.name else ' with another'}; send the "
                "hospital its kit again."
            )
        if request.site not in self.config.site_names:
            raise ConsortiumError(
                f"{origin}: expected a site of {', '.join(self.config.site_names)}, got {request.site!r}; add it to "
                "CONSORTIUM.toml first."
            )
        return request


def open_consortium(root: Path) -> ConsortiumFolder:
    """The consortium in a folder that ``medfed provision`` made; its configuration and key have been read.

    Raises:
        ConsortiumError: if there is none.
        SiteError: if its key cannot be used.
    """
    folder = ConsortiumFolder(root.resolve())
    if not folder.consortium_file.is_file():
        raise ConsortiumError(f"Expected a consortium's folder at {root}, got none; run 'medfed provision' first.")
    folder.config  # noqa: B018 - read to be checked
    folder.coordinator_key()
    return folder
