"""A person's login: by a code on any device or in a browser; how it is kept, renewed and used."""

from __future__ import annotations

import asyncio
import os
import stat
import subprocess
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx2
import pytest

import lacre
from lacre import problems
from lacre.jose.jws import b64u, raw_public_key
from lacre.transport.browser_grant import in_browser
from lacre.transport.device_grant import DeviceCode, LoginServer, is_safe, wait
from lacre.transport.login import LoginStore, OsKeyring, SavedLogin, UserLogin, login_http
from parts import login_server
from parts.chat_app import ChatApp
from parts.link_browser import LinkBrowser
from parts.relay import Relay, connect, connect_async, refusing
from parts.up import LACRE

ISSUER = "https://login.example"
ROOT = bytes(32)
URL = f"lacre://gateway.example?trust={b64u(ROOT)}"
SAVED = SavedLogin(ISSUER, f"{ISSUER}/token", "app", None, "s3cret", f"{ISSUER}/revoke")


def end(store: LoginStore, issuer: login_server.LoginServer | None = None) -> bool:
    """Whether the server made the refresh token void. issuer: a new one if None."""
    with login_http((issuer or login_server.LoginServer(ISSUER)).transport) as http:
        return store.end(http)


def by_device(issuer: login_server.LoginServer, client_id: str = "app") -> tuple[SavedLogin, list[float]]:
    """The login, and how long it slept each time."""
    slept: list[float] = []
    with login_http(issuer.transport) as http:
        server = LoginServer.discover(http, ISSUER)
        asked = DeviceCode.ask(http, server, client_id, "openid")
        assert (asked.page, asked.code) == (f"{ISSUER}/activate", "WDJB-MJHT") and "d3vice" not in repr(asked)
        return wait(http, server, client_id, asked, scope="openid", sleep=slept.append), slept


class TestDevice:
    def test_waits_for_the_person_as_the_server_asks(self) -> None:
        issuer = login_server.LoginServer(ISSUER, "authorization_pending", "slow_down", None)
        saved, slept = by_device(issuer)
        assert (saved.issuer, saved.client_id, saved.scope, saved.refresh_token) == (ISSUER, "app", "openid", issuer.refresh)
        assert slept == [5, 5, 10] and saved.refresh_token not in repr(saved)

    @pytest.mark.parametrize(
        ("verdict", "said"), [("access_denied", "you refused"), ("expired_token", "ended"), ("<script>", "ended")]
    )
    def test_no(self, verdict: str, said: str) -> None:
        with pytest.raises(lacre.Unauthenticated, match=said) as caught:
            by_device(login_server.LoginServer(ISSUER, verdict))
        assert "lacre login" in caught.value.remedy and "<" not in str(caught.value)

    def test_a_person_who_never_comes(self) -> None:
        issuer = login_server.LoginServer(ISSUER, *["authorization_pending"] * 9)
        issuer.interval = 400  # of 600 s that the code lives: the second question is already late
        with login_http(issuer.transport) as http:
            server = LoginServer.discover(http, ISSUER)
            asked = DeviceCode.ask(http, server, "app", None)
            short = DeviceCode(asked.page, asked.code, None, asked.until - 300, asked.interval, asked.secret)
            with pytest.raises(lacre.Unauthenticated, match="in time"):
                wait(http, server, "app", short, sleep=lambda _seconds: None)
        assert not issuer.asked

    @pytest.mark.parametrize(
        ("members", "said"),
        [
            ({"issuer": f"{ISSUER}/"}, "exact name"),
            ({"token_endpoint": "http://login.example/token"}, "not https"),
            ({"token_endpoint": None}, "not https"),
            ({"revocation_endpoint": "http://login.example/revoke"}, "not https"),
            ({"device_authorization_endpoint": None}, "device grant"),
        ],
        ids=repr,
    )
    def test_a_server_that_describes_something_else(self, members: dict[str, Any], said: str) -> None:
        issuer = login_server.LoginServer(ISSUER)
        issuer.members = members
        with pytest.raises(lacre.LacreError, match=said):
            by_device(issuer)
        assert not issuer.asked

    def test_an_answer_without_a_device_code(self) -> None:
        with pytest.raises(lacre.InvalidMessage, match="RFC 8628"):
            by_device(login_server.LoginServer(ISSUER), client_id="other")

    @pytest.mark.parametrize(
        "url", ["http://login.example", "ftp://x", "https://", "https://a b", "https://a\x1b", 5, None, "https://["]
    )
    def test_where_no_secret_goes(self, url: Any) -> None:
        assert not is_safe(url)
        with login_http(login_server.LoginServer(ISSUER).transport) as http, pytest.raises(lacre.SettingsError):
            LoginServer.discover(http, url)


