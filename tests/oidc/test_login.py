"""`lacre login` at a real OpenID provider, with a person's browser: its tokens through the command, the proxy and clients."""

from __future__ import annotations

import asyncio
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import httpx2
import jwt
import pytest

import lacre
from lacre.transport.login import LoginStore, SavedLogin, UserLogin
from lacre.trust.chain import ConnectionString
from parts import browser
from parts.oidc_provider import NODE, Provider
from parts.stage import LiveStage
from parts.up import LACRE

TESTS = Path(__file__).resolve().parents[1]
SCOPE = "openid offline_access lacre:http"

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(300),
    pytest.mark.skipif(NODE is None or shutil.which("npm") is None, reason="node and npm are not installed"),
]


class Machine:
    """A person's machine: its folder for state, and `lacre` in a terminal there. ways: how `lacre login` is asked to log in."""

    def __init__(self, folder: Path, provider: Provider, url: str, keyring: str = "") -> None:
        self.folder = folder
        self.provider = provider
        script = folder / "browser"
        script.write_text(f'#!/bin/sh\nPYTHONPATH={shlex.quote(str(TESTS))} exec {sys.executable} -P -m parts.browser "$1"\n')
        script.chmod(0o700)
        clean = {name: value for name, value in os.environ.items() if not name.startswith(("LACRE_", "PYTHON"))}
        self.env = clean | {
            "XDG_STATE_HOME": str(folder / "state"), "XDG_DATA_HOME": str(folder / "data"), "LACRE_URL": url,
            "BROWSER": str(script), "PYTHON_KEYRING_BACKEND": keyring or "keyring.backends.null.Keyring",
        }  # fmt: skip

    @property
    def store(self) -> LoginStore:
        return LoginStore(self.folder / "state/lacre", ConnectionString.parse(self.env["LACRE_URL"]).root, None)

    def start(self, *words: str) -> subprocess.Popen[str]:
        return subprocess.Popen([*LACRE, *words], env=self.env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)

    def run(self, *words: str) -> str:
        done = subprocess.run([*LACRE, *words], env=self.env, check=False, capture_output=True, text=True, timeout=120)
        assert done.returncode == 0, done.stderr
        return done.stdout

    def login(self, *words: str, client_id: str = "person") -> subprocess.Popen[str]:
        return self.start("login", "--issuer", self.provider.url, "--client-id", client_id, "--scope", SCOPE, *words)

    def in_browser(self, *words: str, client_id: str = "person") -> str:
        """What it says at last."""
        with self.login("--browser", *words, client_id=client_id) as process:
            said, complaint = process.communicate(timeout=120)
        assert process.returncode == 0, complaint
        return said

    def by_code(self, *words: str, client_id: str = "person") -> str:
        """The person types the code into the page on another device."""
        with self.login("--device", *words, client_id=client_id) as process:
            assert process.stderr is not None
            found = re.fullmatch(r"open (\S+) and enter (\S+)\n", process.stderr.readline())
            assert found
            page = browser.visit(found[1], user_code=found[2])
            assert "successful" in page.text
            said, complaint = process.communicate(timeout=120)
        assert process.returncode == 0, complaint
        return said


def ask(url: str, **options: lacre.Memory | str) -> str:
    with lacre.Client(url, memory=lacre.VersionMemory(), **options) as client:  # type: ignore[arg-type]
        return client.chat("Count.", max_tokens=8).text


def refused(login: SavedLogin) -> bool:
    """Whether the provider gives no more tokens for it."""
    form = {"grant_type": "refresh_token", "refresh_token": login.refresh_token, "client_id": login.client_id}
    with httpx2.Client(trust_env=False, timeout=30) as http:
        answer = http.post(login.token_url, data=form)
    assert answer.status_code in (200, 400), answer.text
    return answer.status_code == 400 and answer.json()["error"] == "invalid_grant"


@pytest.fixture
def machine(tmp_path: Path, provider: Provider, cluster: LiveStage) -> Machine:
    return Machine(tmp_path, provider, cluster.gateways[0].url)


