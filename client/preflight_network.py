"""Preflight of the way to the server: name, connection, certificate, answer, clock; through a proxy if one is set.

The request is made as Flower makes its own (httpx, TLS with the consortium's authority alone, ``HTTPS_PROXY`` and
``NO_PROXY`` honoured). It is a GET of ``/health``, which needs no credentials; any HTTP answer over verified TLS will
do. Nothing about the site is sent.
"""

from __future__ import annotations

import socket
import ssl
import time
from collections.abc import Iterator
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from typing import Any
from urllib.request import getproxies, proxy_bypass

from client.preflight_check import Check, Outcome, Part, PreflightInputs
from client.preflight_site import FLOWER_SERIES

_NETWORK: Part = "network"

TIMEOUT_S = 10.0
AHEAD_S, BEHIND_S = 5.0, 305.0
"""Flower refuses a node whose signed time is this far ahead of the server's clock, or behind it.

Source: flwr 1.41 ``flwr/superlink/routers/fleet/node_auth.py``: SYSTEM_TIME_TOLERANCE, and that + TIMESTAMP_TOLERANCE.
"""

WARN_S = 2.0
"""Difference of clocks that is pointed out: a synchronised clock is within a tenth of it."""

WARN_DAYS = 30
"""Before a certificate's end, from when on it is pointed out."""

_ASK = "ask the coordinator"


def network_checks(inputs: PreflightInputs) -> Iterator[Check]:
    """What a request to the server meets, step by step; the steps after a failed one are not taken."""
    if inputs.server is None:
        return
    address = _address(inputs.server)
    if isinstance(address, Check):
        yield address
        return
    host, port = address
    context = _context(inputs)
    if isinstance(context, Check):
        yield context
        return
    proxy = None if proxy_bypass(host) else getproxies().get("https") or getproxies().get("all")
    if proxy:
        yield Check(_NETWORK, "proxy", "ok", f"the way goes through {_without_password(proxy)} (HTTPS_PROXY)")
    else:
        reached = _connect(host, port)
        yield reached
        if reached.outcome == "fail":
            return
    yield from _request(host, port, context, proxied=bool(proxy))


def _address(server: str) -> tuple[str, int] | Check:
    host, _, port = server.rpartition(":")
    host = host.removeprefix("[").removesuffix("]")
    if host and "/" not in host and port.isdecimal() and 0 < int(port[:6]) < 2**16:
        return host, int(port)
    return Check(
        _NETWORK, "server address", "fail", f"expected host:port, got {server!r}.", "correct it; no https:// before it."
    )


def _context(inputs: PreflightInputs) -> ssl.SSLContext | Check:
    """Trusts the consortium's authority and nobody else, as Flower's client does."""
    name = "certificate authority"
    if inputs.ca_certificate is None:
        return Check(_NETWORK, name, "fail", "none is named.", f"{_ASK} for the consortium's ca.crt.")
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    try:
        context.load_verify_locations(cadata=inputs.ca_certificate)
    except (ValueError, ssl.SSLError):
        return Check(
            _NETWORK,
            name,
            "fail",
            "what is named is no certificate in PEM.",
            f"{_ASK} for the consortium's ca.crt again.",
        )
    return context


def _connect(host: str, port: int) -> Check:
    try:
        addresses = {str(found[4][0]) for found in socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)}
    except (OSError, UnicodeError):
        return Check(
            _NETWORK,
            "name",
            "fail",
            f"{host} is not known to this machine's name service.",
            f"{_ASK} for the name, or the network team for its entry or for the proxy (HTTPS_PROXY).",
        )
    began = time.monotonic()
    try:
        with socket.create_connection((host, port), timeout=TIMEOUT_S):
            took_ms = (time.monotonic() - began) * 1000
    except OSError as error:
        reason = "no answer" if isinstance(error, TimeoutError) else (error.strerror or str(error))
        return Check(
            _NETWORK,
            "connection",
            "fail",
            f"{host} ({', '.join(sorted(addresses))}), TCP port {port}: {reason}.",
            f"ask the network team to allow outgoing TCP to {host}:{port}, or for the proxy (HTTPS_PROXY); "
            "if it is allowed, the server may be down.",
        )
    return Check(
        _NETWORK, "connection", "ok", f"{host} ({', '.join(sorted(addresses))}), TCP port {port}: {took_ms:.0f} ms"
    )


def _request(host: str, port: int, context: ssl.SSLContext, *, proxied: bool) -> Iterator[Check]:
    import httpx

    shown = f"[{host}]" if ":" in host else host
    try:
        with httpx.Client(verify=context, timeout=TIMEOUT_S, follow_redirects=False) as client:
            before = time.time()
            with client.stream("GET", f"https://{shown}:{port}/health") as answer:
                after = time.time()
                certificate = answer.extensions["network_stream"].get_extra_info("ssl_object").getpeercert()
            yield _certificate(certificate, host)
            yield Check(
                _NETWORK,
                "server",
                "ok" if answer.status_code == httpx.codes.OK else "warn",
                f"answers {answer.status_code} over verified TLS in {(after - before) * 1000:.0f} ms",
                "" if answer.status_code == httpx.codes.OK else f"{_ask_if()} another program listens there.",
            )
            yield _clock(answer.headers.get("date"), before, after)
            yield from _flower_version(client, f"https://{shown}:{port}")
    except httpx.HTTPError as error:
        yield _refused(error, host, port, proxied=proxied)


def _ask_if() -> str:
    return f"{_ASK} whether the server is in order, or"


