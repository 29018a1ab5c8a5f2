"""A login server that really issues: the device grant, the code grant with PKCE, and refresh tokens that change at each use."""

from __future__ import annotations

import base64
import hashlib
import json
import secrets
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, urlencode, urlsplit

import httpx2

from parts.relay import served

DEVICE_GRANT = "urn:ietf:params:oauth:grant-type:device_code"


class LoginServer:
    """verdicts: what it says of the device code, one after the other: an error, or None for yes. life: of access tokens, in
    seconds. members: over those of its description. revoked: whether a refresh token came twice, or was made void.
    """

    def __init__(self, issuer: str = "https://login.example", *verdicts: str | None, life: float = 300.0) -> None:
        self.issuer = issuer
        self.verdicts = list(verdicts)
        self.life = life
        self.members: dict[str, Any] = {}
        self.interval: Any = 5
        self.refresh: str | None = None
        self.revoked = False
        self.issued: list[str] = []
        self.asked: list[dict[str, str]] = []
        self._codes: dict[str, dict[str, str]] = {}
        self._lock = threading.Lock()

    @property
    def transport(self) -> httpx2.MockTransport:
        return httpx2.MockTransport(self._respond)

    def _respond(self, request: httpx2.Request) -> httpx2.Response:
        status, body = self.answer(request.method, request.url.path, request.read().decode())
        return served(status, body)

    def answer(self, method: str, path: str, content: str) -> tuple[int, bytes]:
        with self._lock:
            if method == "GET" and path.endswith("/.well-known/openid-configuration"):
                return 200, json.dumps(self._described() | self.members).encode()
            form = {name: values[0] for name, values in parse_qs(content).items()}
            if method == "POST" and path == "/device":
                return 200, json.dumps(self._begun(form)).encode()
            if method == "POST" and path == "/token":
                self.asked.append(form)
                status, told = self._token(form)
                return status, json.dumps(told).encode()
            if method == "POST" and path == "/revoke":
                self.revoked = self.revoked or form["token"] == self.refresh
                return 200, b""
            return 404, b""

    def _described(self) -> dict[str, Any]:
        return {
            "issuer": self.issuer, "token_endpoint": f"{self.issuer}/token",
            "authorization_endpoint": f"{self.issuer}/authorize", "device_authorization_endpoint": f"{self.issuer}/device",
            "revocation_endpoint": f"{self.issuer}/revoke",
        }  # fmt: skip

    def _begun(self, form: dict[str, str]) -> dict[str, Any]:
        page = f"{self.issuer}/activate"
        return {
            "device_code": "d3vice", "user_code": "WDJB-MJHT", "verification_uri": page, "expires_in": 600,
            "verification_uri_complete": f"{page}?user_code=WDJB-MJHT", "interval": self.interval,
        } | ({} if form["client_id"] == "app" else {"device_code": None})  # fmt: skip

    def _token(self, form: dict[str, str]) -> tuple[int, dict[str, Any]]:
        match form["grant_type"]:
            case "refresh_token":
                if self.revoked or form["refresh_token"] != self.refresh:
                    self.revoked = True
                    return 400, {"error": "invalid_grant"}
            case "authorization_code":
                asked = self._codes.pop(form["code"], None)
                digest = hashlib.sha256(form["code_verifier"].encode()).digest()
                challenge = base64.urlsafe_b64encode(digest).rstrip(b"=").decode()
                if asked is None or (asked["code_challenge"], asked["redirect_uri"]) != (challenge, form["redirect_uri"]):
                    return 400, {"error": "invalid_grant"}
            case _:
                assert form["grant_type"] == DEVICE_GRANT and form["device_code"] == "d3vice"
                verdict = self.verdicts.pop(0) if self.verdicts else None
                if verdict is not None:
                    return 400, {"error": verdict}
        self.refresh, access = f"refresh-{secrets.token_hex(4)}", f"access-{len(self.issued)}"
        self.issued.append(access)
        return 200, {"access_token": access, "refresh_token": self.refresh, "token_type": "Bearer", "expires_in": self.life}

    def confirmed(self, page: str, **members: str) -> str:
        """The address that the browser is sent to once the person has logged in. members: over those in it."""
        asked = {name: values[0] for name, values in parse_qs(urlsplit(page).query).items()}
        code = secrets.token_hex(8)
        self._codes[code] = asked
        told = {"code": code, "state": asked["state"], "iss": self.issuer} | members
        return f"{asked['redirect_uri']}?{urlencode(told)}"


@contextmanager
def on_loopback(server: LoginServer) -> Iterator[LoginServer]:
    """Serves it on a free port, which becomes its issuer's."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self._answer("")

        def do_POST(self) -> None:
            self._answer(self.rfile.read(int(self.headers["content-length"])).decode())

        def _answer(self, content: str) -> None:
            status, body = server.answer(self.command, self.path, content)
            self.send_response(status)
            self.send_header("content-length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, format: str, *args: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as listening:
        server.issuer = f"http://127.0.0.1:{listening.server_address[1]}"
        thread = threading.Thread(target=listening.serve_forever)
        thread.start()
        try:
            yield server
        finally:
            listening.shutdown()
            thread.join(30)
