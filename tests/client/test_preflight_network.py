"""Preflight of the way to the server: every way to fail has a line of its own that says who can mend it."""

import os
import signal
import socket
import ssl
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from http.server import BaseHTTPRequestHandler, HTTPServer
from ipaddress import ip_address
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

from client.preflight_check import Check, PreflightInputs
from client.preflight_network import AHEAD_S, BEHIND_S, clock_check, network_checks


class Authority:
    """A certificate authority of a test."""

    def __init__(self, folder: Path, name: str = "consortium") -> None:
        self.folder = folder
        self.key = ec.generate_private_key(ec.SECP256R1())
        self.name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
        certificate = self._build(self.name, self.key, days=(-1, 30), is_authority=True)
        self.pem = certificate.public_bytes(serialization.Encoding.PEM).decode()

    def issue(self, *, days: tuple[float, float] = (-1, 90), host: str = "127.0.0.1") -> tuple[Path, Path]:
        """Certificate and key files of a server."""
        key = ec.generate_private_key(ec.SECP256R1())
        subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "server")])
        certificate = self._build(subject, key, days=days, is_authority=False, host=host)
        files = self.folder / "server.pem", self.folder / "server.key"
        files[0].write_bytes(certificate.public_bytes(serialization.Encoding.PEM))
        files[1].write_bytes(
            key.private_bytes(
                serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
            )
        )
        return files

    def _build(
        self,
        subject: x509.Name,
        key: ec.EllipticCurvePrivateKey,
        *,
        days: tuple[float, float],
        is_authority: bool,
        host: str = "",
    ) -> x509.Certificate:
        now = datetime.now(UTC)
        builder = (
            x509.CertificateBuilder()
            .subject_name(subject)
            .issuer_name(self.name)
            .public_key(key.public_key())
            .serial_number(x509.random_serial_number())
            .not_valid_before(now + timedelta(days=days[0]))
            .not_valid_after(now + timedelta(days=days[1]))
            .add_extension(x509.BasicConstraints(ca=is_authority, path_length=None), critical=True)
        )
        if not is_authority:
            names: list[x509.GeneralName] = [
                x509.IPAddress(ip_address(host)) if host[0].isdigit() else x509.DNSName(host)
            ]
            builder = builder.add_extension(x509.SubjectAlternativeName(names), critical=False)
        return builder.sign(self.key, hashes.SHA256())


@pytest.fixture(autouse=True)
def _no_proxy(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("HTTPS_PROXY", "HTTP_PROXY", "ALL_PROXY", "NO_PROXY"):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.lower(), raising=False)


@pytest.fixture
def authority(tmp_path: Path) -> Authority:
    return Authority(tmp_path)


@contextmanager
def listening(server: HTTPServer) -> Iterator[int]:
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        yield server.server_address[1]
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


class Answers(BaseHTTPRequestHandler):
    """Answers as the server does; its clock can be set."""

    clock_ahead_s = 0.0
    status = 200

    def do_GET(self) -> None:
        self.send_response_only(self.status)
        self.send_header("Date", self.date_time_string(time.time() + self.clock_ahead_s))
        body = b'{"info": {"version": "1.41.0"}}' if self.path == "/openapi.json" else b""
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        pass


class Quiet(HTTPServer):
    """Does not tell of clients that leave during the handshake."""

    def handle_error(self, *_: object) -> None:
        pass

    def get_request(self) -> tuple[socket.socket, object]:
        try:
            return super().get_request()
        except ssl.SSLError as error:
            raise OSError from error


def with_tls(files: tuple[Path, Path], handler: type[BaseHTTPRequestHandler] = Answers) -> HTTPServer:
    server = Quiet(("127.0.0.1", 0), handler)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(*files)
    server.socket = context.wrap_socket(server.socket, server_side=True)
    return server


def looked_at(port: int, pem: str | None, host: str = "127.0.0.1") -> dict[str, Check]:
    inputs = PreflightInputs(site_name="north", manifests=(), server=f"{host}:{port}", ca_certificate=pem)
    checks = list(network_checks(inputs))
    assert all(check.what_to_do for check in checks if check.outcome != "ok")
    return {check.name: check for check in checks}


def test_server_in_order_passes_every_step(authority: Authority) -> None:
    with listening(with_tls(authority.issue())) as port:
        checks = looked_at(port, authority.pem)
    assert [(check.name, check.outcome) for check in checks.values()] == [
        (name, "ok") for name in ("connection", "certificate", "server", "clock", "server's Flower")
    ]
    assert "by consortium" in checks["certificate"].found
    assert "89 days left" in checks["certificate"].found


