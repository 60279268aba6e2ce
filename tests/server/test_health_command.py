"""``medfed server health``: asks over TLS, and believes the consortium's own certificate alone."""

import ssl
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from medfed.cli import main
from server.consortium_folder import ConsortiumFolder


class Health(BaseHTTPRequestHandler):
    """Answers like the service."""

    def do_GET(self) -> None:
        self.send_response(200 if self.path == "/health" else 404)
        self.end_headers()

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def serve() -> Iterator[Callable[[ConsortiumFolder], str]]:
    servers = []

    def start(folder: ConsortiumFolder) -> str:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(folder.server_certificate, folder.server_key)
        server = ThreadingHTTPServer(("127.0.0.1", 0), Health)
        server.socket = context.wrap_socket(server.socket, server_side=True)
        threading.Thread(target=server.serve_forever, daemon=True).start()
        servers.append(server)
        return f"127.0.0.1:{server.server_address[1]}"

    yield start
    for server in servers:
        server.shutdown()
        server.server_close()


def test_service_of_this_consortium_is_healthy_and_another_or_none_is_not(
    make_consortium: Callable, serve: Callable[[ConsortiumFolder], str], capsys: pytest.CaptureFixture[str]
) -> None:
    own, other = make_consortium("north").coordinator, make_consortium("west", name="others").coordinator
    address = serve(own)
    main(["server", "health", str(own.root), "--superlink", address])
    assert f"{address} answers" in capsys.readouterr().out
    for where in (serve(other), "127.0.0.1:9"):
        with pytest.raises(SystemExit) as ended:
            main(["server", "health", str(own.root), "--superlink", where])
        assert ended.value.code == 18
        assert "start it with 'medfed server start'" in capsys.readouterr().err