class TestBrowser:
    def login(self, issuer: login_server.LoginServer, *visits: Callable[[str], str]) -> SavedLogin:
        """visits: the addresses that the browser goes to, made from the page that it was shown."""
        seen: list[int] = []

        def browse(page: str) -> None:
            with httpx2.Client(trust_env=False, timeout=10) as client:
                seen.extend(client.get(visit(page)).status_code for visit in visits)

        threads: list[threading.Thread] = []

        def opening(page: str) -> None:
            threads.append(threading.Thread(target=browse, args=[page]))
            threads[-1].start()

        try:
            with login_http(issuer.transport) as http:
                return in_browser(http, LoginServer.discover(http, ISSUER), "app", "openid", opening, most=20)
        finally:
            threads[0].join(20)
            assert seen == [404] * (len(visits) - 1) + [200]

    def test_only_the_answer_of_this_login_counts(self) -> None:
        issuer = login_server.LoginServer(ISSUER)
        saved = self.login(
            issuer,
            lambda page: issuer.confirmed(page, state="another"),
            lambda page: issuer.confirmed(page).replace("/callback", "/other"),
            issuer.confirmed,
        )
        assert saved.refresh_token == issuer.refresh and len(issuer.asked) == 1
        assert len(issuer.asked[0]["code_verifier"]) >= 43

    @pytest.mark.parametrize(
        ("members", "said", "asked"),
        [({"iss": "https://evil.example"}, "another login server", 0), ({"code": "stolen"}, "no token", 1)],
        ids=["another issuer", "another code"],
    )
    def test_no(self, members: dict[str, str], said: str, asked: int) -> None:
        issuer = login_server.LoginServer(ISSUER)
        with pytest.raises(lacre.Unauthenticated, match=said):
            self.login(issuer, lambda page: issuer.confirmed(page, **members))
        assert len(issuer.asked) == asked

    def test_nobody_comes(self) -> None:
        with login_http(login_server.LoginServer(ISSUER).transport) as http:
            server = LoginServer.discover(http, ISSUER)
            with pytest.raises(lacre.Unauthenticated, match="in time"):
                in_browser(http, server, "app", None, lambda _page: None, most=0.1)


class Locked(Exception):
    """A keyring's own error."""


class Keyring:
    """As the package's functions. locked: whether it refuses everything."""

    def __init__(self, *, locked: bool = False) -> None:
        self.held: dict[tuple[str, str], str] = {}
        self.locked = locked

    def _check(self) -> None:
        if self.locked:
            raise Locked

    def get_password(self, service_name: str, username: str) -> str | None:
        self._check()
        return self.held.get((service_name, username))

    def set_password(self, service_name: str, username: str, password: str) -> None:
        self._check()
        self.held[service_name, username] = password

    def delete_password(self, service_name: str, username: str) -> None:
        self._check()
        del self.held[service_name, username]