@pytest.mark.parametrize(
    ("days", "host", "found", "what_to_do"),
    [
        ((-9, -1), "127.0.0.1", "has expired", "renew the certificate"),
        ((1, 9), "127.0.0.1", "is not valid yet", "check this machine's clock"),
        ((-1, 90), "other.example", "is not for this address", "name in the certificate"),
    ],
)
def test_certificate_that_does_not_hold_is_told_apart(
    authority: Authority, days: tuple[float, float], host: str, found: str, what_to_do: str
) -> None:
    with listening(with_tls(authority.issue(days=days, host=host))) as port:
        check = looked_at(port, authority.pem)["certificate"]
    assert check.outcome == "fail"
    assert found in check.found
    assert what_to_do in check.what_to_do


def test_certificate_for_another_name_is_refused(authority: Authority) -> None:
    with listening(with_tls(authority.issue(host="other.example"))) as port:
        check = looked_at(port, authority.pem, host="localhost").get("certificate")
    assert check is not None
    assert "is not for this name" in check.found


def test_certificate_of_another_authority_is_refused(authority: Authority, tmp_path: Path) -> None:
    (tmp_path / "other").mkdir()
    with listening(with_tls(authority.issue())) as port:
        check = looked_at(port, Authority(tmp_path / "other", "firewall").pem)["certificate"]
    assert (check.outcome, "not issued by the consortium's" in check.found) == ("fail", True)
    assert "opens TLS" in check.what_to_do


def test_certificate_near_its_end_is_pointed_out(authority: Authority) -> None:
    with listening(with_tls(authority.issue(days=(-60, 10)))) as port:
        check = looked_at(port, authority.pem)["certificate"]
    assert (check.outcome, "9 days left" in check.found) == ("warn", True)


def test_server_without_tls_is_told(authority: Authority) -> None:
    with listening(Quiet(("127.0.0.1", 0), Answers)) as port:
        assert "not with TLS" in looked_at(port, authority.pem)["TLS"].found


def test_closed_port_is_the_network_teams(authority: Authority) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        check = looked_at(taken.getsockname()[1], authority.pem)["connection"]
    assert check.outcome == "fail"
    assert "allow outgoing TCP" in check.what_to_do


def test_unknown_name_is_told(authority: Authority) -> None:
    assert looked_at(443, authority.pem, host="nowhere.invalid")["name"].outcome == "fail"


@pytest.mark.parametrize("server", ["", "host", "host:", "host:0", "host:65536", "https://host:443", "host:x", ":443"])
def test_address_that_is_none_is_told(authority: Authority, server: str) -> None:
    inputs = PreflightInputs(site_name="north", manifests=(), server=server, ca_certificate=authority.pem)
    assert [(check.name, check.outcome) for check in network_checks(inputs)] == [("server address", "fail")]


@pytest.mark.parametrize("pem", [None, "", "no certificate", "-----BEGIN CERTIFICATE-----\nAA==\n"])
def test_authority_that_is_none_is_told(pem: str | None) -> None:
    assert looked_at(443, pem)["certificate authority"].outcome == "fail"


def test_other_answers_are_pointed_out(authority: Authority) -> None:
    handler = type("Teapot", (Answers,), {"status": 404})
    with listening(with_tls(authority.issue(), handler)) as port:
        assert looked_at(port, authority.pem)["server"].outcome == "warn"


class Proxy(BaseHTTPRequestHandler):
    """Connects through, or does not."""

    refuses = False
    asked: list[str]

    def do_CONNECT(self) -> None:
        self.asked.append(self.path)
        if self.refuses:
            self.send_error(407)
            return
        host, _, port = self.path.rpartition(":")
        with socket.create_connection((host, int(port))) as there:
            self.send_response_only(200)
            self.end_headers()
            back = threading.Thread(target=self._pass_on, args=(there, self.connection))
            back.start()
            self._pass_on(self.connection, there)
            back.join()
        self.close_connection = True

    @staticmethod
    def _pass_on(source: socket.socket, target: socket.socket) -> None:
        while content := source.recv(65536):
            target.sendall(content)
        target.shutdown(socket.SHUT_WR)

    def log_message(self, *_: object) -> None:
        pass


