"""What a coordinator and its hospitals hand to each other, each signed by who stands for it.

================  ==================  ==========================================================================
document          signed by           says
================  ==================  ==========================================================================
StartupKit        the coordinator     where the server is, and by which certificate and key it is known
EnrolmentRequest  the site            by which keys the site is known; made at the site, for one coordinator
Roster            the coordinator     which sites are members, with their keys
================  ==================  ==========================================================================

A kit is believed because its fingerprint was compared by telephone, an enrolment likewise; everything else follows.
"""

from __future__ import annotations

import ipaddress
import re
from typing import Annotated, ClassVar, Literal

from cryptography import x509
from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec
from pydantic import AfterValidator, BaseModel, ConfigDict, Field, model_validator

from medfed.signed_document import DocumentBody, SelfSignedBody
from medfed.study_sections import Digest, Name, distinct

_HOST_LABEL = re.compile(r"(?!-)[a-z0-9-]{1,63}(?<!-)")


def _is_host(value: str) -> str:
    try:
        ipaddress.ip_address(value.replace("%", "/"))  # no zone: it means something on one machine alone
    except ValueError:
        labels = value.split(".")
        if len(value) > 253 or not all(map(_HOST_LABEL.fullmatch, labels)) or labels[-1].isdecimal():
            raise ValueError("expected a host name in lower case, or an IP address") from None
    return value


Host = Annotated[str, AfterValidator(_is_host)]
"""DNS name in lower case, or IP address; without scheme and port."""

Port = Annotated[int, Field(ge=1, le=65535)]


def _is_node_key(value: str) -> str:
    try:
        key = serialization.load_ssh_public_key(value.encode())
    except (ValueError, UnsupportedAlgorithm):
        key = None
    if not isinstance(key, ec.EllipticCurvePublicKey) or not isinstance(key.curve, ec.SECP384R1):
        raise ValueError("expected an ecdsa-sha2-nistp384 public key")  # noqa: TRY004 - what pydantic expects
    if node_key_text(key) != value:
        raise ValueError("expected a public key without comment or options")
    return value


def node_key_text(key: ec.EllipticCurvePublicKey) -> str:
    """A site's public key for its connection, in one line of OpenSSH's form and without a comment."""
    return key.public_bytes(serialization.Encoding.OpenSSH, serialization.PublicFormat.OpenSSH).decode()


NodeKey = Annotated[str, Field(max_length=512), AfterValidator(_is_node_key)]
"""P-384 public key in OpenSSH's form, as ``flwr supernode register`` reads it."""


def _is_certificate(value: str) -> str:
    try:
        certificates = x509.load_pem_x509_certificates(value.encode())
    except ValueError:
        certificates = []
    if len(certificates) != 1:
        raise ValueError("expected one certificate in PEM form")
    return value


Certificate = Annotated[str, Field(max_length=16384), AfterValidator(_is_certificate)]
"""X.509 certificate, PEM."""


class ServerAddress(BaseModel):
    """Where the server listens.

    Attributes:
        host: name or address under which sites reach it; its certificate says the same.
        port: the only one.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    host: Host
    port: Port

    def __str__(self) -> str:
        """``host:port``, with brackets around an IPv6 address."""
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"


class StartupKit(SelfSignedBody):
    """What a hospital gets from the coordinator; nothing in it is secret.

    Attributes:
        version: of the format.
        consortium: its name.
        site: the hospital's name in studies.
        server: where to connect to.
        ca_certificate: the only authority by which the server's certificate is believed.
        coordinator_key: Ed25519 public key that signs studies.
    """

    kind: ClassVar[str] = "startup-kit"

    version: Literal[1] = 1
    consortium: Name
    site: Name
    server: ServerAddress
    ca_certificate: Certificate
    coordinator_key: Digest

    @property
    def signer(self) -> str:
        """The coordinator."""
        return self.coordinator_key


class EnrolmentRequest(SelfSignedBody):
    """By which keys a hospital wants to be known; the private halves have never left it.

    Attributes:
        version: of the format.
        consortium: which it joins.
        coordinator_key: whose kit it was made from: another consortium of the same name is another.
        site: name in studies.
        node_key: by which the server knows the site's connection.
        signing_key: Ed25519 public key by which other sites know it in secure aggregation; signs this request.
    """

    kind: ClassVar[str] = "enrolment"

    version: Literal[1] = 1
    consortium: Name
    coordinator_key: Digest
    site: Name
    node_key: NodeKey
    signing_key: Digest

    @property
    def signer(self) -> str:
        """The site."""
        return self.signing_key


RosterSerial = Annotated[int, Field(ge=1, lt=2**53)]
"""The time at which the members changed, in seconds since 1970, or one more than the serial before if that is later.

A coordinator who lost the roster need not know which serial the last one had.
"""


class Member(BaseModel):
    """A site that has enrolled.

    Attributes:
        site: name in studies.
        node_key: as in its request.
        signing_key: likewise.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    site: Name
    node_key: NodeKey
    signing_key: Digest

    @property
    def public_node_key(self) -> ec.EllipticCurvePublicKey:
        """The node's key, ready to be used."""
        key = serialization.load_ssh_public_key(self.node_key.encode())
        assert isinstance(key, ec.EllipticCurvePublicKey)  # NodeKey takes no other
        return key


class Roster(DocumentBody):
    """The sites that have enrolled.

    Attributes:
        version: of the format.
        consortium: whose.
        serial: grows whenever the members change: a roster says of itself which of two is the newer one.
        members: in the order of CONSORTIUM.toml; no key belongs to two of them.
    """

    kind: ClassVar[str] = "roster"

    version: Literal[2] = 2
    consortium: Name
    serial: RosterSerial
    members: tuple[Member, ...]

    @model_validator(mode="after")
    def _members_are_distinct(self) -> Roster:
        distinct(tuple(member.site for member in self.members), "site")
        distinct(tuple(member.node_key for member in self.members), "node_key")
        distinct(tuple(member.signing_key for member in self.members), "signing_key")
        return self

    def member(self, site: str) -> Member | None:
        """The member of this name, if it has enrolled."""
        return next((member for member in self.members if member.site == site), None)
