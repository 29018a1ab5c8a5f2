"""An issuer of the authorization code flow on a loopback port, which really signs, and lies where a test says so."""

from __future__ import annotations

import base64
import hashlib
import json
import secrets
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, urlsplit

import jwt

from parts.issuer import AUDIENCE, Issuer

CLIENT = "console"


class CodeIssuer:
    """identity, access: over the claims of its tokens; None leaves a claim out. answer: over its token answer.

    described: over its metadata. status: of the token endpoint. padding: bytes that it adds.
    """

    def __init__(self, issuer: Issuer, port: int) -> None:
        self._issuer = issuer
        self.url = f"http://127.0.0.1:{port}"
        self.identity: dict[str, Any] = {}
        self.access: dict[str, Any] = {}
        self.answer: dict[str, Any] = {}
        self.described: dict[str, Any] = {}
        self.signer = issuer
        self.status = 200
        self.padding = 0
        self.asked: list[dict[str, str]] = []
        self._codes: dict[str, dict[str, str]] = {}

    def agree(self, address: str) -> dict[str, str]:
        """What a person's browser brings back from the authorization endpoint: code, state and issuer."""
        asked = {name: values[0] for name, values in parse_qs(urlsplit(address).query).items()}
        code = secrets.token_hex(8)
        self._codes[code] = asked
        return {"code": code, "state": asked["state"], "iss": self.url}

    def metadata(self) -> dict[str, Any]:
        return {
            "issuer": self.url, "authorization_endpoint": f"{self.url}/auth", "token_endpoint": f"{self.url}/token",
            **self.described,
        }  # fmt: skip

    def tokens(self, form: dict[str, str]) -> tuple[int, dict[str, Any]]:
        self.asked.append(form)
        begun = self._codes.pop(form.get("code", ""), None)
        proof = base64.urlsafe_b64encode(hashlib.sha256(form.get("code_verifier", "").encode()).digest()).rstrip(b"=").decode()
        if begun is None or begun["code_challenge"] != proof or begun["redirect_uri"] != form.get("redirect_uri"):
            return 400, {"error": "invalid_grant"}
        now = int(time.time())
        usual = {"iss": self.url, "sub": "root", "iat": now, "exp": now + 600}
        identity = {**usual, "aud": CLIENT, "nonce": begun["nonce"], "auth_time": now, **self.identity}
        access = {**usual, "aud": AUDIENCE, "tenant": "acme", "scope": "lacre:admin", **self.access}
        said = {"access_token": self._signed(access), "id_token": self._signed(identity), "token_type": "Bearer"}
        return self.status, {**said, **self.answer, "padding": "x" * self.padding}

    def _signed(self, claims: dict[str, Any]) -> str:
        kept = {name: value for name, value in claims.items() if value is not None}
        return jwt.encode(kept, self.signer.ed, algorithm="EdDSA", headers={"kid": "ed"})


@contextmanager
def code_issuer(issuer: Issuer) -> Iterator[CodeIssuer]:
    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self._say(200, found.metadata())

        def do_POST(self) -> None:
            content = self.rfile.read(int(self.headers["content-length"])).decode()
            self._say(*found.tokens({name: values[0] for name, values in parse_qs(content).items()}))

        def _say(self, status: int, said: dict[str, Any]) -> None:
            body = json.dumps(said).encode()
            self.send_response(status)
            self.send_header("content-type", "application/json")
            self.send_header("content-length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_args: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    found = CodeIssuer(issuer, server.server_address[1])
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05})
    thread.start()
    try:
        yield found
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