class TestStore:
    def test_a_file_for_this_user_alone(self, tmp_path: Path) -> None:
        store = LoginStore(tmp_path / "state", ROOT, None)
        assert store.load() is None
        with pytest.raises(lacre.SettingsError, match="nobody is logged in"):
            end(store)
        assert not store.path.parent.exists()
        assert not store.save(SAVED) and store.load() == SAVED
        assert stat.S_IMODE(store.path.stat().st_mode) == 0o600
        store.path.chmod(0o640)
        with pytest.raises(lacre.SettingsError, match="chmod 600"):
            store.load()
        end(store)
        assert not store.path.exists()

    def test_the_keyring_holds_the_secret(self, tmp_path: Path) -> None:
        vault = Keyring()
        store = LoginStore(tmp_path, ROOT, OsKeyring(vault, Locked))
        assert store.save(SAVED) and store.load() == SAVED
        assert b"s3cret" not in store.path.read_bytes() and list(vault.held.values()) == ["s3cret"]
        vault.locked = True
        with pytest.raises(lacre.SettingsError, match="keyring cannot be read"):
            store.load()
        vault.locked = False
        end(store)
        assert not store.path.exists() and not vault.held
        assert not store.save(SAVED, in_file=True) and b"s3cret" in store.path.read_bytes()

    def test_a_keyring_that_takes_nothing(self, tmp_path: Path) -> None:
        store = LoginStore(tmp_path, ROOT, OsKeyring(Keyring(locked=True), Locked))
        assert not store.save(SAVED) and store.load() == SAVED

    @pytest.mark.parametrize("content", [b"", b"{}", b"[]", b'{"issuer":1}', b"\xff"], ids=repr)
    def test_a_damaged_file(self, tmp_path: Path, content: bytes) -> None:
        store = LoginStore(tmp_path, ROOT, None)
        store.save(SAVED)
        store.path.write_bytes(content)
        with pytest.raises(lacre.SettingsError, match="damaged"):
            store.load()
        assert not end(store) and not store.path.exists()