def _certificate(certificate: dict[str, Any], host: str) -> Check:
    ends = datetime.fromtimestamp(ssl.cert_time_to_seconds(certificate["notAfter"]), UTC)
    begins = datetime.fromtimestamp(ssl.cert_time_to_seconds(certificate["notBefore"]), UTC)
    days = (ends - datetime.now(UTC)).days
    issuer = dict(pair for part in certificate.get("issuer", ()) for pair in part).get("commonName", "the authority")
    told = f"for {host}, by {issuer}, valid {begins:%Y-%m-%d} to {ends:%Y-%m-%d}, {days} days left"
    if days < WARN_DAYS:
        return Check(_NETWORK, "certificate", "warn", f"{told}.", f"{_ASK} to renew it in time.")
    return Check(_NETWORK, "certificate", "ok", told)


def _clock(date: str | None, before: float, after: float) -> Check:
    """This machine's clock against the Date header, which counts whole seconds."""
    try:
        server = parsedate_to_datetime(date or "").timestamp() + 0.5
    except ValueError:
        return Check(
            _NETWORK,
            "clock",
            "warn",
            "the server does not say what time it is.",
            "see that this clock is synchronised.",
        )
    return clock_check((before + after) / 2 - server)


def clock_check(ahead_s: float) -> Check:
    """What a clock that is so far ahead of the server's (or behind it, if negative) means for this site."""
    told = f"{abs(ahead_s):.0f} s {'ahead of' if ahead_s > 0 else 'behind'} the server's (within 1 s)"
    limits = f"the server refuses a site that is {AHEAD_S:g} s ahead or {BEHIND_S:g} s behind"
    outcome: Outcome = "ok"
    if abs(ahead_s) > WARN_S:
        outcome = "fail" if ahead_s >= AHEAD_S - 1 or ahead_s <= 1 - BEHIND_S else "warn"
    if outcome == "ok":
        return Check(_NETWORK, "clock", "ok", told)
    return Check(_NETWORK, "clock", outcome, f"{told}; {limits}.", "synchronise this machine's clock (NTP).")


def _flower_version(client: Any, base_url: str) -> Iterator[Check]:
    """The server's Flower, where it says so: its API description carries the version and needs no credentials."""
    import httpx

    try:
        said = client.get(f"{base_url}/openapi.json").json()["info"]["version"]
    except (httpx.HTTPError, ValueError, KeyError, TypeError):
        return  # it need not say; a version that does not fit is refused when the site connects
    version = str(said) if isinstance(said, str) and len(said) < 20 and said.isprintable() else "unreadable"
    if version == FLOWER_SERIES or version.startswith(f"{FLOWER_SERIES}."):
        yield Check(_NETWORK, "server's Flower", "ok", f"version {version}")
    else:
        yield Check(
            _NETWORK,
            "server's Flower",
            "fail",
            f"version {version}; this site works with {FLOWER_SERIES}.",
            f"{_ASK} which version the consortium runs, and install the medfed release for it.",
        )


_OF_CERTIFICATE = {
    9: ("is not valid yet", "check this machine's clock; if it is right, ask the coordinator for another certificate."),
    10: ("has expired", "check this machine's clock; if it is right, ask the coordinator to renew the certificate."),
    62: ("is not for this name", "use the name in the certificate, or ask the coordinator for one with this name."),
    64: ("is not for this address", "use the name in the certificate instead of a number."),
}
"""OpenSSL's verification errors (openssl-verification-options(1)) that are no question of trust."""


def _refused(error: Exception, host: str, port: int, *, proxied: bool) -> Check:
    import httpx

    chain = list(_causes(error))
    for cause in chain:
        if isinstance(cause, ssl.SSLCertVerificationError):
            untrusted = (
                "was not issued by the consortium's authority",
                f"if a firewall or proxy opens TLS, ask the network team to let {host}:{port} through unopened; "
                "else ask the coordinator for the current ca.crt.",
            )
            told, what_to_do = _OF_CERTIFICATE.get(cause.verify_code, untrusted)
            return Check(
                _NETWORK, "certificate", "fail", f"the certificate {told} ({cause.verify_message}).", what_to_do
            )
    if isinstance(error, httpx.ProxyError) or (proxied and isinstance(error, httpx.ConnectError)):
        reason = " ".join(str(error).split())[:100]
        return Check(
            _NETWORK,
            "proxy",
            "fail",
            f"the proxy did not let the request through: {reason or type(error).__name__}.",
            f"ask the network team to allow CONNECT to {host}:{port} (407: credentials go into HTTPS_PROXY).",
        )
    if any(isinstance(cause, ssl.SSLError) for cause in chain):
        return Check(
            _NETWORK,
            "TLS",
            "fail",
            "something answers on this port, but not with TLS.",
            "check the port; ask the coordinator whether the server runs with certificates.",
        )
    return Check(
        _NETWORK,
        "server",
        "fail",
        f"no HTTP answer: {type(error).__name__}.",
        f"{_ASK} whether the server runs; a firewall may cut the connection.",
    )


def _causes(error: BaseException) -> Iterator[BaseException]:
    seen: set[int] = set()
    current: BaseException | None = error
    while current is not None and id(current) not in seen:
        seen.add(id(current))
        yield current
        current = current.__cause__ or current.__context__


def _without_password(proxy: str) -> str:
    scheme, separator, rest = proxy.rpartition("://")
    return f"{scheme}{separator}{rest.rpartition('@')[2]}"
