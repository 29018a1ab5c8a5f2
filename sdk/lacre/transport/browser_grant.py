"""OAuth 2.0 for a person at a machine with a browser: the authorization code grant with PKCE (RFC 7636, RFC 8252).

Rules:
- The browser's answer comes to a port of loopback that is open for this one login. It must have the random `state`.
- A thief of the code cannot use it: only this process knows the verifier.
- An answer that names another issuer is refused (RFC 9207).
"""

from __future__ import annotations

import base64
import hashlib
import hmac
import os
import secrets
import sys
import time
import webbrowser
from collections.abc import Callable, Mapping
from http.server import BaseHTTPRequestHandler, HTTPServer
from typing import Final
from urllib.parse import parse_qs, urlencode, urlsplit

import httpx2

from lacre.errors import SettingsError
from lacre.runtime.json_objects import object_in
from lacre.transport.device_grant import LoginServer, refused, saved
from lacre.transport.login import SavedLogin, post

PATH: Final = "/callback"
OFFLINE: Final = "offline_access"  # the scope that asks for a refresh token
MAX_WAIT: Final = 600.0  # seconds for a person to log in
LOOK: Final = 0.5  # seconds between two looks at the time
PATIENCE: Final = 5.0  # seconds for a browser to send its request, once it is connected
_PAGE: Final = b"<!doctype html><title>Lacre</title><p>You can close this page and go back to the terminal."


def has_browser() -> bool:
    """Whether a page opened here reaches a person: not over SSH, and not on a machine without a screen."""
    if "SSH_CONNECTION" in os.environ:
        return False
    screen = sys.platform in ("darwin", "win32") or any(os.environ.get(each) for each in ("DISPLAY", "WAYLAND_DISPLAY"))
    try:
        return screen and webbrowser.get() is not None
    except webbrowser.Error:
        return False


class _Answered(BaseHTTPRequestHandler):
    """Takes the one request with the answer; says 404 to all others."""

    timeout = PATIENCE
    server: _Waiting

    def do_GET(self) -> None:
        where = urlsplit(self.path)
        told = {name: values[0] for name, values in parse_qs(where.query).items()}
        if where.path != PATH or not hmac.compare_digest(told.get("state", "").encode(), self.server.state.encode()):
            self.send_error(404)
            return
        self.server.told = told
        self.send_response(200)
        self.send_header("content-type", "text/html; charset=utf-8")
        self.send_header("content-length", str(len(_PAGE)))
        self.end_headers()
        self.wfile.write(_PAGE)

    def log_message(self, format: str, *args: object) -> None:
        """Nothing: the address has the code."""


class _Waiting(HTTPServer):
    """told: the answer's parameters, once it is there."""

    timeout = LOOK
    told: Mapping[str, str] | None = None

    def __init__(self, state: str) -> None:
        super().__init__(("127.0.0.1", 0), _Answered)
        self.state = state

    def handle_error(self, _request: object, _client_address: object) -> None:
        """Nothing: a browser that closes a connection does no harm."""


def in_browser(
    http: httpx2.Client,
    server: LoginServer,
    client_id: str,
    scope: str | None,
    opening: Callable[[str], object],
    *,
    most: float = MAX_WAIT,
) -> SavedLogin:
    """The login, once the person has confirmed it. opening: shows a page. most: seconds to wait.

    Raises SettingsError, Unauthenticated, Unavailable and NetworkError.
    """
    if server.page_url is None:
        raise SettingsError("the login server has no page for a browser: use --device")
    verifier, state = secrets.token_urlsafe(48), secrets.token_urlsafe(24)
    with _Waiting(state) as waiting:
        back = f"http://127.0.0.1:{waiting.server_address[1]}{PATH}"
        opening(_page(server.page_url, client_id, scope=scope, back=back, state=state, verifier=verifier))
        until = time.monotonic() + most
        while waiting.told is None and time.monotonic() < until:
            waiting.handle_request()
        told = waiting.told
    if told is None:
        raise refused(400, "nobody logged in in time: run `lacre login` again")
    if told.get("iss", server.issuer) != server.issuer:
        raise refused(400, "another login server answered, and nothing was sent to it: run `lacre login` again")
    if "code" not in told:
        raise refused(400, "the login server did not accept the login: check --client-id and --scope, and log in again")
    form = {"grant_type": "authorization_code", "code": told["code"], "redirect_uri": back}
    status, content = post(http, server.token_url, {**form, "client_id": client_id, "code_verifier": verifier})
    if status != 200:
        raise refused(status, "the login server gave no token for the login: run `lacre login` again")
    return saved(server, client_id, scope, object_in(content) or {})


def _page(url: str, client_id: str, *, scope: str | None, back: str, state: str, verifier: str) -> str:
    challenge = base64.urlsafe_b64encode(hashlib.sha256(verifier.encode()).digest()).rstrip(b"=").decode()
    asked = {
        "response_type": "code", "client_id": client_id, "redirect_uri": back, "state": state,
        "code_challenge": challenge, "code_challenge_method": "S256", **({} if scope is None else {"scope": scope}),
    }  # fmt: skip
    if OFFLINE in (scope or "").split():
        asked["prompt"] = "consent"  # else a server may ignore this scope (OpenID Connect Core 1.0 section 11)
    return f"{url}{'&' if '?' in url else '?'}{urlencode(asked)}"