@pytest.mark.parametrize("way", [Machine.by_code, Machine.in_browser], ids=["by code", "in a browser"])
async def test_login_use_and_logout(
    way: Callable[..., str], machine: Machine, cluster: LiveStage, monkeypatch: pytest.MonkeyPatch
) -> None:
    said = await asyncio.to_thread(way, machine)
    assert said == f"logged in; the refresh token is in {machine.store.path}\n"
    login = machine.store.load()
    assert login is not None and login.refresh_token not in said

    for name in ("XDG_STATE_HOME", "LACRE_URL"):
        monkeypatch.setenv(name, machine.env[name])
    monkeypatch.delenv("LACRE_TOKEN", raising=False)
    assert await asyncio.to_thread(ask, machine.env["LACRE_URL"]) == "one two three"
    async with lacre.AsyncClient(memory=lacre.VersionMemory()) as client:
        assert (await client.chat("Count.", max_tokens=8)).text == "one two three"
    assert await asyncio.to_thread(machine.run, "ask", "Count.") == "one two three\n"
    proxy = machine.start("proxy", "--port", "0", "--json")
    try:
        assert proxy.stdout is not None
        told = json.loads(await asyncio.to_thread(proxy.stdout.readline))
        asked = {"model": "tiny", "messages": [{"role": "user", "content": "Count."}]}
        async with httpx2.AsyncClient(trust_env=False, timeout=60) as program:
            headers = {"authorization": f"Bearer {told['api_key']}"}
            answer = await program.post(f"{told['base_url']}/chat/completions", json=asked, headers=headers)
        assert answer.json()["choices"][0]["message"]["content"] == "one two three"
    finally:
        proxy.terminate()
        await asyncio.to_thread(proxy.communicate, timeout=30)

    newest = machine.store.load()
    assert newest is not None and newest.refresh_token != login.refresh_token  # the provider gives a new one at each use
    assert await asyncio.to_thread(machine.run, "logout") == "logged out\n"
    assert machine.store.load() is None and await asyncio.to_thread(refused, newest)
    with pytest.raises(lacre.SettingsError, match="LACRE_TOKEN"):
        lacre.Client(memory=lacre.VersionMemory())


async def test_the_person_is_the_subject_and_an_old_token_is_replaced(machine: Machine, cluster: LiveStage) -> None:
    """`brief`: its access tokens live for a second."""
    await asyncio.to_thread(machine.in_browser, client_id="brief")
    login = UserLogin(machine.store)
    url, used = cluster.gateways[0].url, []

    def token() -> str:
        used.append(login())
        return used[-1]

    with lacre.Client(url, token=token, memory=lacre.VersionMemory()) as client:
        for _ in range(3):
            assert (await asyncio.to_thread(client.chat, "Count.", max_tokens=8)).text == "one two three"
            await asyncio.sleep(1.2)
    claims = [jwt.decode(each, options={"verify_signature": False}) for each in used]
    assert {each["sub"] for each in claims} == {browser.PERSON} and len({each["jti"] for each in claims}) == 3


async def test_a_login_that_the_provider_ended(machine: Machine) -> None:
    """Two machines with one refresh token: the provider sees it twice, and ends the login."""
    await asyncio.to_thread(machine.in_browser)
    stolen = machine.store.load()
    assert stolen is not None
    assert not await asyncio.to_thread(refused, stolen)  # a thief uses it first
    with pytest.raises(lacre.Unauthenticated, match="ended or was revoked") as caught:
        await asyncio.to_thread(UserLogin(machine.store))
    assert "lacre login" in caught.value.remedy and stolen.refresh_token not in str(caught.value)


async def test_no_consent(machine: Machine) -> None:
    def cancel() -> tuple[int, str]:
        with machine.login("--device") as process:
            assert process.stderr is not None
            found = re.fullmatch(r"open (\S+) and enter (\S+)\n", process.stderr.readline())
            assert found
            browser.visit(found[1], forms=2, user_code=found[2], abort="yes")
            return process.wait(60), process.stderr.read()

    code, complaint = await asyncio.to_thread(cancel)
    assert code == 3 and "you refused the login" in complaint
    assert machine.store.load() is None


@pytest.mark.parametrize(
    ("backend", "hidden"),
    [("keyrings.alt.file.PlaintextKeyring", True), ("keyring.backends.fail.Keyring", False), ("no.such.Keyring", False)],
    ids=["a file", "none", "a wrong name"],
)
async def test_the_keyring(backend: str, hidden: bool, tmp_path: Path, provider: Provider, cluster: LiveStage) -> None:
    """A real backend of the package `keyring`. No desktop's own keyring is here."""
    pytest.importorskip("keyring")
    machine = Machine(tmp_path, provider, cluster.gateways[0].url, backend)
    said = await asyncio.to_thread(machine.in_browser)
    assert ("in the keyring" in said) == hidden
    assert (b'refresh_token": ""' in machine.store.path.read_bytes()) == hidden
    for _ in range(2):  # the second time with the refresh token that replaced the first one
        assert await asyncio.to_thread(machine.run, "ask", "Count.") == "one two three\n"
    assert await asyncio.to_thread(machine.run, "logout") == "logged out\n"
    assert not machine.store.path.exists()
    left = "".join(path.read_text() for path in (tmp_path / "data").rglob("*") if path.is_file())
    assert hidden == bool(list((tmp_path / "data").rglob("*.cfg"))) and provider.url not in left
