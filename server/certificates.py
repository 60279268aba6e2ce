"""The consortium's own certificate authority and the server's certificate.

No public authority is asked and none is believed: hospitals accept the one certificate in their kit, and it signs for
the server's host alone. Profile after RFC 5280.
"""

from __future__ import annotations

import ipaddress
from datetime import UTC, datetime, timedelta

from cryptography import x509
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from medfed.errors import ConsortiumError

AUTHORITY_VALIDITY = timedelta(days=3650)
SERVER_VALIDITY = timedelta(days=825)
"""As long as operating systems accept for a certificate of a private authority."""

RENEW_BEFORE = timedelta(days=60)
"""How long before its end the renewal of a server certificate is asked for."""

_CLOCK_SKEW = timedelta(hours=1)  # hospitals' clocks may be late
_MAX_NAME = 64  # of a common name, RFC 5280


def new_key() -> ec.EllipticCurvePrivateKey:
    """A P-384 key from the operating system's randomness."""
    return ec.generate_private_key(ec.SECP384R1())


def key_pem(key: ec.EllipticCurvePrivateKey) -> bytes:
    """A private key as unencrypted PEM (PKCS #8)."""
    return key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )


def read_key_pem(pem: bytes, origin: str) -> ec.EllipticCurvePrivateKey:
    """The key of :func:`key_pem`.

    Raises:
        ConsortiumError: if it is none.
    """
    try:
        key = serialization.load_pem_private_key(pem, password=None)
    except (ValueError, TypeError):
        key = None
    if not isinstance(key, ec.EllipticCurvePrivateKey):
        raise ConsortiumError(f"Expected an unencrypted EC key at {origin}, got something else; restore the file.")
    return key


def read_certificate(pem: bytes, origin: str) -> x509.Certificate:
    """The certificate of a PEM file.

    Raises:
        ConsortiumError: if it is none.
    """
    try:
        return x509.load_pem_x509_certificate(pem)
    except ValueError:
        raise ConsortiumError(f"Expected a certificate at {origin}, got something else; restore the file.") from None


def certificate_pem(certificate: x509.Certificate) -> bytes:
    """A certificate as PEM."""
    return certificate.public_bytes(serialization.Encoding.PEM)


def make_authority(consortium: str, key: ec.EllipticCurvePrivateKey) -> x509.Certificate:
    """A self-signed certificate that may sign certificates of servers, and no further authorities."""
    name = _name(f"{consortium} authority")
    return (
        _begun(name, name, key.public_key(), AUTHORITY_VALIDITY)
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .add_extension(_usage(signs_certificates=True), critical=True)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
        .sign(key, hashes.SHA384())
    )


def make_server_certificate(
    host: str,
    public_key: ec.EllipticCurvePublicKey,
    *,
    authority: x509.Certificate,
    authority_key: ec.EllipticCurvePrivateKey,
) -> x509.Certificate:
    """A certificate for the server under this host, and on the machine itself if the host is a loopback address."""
    identifier = authority.extensions.get_extension_for_class(x509.SubjectKeyIdentifier).value
    return (
        _begun(_name(host), authority.subject, public_key, SERVER_VALIDITY)
        .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        .add_extension(_usage(signs_certificates=False), critical=True)
        .add_extension(x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH]), critical=False)
        .add_extension(x509.SubjectAlternativeName(_names_of(host)), critical=False)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(public_key), critical=False)
        .add_extension(
            x509.AuthorityKeyIdentifier.from_issuer_subject_key_identifier(identifier),
            critical=False,
        )
        .sign(authority_key, hashes.SHA384())
    )


def check_authority(authority: x509.Certificate, key: ec.EllipticCurvePrivateKey, origin: str) -> None:
    """Refuse an authority's certificate that does not belong to its key.

    Raises:
        ConsortiumError: says what to do.
    """
    if authority.public_key() != key.public_key():
        raise ConsortiumError(
            f"Expected {origin} to belong to the key beside it, got a certificate of another key; restore both files."
        )


def check_server_certificate(
    certificate: x509.Certificate,
    key: ec.EllipticCurvePrivateKey,
    *,
    authority: x509.Certificate,
    host: str,
    origin: str,
) -> None:
    """Refuse a server certificate that no hospital would believe.

    Raises:
        ConsortiumError: names what is wrong: its key, its authority, its host, or its end.
    """
    renew = "run 'medfed provision' with --renew-server-certificate."
    if certificate.public_key() != key.public_key():
        raise ConsortiumError(f"Expected {origin} to belong to the key beside it, got another key's; {renew}")
    try:
        certificate.verify_directly_issued_by(authority)
    except (ValueError, TypeError, InvalidSignature):
        raise ConsortiumError(
            f"Expected {origin} to be signed by the consortium's authority, got another; {renew}"
        ) from None
    names = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    if _names_of(host)[0] not in names:
        raise ConsortiumError(f"Expected {origin} for host {host!r}, got one for another host; {renew}")
    if certificate.not_valid_after_utc <= datetime.now(UTC):
        raise ConsortiumError(
            f"Expected {origin} to be valid, got one that ended on {certificate.not_valid_after_utc:%Y-%m-%d}; {renew}"
        )


def is_ending(certificate: x509.Certificate) -> bool:
    """Whether it is time to renew a certificate."""
    return certificate.not_valid_after_utc - datetime.now(UTC) < RENEW_BEFORE


def _begun(
    subject: x509.Name, issuer: x509.Name, public_key: ec.EllipticCurvePublicKey, validity: timedelta
) -> x509.CertificateBuilder:
    now = datetime.now(UTC).replace(microsecond=0)
    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer)
        .public_key(public_key)
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - _CLOCK_SKEW)
        .not_valid_after(now + validity)
    )


def _usage(*, signs_certificates: bool) -> x509.KeyUsage:
    return x509.KeyUsage(
        digital_signature=not signs_certificates,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        key_cert_sign=signs_certificates,
        crl_sign=signs_certificates,
        encipher_only=False,
        decipher_only=False,
    )


def _name(common_name: str) -> x509.Name:
    return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, common_name[:_MAX_NAME])])


def _names_of(host: str) -> list[x509.GeneralName]:
    """The host first, then the machine's names for itself: the coordinator's own processes connect by them."""
    local: list[x509.GeneralName] = [
        x509.DNSName("localhost"),
        x509.IPAddress(ipaddress.ip_address("127.0.0.1")),
        x509.IPAddress(ipaddress.ip_address("::1")),
    ]
    try:
        name: x509.GeneralName = x509.IPAddress(ipaddress.ip_address(host))
    except ValueError:
        name = x509.DNSName(host)
    return [name, *(other for other in local if other != name)]
