"""A small HTTP server on loopback, on a thread of its own, for services that we only have the description of."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread
from typing import Any
from urllib.parse import parse_qsl, urlsplit


@dataclass(frozen=True, slots=True)
class Asked:
    """path: decoded no further. body: as it came."""

    method: str
    path: str
    query: Mapping[str, str]
    headers: Mapping[str, str]
    body: bytes

    @property
    def members(self) -> dict[str, Any]:
        said: dict[str, Any] = json.loads(self.body)
        return said


GZIP = b"\x1f\x8b"  # what begins so is sent as a compressed answer
Answer = tuple[int, Mapping[str, object] | bytes]


class Loopback:
    """answer: status, and JSON or bytes as they are, for each request. Its exceptions are 500, and show in the test as such."""

    def __init__(self, answer: Callable[[Asked], Answer]) -> None:
        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_POST(self) -> None:
                parts = urlsplit(self.path)
                body = self.rfile.read(int(self.headers.get("content-length") or 0))
                headers = {name.lower(): value for name, value in self.headers.items()}
                asked = Asked(self.command, parts.path, dict(parse_qsl(parts.query)), headers, body)
                try:
                    status, members = answer(asked)
                except Exception as exc:  # noqa: BLE001 - the test sees it as 500
                    status, members = 500, {"stand": repr(exc)}
                content = members if isinstance(members, bytes) else json.dumps(members).encode()
                self.send_response(status)
                self.send_header("content-type", "application/json")
                if content.startswith(GZIP):
                    self.send_header("content-encoding", "gzip")
                self.send_header("content-length", str(len(content)))
                self.end_headers()
                self.wfile.write(content)

            do_GET = do_POST

            def log_message(self, *_arguments: object) -> None:
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self.port: int = self._server.server_address[1]
        self.origin = f"http://127.0.0.1:{self.port}"
        self._thread = Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)
        self._thread.start()

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join(10)