class TestUse:
    def test_renewed_in_time_and_the_newest_refresh_token_is_kept(self, tmp_path: Path) -> None:
        issuer = login_server.LoginServer(ISSUER, life=0)
        store = LoginStore(tmp_path, ROOT, None)
        store.save(by_device(issuer)[0])
        login = UserLogin(store, issuer.transport)
        assert [login(), login()] == ["access-1", "access-2"]
        kept = store.load()
        assert kept is not None and kept.refresh_token == issuer.refresh
        issuer.life = 300
        assert login() == login() == "access-3"

    def test_no_two_renew_with_one_refresh_token(self, tmp_path: Path) -> None:
        """Of several processes, too: the lock is one of the file."""
        issuer = login_server.LoginServer(ISSUER)
        store = LoginStore(tmp_path, ROOT, None)
        store.save(by_device(issuer)[0])
        with ThreadPoolExecutor(4) as threads:
            tokens = list(threads.map(lambda _: UserLogin(LoginStore(tmp_path, ROOT, None), issuer.transport)(), range(4)))
        assert len(set(tokens)) == 4 and not issuer.revoked

    def test_a_login_that_was_revoked(self, tmp_path: Path) -> None:
        issuer = login_server.LoginServer(ISSUER)
        store = LoginStore(tmp_path, ROOT, None)
        store.save(SAVED)
        with pytest.raises(lacre.Unauthenticated, match="revoked") as caught:
            UserLogin(store, issuer.transport)()
        assert "lacre login" in caught.value.remedy and "s3cret" not in str(caught.value)

    @pytest.mark.parametrize("offered", [True, False])
    def test_the_end(self, tmp_path: Path, offered: bool) -> None:
        issuer = login_server.LoginServer(ISSUER)
        issuer.members = {} if offered else {"revocation_endpoint": None}
        store = LoginStore(tmp_path, ROOT, None)
        store.save(by_device(issuer)[0])
        assert end(store, issuer) == issuer.revoked == offered
        assert not store.path.exists()

    def test_an_end_that_the_server_does_not_hear_of(self, tmp_path: Path) -> None:
        store = LoginStore(tmp_path, ROOT, None)
        store.save(replace(SAVED, revoke_url="http://127.0.0.1:9/revoke"))  # nobody listens there
        with login_http() as http:
            assert not store.end(http)
        assert not store.path.exists()

    def test_clients_without_a_token_use_it(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, relay: Relay) -> None:
        monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))
        monkeypatch.delenv("LACRE_TOKEN", raising=False)
        with pytest.raises(lacre.SettingsError, match="LACRE_TOKEN"):
            connect(relay, token=None)
        root = raw_public_key(relay.root)
        with login_server.on_loopback(login_server.LoginServer()) as issuer:
            issuer.refresh = "s3cret"
            store = LoginStore(tmp_path / "lacre", root, None)
            store.save(SavedLogin(issuer.issuer, f"{issuer.issuer}/token", "app", None, "s3cret"))

            async def ask() -> None:
                async with connect_async(relay, token=None) as client:
                    for _ in range(2):
                        await client.chat("Hello.")

            with connect(relay, token=None) as client:
                client.chat("Hello.")
            asyncio.run(ask())
        with connect(relay, token="mine") as client:
            client.chat("Hello.")
        with pytest.raises(lacre.SettingsError, match="LACRE_TOKEN"):
            connect(Relay(ChatApp()), token=None)  # another deployment, which could use the token
        used = [request.headers["authorization"] for request in relay.sealed]
        assert used == ["Bearer access-0", "Bearer access-1", "Bearer access-1", "Bearer mine"]

    def test_a_token_that_the_gateway_refuses(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, relay: Relay) -> None:
        """Before its time: another one is fetched at once, sync and async."""
        monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))
        monkeypatch.delenv("LACRE_TOKEN", raising=False)

        def respond(request: httpx2.Request) -> httpx2.Response | None:
            stale = request.headers.get("authorization") in ("Bearer access-0", "Bearer access-2")
            return refusing(problems.INVALID_TOKEN)(request) if stale else None

        relay.respond = respond
        with login_server.on_loopback(login_server.LoginServer()) as issuer:
            issuer.refresh = "s3cret"
            store = LoginStore(tmp_path / "lacre", raw_public_key(relay.root), None)
            store.save(SavedLogin(issuer.issuer, f"{issuer.issuer}/token", "app", None, "s3cret"))
            with connect(relay, token=None) as client:
                for _ in range(2):
                    assert client.chat("Hello.").text

            async def ask() -> None:
                async with connect_async(relay, token=None) as client:
                    for _ in range(2):
                        assert (await client.chat("Hello.")).text

            asyncio.run(ask())
        assert issuer.issued == [f"access-{number}" for number in range(4)] and not issuer.revoked

    def test_the_command_gives_its_browser_the_page_in_a_private_file(self, tmp_path: Path) -> None:
        """With the address's `state`, another user of the machine could log this one in as somebody else."""
        browser = LinkBrowser(tmp_path)
        with login_server.on_loopback(login_server.LoginServer("")) as issuer:
            clean = {name: value for name, value in os.environ.items() if not name.startswith("LACRE_")}
            env = clean | browser.env() | {"XDG_STATE_HOME": str(tmp_path), "LACRE_URL": URL}
            words = ("login", "--issuer", issuer.issuer, "--client-id", "app", "--browser", "--file")
            with subprocess.Popen(
                [*LACRE, *words], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=env
            ) as process:
                assert process.stderr is not None
                page = process.stderr.readline().removeprefix("open ").strip()
                call = browser.called()
                assert httpx2.get(issuer.confirmed(page), trust_env=False).status_code == 200
                _, complaint = process.communicate(timeout=90)
        assert process.returncode == 0, complaint
        state = httpx2.URL(page).params["state"]
        assert state in call.page and call.mode == "0o100600" and "open-login-" in call.arguments
        assert state not in call.arguments
        assert not list((tmp_path / "lacre").glob("open-*"))

    def test_the_command(self, tmp_path: Path) -> None:
        with login_server.on_loopback(login_server.LoginServer("", "authorization_pending", None)) as issuer:
            issuer.interval = 1
            clean = {name: value for name, value in os.environ.items() if not name.startswith("LACRE_")}
            env = clean | {"XDG_STATE_HOME": str(tmp_path), "LACRE_URL": URL}

            def run(*words: str) -> subprocess.CompletedProcess[str]:
                return subprocess.run([*LACRE, *words], check=False, capture_output=True, text=True, env=env, timeout=90)

            done = run("login", "--issuer", issuer.issuer, "--client-id", "app", "--device", "--file")
        assert done.returncode == 0, done.stderr
        assert "WDJB-MJHT" in done.stderr and str(tmp_path) in done.stdout
        saved = LoginStore(tmp_path / "lacre", ROOT, None).load()
        assert saved is not None and saved.refresh_token == issuer.refresh
        assert issuer.refresh is not None and issuer.refresh not in done.stdout + done.stderr
        ended = run("logout")  # the server is gone
        assert ended.stdout == "logged out\n" and "did not confirm" in ended.stderr
        again = run("logout")
        assert again.returncode == 1 and "nobody is logged in" in again.stderr
