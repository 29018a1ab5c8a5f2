"""What a person's machine keeps, in the wrong hands: a saved login, and the stored state of a running answer."""

from __future__ import annotations

import secrets
import threading
import time
import webbrowser
from collections.abc import Callable, Iterator
from pathlib import Path

import httpx2
import pytest

import lacre
from hostile.attacks import Verdict, attack
from lacre.cli.link_file import LinkFile
from lacre.exchange.stream_state import LIFETIME, StreamState
from lacre.jose.jws import raw_public_key
from lacre.transport.browser_grant import in_browser
from lacre.transport.device_grant import LoginServer
from lacre.transport.login import LoginStore, SavedLogin, login_http
from lacre_backend.api.app import create_app
from parts import login_server
from parts.echo_engine import EchoEngine
from parts.link_browser import LinkBrowser
from parts.relay import Relay, connect

ISSUER = "https://login.example"
SAVED = SavedLogin(ISSUER, f"{ISSUER}/token", "app", None, "s3cret")
KEY = secrets.token_bytes(32)


@pytest.fixture
def relay() -> Iterator[Relay]:
    yield Relay(create_app([EchoEngine(name="tiny")]))


def stored(relay: Relay) -> str:
    """The state of an answer that another process could continue."""
    with connect(relay) as client:
        stream = client.chat_stream("A prompt that is nobody else's.", max_tokens=60)
        next(stream)
        state = stream.state(KEY)
        stream.close()
    return state


@attack("give a person a connection string of another deployment, to be sent the token of their login", "machine",
        "a login is kept by the root that its clients pin", lacre.SettingsError)  # fmt: skip
def test_another_deployment(verdict: Verdict, relay: Relay, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))
    monkeypatch.delenv("LACRE_TOKEN", raising=False)
    LoginStore(tmp_path / "lacre", raw_public_key(relay.root), None).save(SAVED)
    connect(relay, token=None).close()
    thief = Relay(create_app([EchoEngine(name="tiny")]))
    with verdict.refused():
        connect(thief, token=None)


@attack("read a one-time link in the arguments of the person's browser", "machine",
        "a browser gets a link with a secret in a private file")  # fmt: skip
def test_arguments(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    browser, link = LinkBrowser(tmp_path), f"http://127.0.0.1:9/?key={secrets.token_urlsafe()}"
    for name, value in (browser.env() | {"XDG_STATE_HOME": str(tmp_path)}).items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(webbrowser, "_tryorder", None)  # what it found before, in another environment
    with LinkFile("link", link, instead="") as file:
        assert file.open()
        call = browser.called()
    assert link in call.page and call.mode == "0o100600"
    assert link not in call.arguments and not file.path.exists()


@attack("read or continue an answer by its stored state, without the key", "machine",
        "the state is encrypted under a key that only the caller has", lacre.UsageError)  # fmt: skip
def test_without_the_key(verdict: Verdict, relay: Relay) -> None:
    with connect(relay) as thief, verdict.refused():
        thief.continue_stream(stored(relay), key=secrets.token_bytes(32))


@attack("have a stored state continued at another deployment, which then reads the prompt", "machine",
        "the root that the client pins is part of the encryption (AAD)", lacre.UsageError)  # fmt: skip
def test_at_another_deployment(verdict: Verdict, relay: Relay) -> None:
    other = Relay(create_app([EchoEngine(name="tiny")]))
    with connect(other) as client, verdict.refused():
        client.continue_stream(stored(relay), key=KEY)
    assert not other.sealed


@attack("continue an answer by a state that was stored long ago", "machine", "a state lives for 15 minutes",
        lacre.Expired)  # fmt: skip
def test_an_old_state(verdict: Verdict, relay: Relay) -> None:
    root, now = raw_public_key(relay.root), time.time()
    with verdict.refused():
        StreamState.open(stored(relay), KEY, root, now + LIFETIME + 60)


def visited(issuer: login_server.LoginServer, visit: Callable[[str], str]) -> SavedLogin:
    """A login in a browser that goes to this address, made from the page that it was shown."""
    threads: list[threading.Thread] = []

    def opening(page: str) -> None:
        threads.append(threading.Thread(target=httpx2.get, args=[visit(page)]))
        threads[-1].start()

    with login_http(issuer.transport) as http:
        try:
            return in_browser(http, LoginServer.discover(http, ISSUER), "app", None, opening, most=2)
        finally:
            threads[0].join(20)


@attack("log a person in to an account of the thief's, by sending their browser to the waiting port", "machine",
        "the port takes only an answer with this login's random `state`", lacre.Unauthenticated)  # fmt: skip
def test_a_foreign_answer(verdict: Verdict) -> None:
    issuer = login_server.LoginServer(ISSUER)
    with verdict.refused():
        visited(issuer, lambda page: issuer.confirmed(page, state="guessed"))
    assert not issuer.asked


@attack("have the code of one login server sent to another one", "machine",
        "the answer names its issuer, which must be the one that was asked (RFC 9207)", lacre.Unauthenticated)  # fmt: skip
def test_a_mix_up(verdict: Verdict) -> None:
    issuer = login_server.LoginServer(ISSUER)
    with verdict.refused():
        visited(issuer, lambda page: issuer.confirmed(page, iss="https://evil.example"))
    assert not issuer.asked


@attack("describe the login server with an address that is not encrypted, to read refresh tokens", "machine",
        "a secret goes to https addresses or loopback alone", lacre.InvalidMessage)  # fmt: skip
def test_in_the_clear(verdict: Verdict) -> None:
    issuer = login_server.LoginServer(ISSUER)
    issuer.members = {"token_endpoint": "http://login.example/token"}
    with login_http(issuer.transport) as http, verdict.refused():
        LoginServer.discover(http, ISSUER)
