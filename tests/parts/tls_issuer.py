"""An OpenID provider behind TLS: its discovery document, its keys, and tokens that it signs, as a real server on loopback."""

from __future__ import annotations

import json
import ssl
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

from parts.certificates import DAY, Ca
from parts.issuer import Issuer

DISCOVERY = "/.well-known/openid-configuration"


class TlsIssuer:
    """url: its address, and the `iss` of its tokens. asked: the paths that somebody got."""

    def __init__(self, url: str) -> None:
        self.url = url
        self.asked: list[str] = []
        self._issuer = Issuer()

    def token(self, **claims: object) -> str:
        return self._issuer.token(iss=self.url, **claims)

    def document(self, path: str) -> object:
        """None if it has none there."""
        self.asked.append(path)
        described = {"issuer": self.url, "jwks_uri": f"{self.url}/keys"}
        return {DISCOVERY: described, "/keys": self._issuer.jwks()}.get(path)


@contextmanager
def running(ca: Ca, folder: Path, host: str = "localhost", until: timedelta = 30 * DAY) -> Iterator[TlsIssuer]:
    """Served with a certificate for `host` that `ca` signed, valid for `until` from now; its files are in `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    pair = ca.issue(folder, "issuer", hosts=[host], until=until)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(pair.certificate, pair.key)

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            found = issuer.document(self.path)
            content = json.dumps(found).encode()
            self.send_response(404 if found is None else 200)
            self.send_header("content-length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

        def log_message(self, *_: object) -> None: ...

    class Server(ThreadingHTTPServer):
        def handle_error(self, request: object, client_address: object) -> None:
            """A client that does not trust the certificate hangs up, which is no error of this server."""

    server = Server(("127.0.0.1", 0), Handler)
    server.socket = context.wrap_socket(server.socket, server_side=True, do_handshake_on_connect=False)
    issuer = TlsIssuer(f"https://localhost:{server.server_address[1]}")
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05})
    thread.start()
    try:
        yield issuer
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