@pytest.mark.parametrize("refuses", [False, True])
def test_proxy_of_the_environment_is_used_and_its_password_not_shown(
    authority: Authority, monkeypatch: pytest.MonkeyPatch, refuses: bool
) -> None:
    asked: list[str] = []
    handler = type("This", (Proxy,), {"asked": asked, "refuses": refuses})
    with listening(with_tls(authority.issue())) as port, listening(Quiet(("127.0.0.1", 0), handler)) as proxy_port:
        monkeypatch.setenv("HTTPS_PROXY", f"http://user:secret@127.0.0.1:{proxy_port}")
        inputs = PreflightInputs(
            site_name="north", manifests=(), server=f"127.0.0.1:{port}", ca_certificate=authority.pem
        )
        checks = list(network_checks(inputs))
    assert asked
    assert set(asked) == {f"127.0.0.1:{port}"}
    assert "secret" not in repr(checks)
    outcomes = {check.name: check.outcome for check in checks[1:]}
    assert outcomes == ({"proxy": "fail"} if refuses else dict.fromkeys(outcomes, "ok"))
    assert refuses or "certificate" in outcomes


@pytest.mark.parametrize(
    ("ahead_s", "outcome"),
    [
        (0, "ok"),
        (1, "ok"),
        (-1, "ok"),
        (3, "warn"),
        (-3, "warn"),
        (-290, "warn"),
        (4.5, "fail"),
        (60, "fail"),
        (-305, "fail"),
    ],
)
def test_clock_is_held_against_what_the_server_accepts(ahead_s: float, outcome: str) -> None:
    assert clock_check(ahead_s).outcome == outcome


@pytest.mark.parametrize(("server_ahead_s", "outcome"), [(-20.0, "fail"), (20.0, "warn")])
def test_clock_is_compared_with_the_servers(authority: Authority, server_ahead_s: float, outcome: str) -> None:
    handler = type("Late", (Answers,), {"clock_ahead_s": server_ahead_s})
    with listening(with_tls(authority.issue(), handler)) as port:
        check = looked_at(port, authority.pem)["clock"]
    assert check.outcome == outcome
    assert f"{'behind' if server_ahead_s > 0 else 'ahead of'} the server's" in check.found


def test_flower_still_refuses_clocks_beyond_these_limits() -> None:
    from flwr.common.constant import SYSTEM_TIME_TOLERANCE, TIMESTAMP_TOLERANCE

    assert (AHEAD_S, BEHIND_S) == (SYSTEM_TIME_TOLERANCE, SYSTEM_TIME_TOLERANCE + TIMESTAMP_TOLERANCE)


@pytest.mark.process
def test_real_superlink_passes_every_step(authority: Authority, tmp_path: Path) -> None:
    certificate, key = authority.issue()
    (tmp_path / "ca.crt").write_text(authority.pem)
    (tmp_path / "secret").write_text("s" * 32)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    program = "from flwr.superlink.cli import flower_superlink as run; run()"
    command = [
        sys.executable,
        "-c",
        program,
        "--host",
        "127.0.0.1",
        "--port",
        str(port),
        "--ssl-certfile",
        certificate,
        "--ssl-keyfile",
        key,
    ]
    command += ["--ssl-ca-certfile", tmp_path / "ca.crt", "--enable-supernode-auth", "--isolation", "process"]
    command += ["--superexec-auth-secret-file", tmp_path / "secret", "--database", tmp_path / "state.db"]
    environment = {**os.environ, "FLWR_HOME": str(tmp_path / "flwr")}
    with (tmp_path / "log").open("w") as log, subprocess.Popen(
        list(map(str, command)), stdout=log, stderr=log, env=environment, cwd=tmp_path, start_new_session=True
    ) as process:  # fmt: skip
        try:
            checks = wait_for(lambda: looked_at(port, authority.pem), process)
        finally:
            os.killpg(process.pid, signal.SIGKILL)
    assert {check.outcome for check in checks.values()} == {"ok"}, checks
    assert set(checks) == {"connection", "certificate", "server", "clock", "server's Flower"}


def wait_for(look: Callable[[], dict[str, Check]], process: subprocess.Popen[bytes]) -> dict[str, Check]:
    """The first checks that get beyond the connection; the last ones after a minute."""
    end = time.monotonic() + 60
    while True:
        checks = look()
        if "server" in checks or time.monotonic() > end or process.poll() is not None:
            return checks
        time.sleep(0.2)
