"""Settings that are replaced while the gateway serves: checked whole, taken at once, and what needs a restart is named."""

from __future__ import annotations

import asyncio
import io
import json
import ssl
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import httpx2
import pytest

from lacre.errors import SettingsError
from lacre_fabric.logs import Level, make_log
from lacre_fabric.operate.nats_server import free_port
from lacre_gateway.admin.listener import AdminListener
from lacre_gateway.admin.reloading import SettingsReload
from lacre_gateway.audit.entries import SETTINGS_REFUSED, SETTINGS_RELOADED
from lacre_gateway.gateway import Changes
from lacre_gateway.http.certificate import tls_context
from lacre_gateway.http.server import bind
from lacre_gateway.settings import Listen, Tls, load
from parts.certificates import Ca
from parts.fake_worker import FakeWorker
from parts.issuer import AUDIENCE, Issuer
from parts.stage import Stage, until
from parts.stage.settings import issuer_table

OTHER = "https://other.example"


@dataclass
class Reloads:
    """The settings file of a stage's gateway. what: `lines` of the top table, `limits`, further `tables`."""

    stage: Stage
    level: Level

    def __post_init__(self) -> None:
        self.file = self.stage.folder / "gateway.toml"
        self.admin = AdminListener(self.stage.gateway, None)
        self.write()
        self.stage.gateway.settings = load(self.file)
        self.settings = SettingsReload(self.stage.gateway, self.admin, self.level, lambda: load(self.file), None)
        self.stage.gateway.reloading = self.settings

    def write(self, lines: str = "", limits: str = "", tables: str = "", change: tuple[str, str] = ("", "")) -> None:
        text = f"{self.stage.settings_text(lines, limits)}\n{tables}"
        assert change[0] in text
        self.file.write_text(text.replace(*change) if change[0] else text)

    async def take(self, **what: Any) -> Changes:
        self.write(**what)
        return await self.settings.reload()

    async def refused(self, words: str, **what: Any) -> None:
        before = self.stage.gateway.settings
        self.write(**what)
        with pytest.raises(SettingsError, match=words):
            await self.settings.reload()
        assert self.stage.gateway.settings is before

    def said(self, event: str) -> list[dict[str, Any]]:
        return [line for line in self.stage.logged() if line["event"] == event]

    def events(self) -> list[dict[str, Any]]:
        return [entry for entry in self.stage.entries("event") if entry["event"].startswith("settings")]


@pytest.fixture
async def reloads(stage: Stage) -> Any:
    found = Reloads(stage, Level("info"))
    yield found
    await found.admin.close()


def other_issuer(folder: Path, issuer: Issuer, **more: str) -> str:
    (folder / "other.json").write_text(json.dumps(issuer.jwks()))
    return issuer_table(OTHER, AUDIENCE, "other.json") + "".join(f'{name} = "{value}"\n' for name, value in more.items())


async def test_an_issuer_comes_and_goes(reloads: Reloads, worker: FakeWorker, client: httpx2.AsyncClient) -> None:
    """Its tokens are good while it is there; also those that the gateway has seen, as soon as it is gone."""
    stage = reloads.stage
    token = stage.issuer.token(iss=OTHER)
    assert (await stage.post(client, token)).status_code == 401
    assert await reloads.take(tables=other_issuer(stage.folder, stage.issuer)) == Changes(("issuers",))
    assert (await stage.post(client, token)).status_code == 200
    assert (await stage.post(client)).status_code == 200
    assert await reloads.take() == Changes(("issuers",))
    assert (await stage.post(client, token)).status_code == 401
    assert (await stage.post(client)).status_code == 200


async def test_another_key_in_the_file(reloads: Reloads, worker: FakeWorker, client: httpx2.AsyncClient) -> None:
    """The settings are the same; a withdrawn key counts no more, and a token that it signed is not remembered either."""
    stage = reloads.stage
    assert (await stage.post(client, stage.token)).status_code == 200
    (stage.folder / "jwks.json").write_text(json.dumps(Issuer().jwks()))
    assert await reloads.take() == Changes(("issuers",))
    assert (await stage.post(client, stage.token)).status_code == 401


async def test_limits(reloads: Reloads, worker: FakeWorker, client: httpx2.AsyncClient) -> None:
    stage = reloads.stage
    assert await reloads.take(limits="requests_in_flight = 1\nbody_timeout = 5.0\ncalls_per_address = 2") == Changes(
        ("limits",)
    )
    with stage.gateway.limits.slot("someone"):
        refused = await stage.post(client)
        assert (refused.status_code, refused.json()["limit"]) == (503, "requests_in_flight")
    assert (await stage.post(client)).status_code == 200
    assert [(await client.get("/v1/manifest")).status_code for _ in range(3)] == [200, 200, 429]
    await reloads.take()
    assert (await client.get("/v1/manifest")).status_code == 200
    assert stage.gateway.settings.limits.body_timeout == 30.0


async def test_failed_tokens(reloads: Reloads, client: httpx2.AsyncClient) -> None:
    await reloads.take(limits="failed_auth_per_minute = 1\nrefused_per_minute = 1")
    assert [(await reloads.stage.post(client, "a.b.c")).status_code for _ in range(2)] == [401, 429]


async def test_what_needs_a_restart_is_named(reloads: Reloads) -> None:
    """And the rest counts at once."""
    before = reloads.stage.gateway.settings
    lines, limits = 'log_level = "warning"\nprocesses = 2', "queue_limit = 3\nlongest_stream = 60"
    changes = await reloads.take(lines=lines, limits=limits, change=('gateway = "g1"', 'gateway = "g2"'))
    assert changes == Changes(("limits", "log_level"), ("gateway", "processes", "limits.longest_stream"))
    now = reloads.stage.gateway.settings
    assert (now.gateway, now.processes, now.limits.queue_limit) == ("g1", 1, 3.0)
    assert now.limits.longest_stream == before.limits.longest_stream
    [line] = reloads.said("settings need a restart")
    assert line["reason"] == "gateway processes limits.longest_stream"
    assert reloads.settings.restart == changes.restart
    await reloads.take()
    assert reloads.settings.restart == ()


WRONG = {
    "not TOML": ({"tables": "["}, "not TOML"),
    "a misspelt key": ({"limits": "queue_limt = 3"}, "nearest known one is 'queue_limit'"),
    "a value": ({"lines": 'log_level = "loud"'}, "log_level"),
    "limits that do not fit": ({"limits": "grant_lifetime = 5"}, "must exceed"),
    "no key set": ({"tables": issuer_table(OTHER, AUDIENCE, "missing.json")}, "cannot read .*missing.json"),
    "an issuer that does not answer": (
        {
            "tables": f'[[issuers]]\nissuer = "{OTHER}"\naudience = "a"\nalgorithms = ["EdDSA"]\njwks_url = "http://127.0.0.1:1/k"'
        },
        "issuers.1: the keys of https://other.example cannot be fetched: .*nothing listens",
    ),
    "TLS only after a restart": (
        {"tables": '[listen.tls]\ncertificate = "a"\nkey = "b"\n[admin]\nhost = "0.0.0.0"'},
        "need a restart",
    ),
}


@pytest.mark.parametrize("case", WRONG)
async def test_what_is_wrong_changes_nothing(
    case: str, reloads: Reloads, worker: FakeWorker, client: httpx2.AsyncClient
) -> None:
    """Not even its good parts; the log and the audit log say why."""
    what, words = WRONG[case]
    limits = what.get("limits", "") + "\nrequests_in_flight = 7"
    issuers, tracer = reloads.stage.gateway.authenticator.issuers, reloads.stage.gateway.tracer
    await reloads.refused(words, **{**what, "limits": limits})
    gateway = reloads.stage.gateway
    assert (gateway.authenticator.issuers, gateway.tracer) == (issuers, tracer)
    assert gateway.settings.limits.requests_in_flight == 2048
    assert (await reloads.stage.post(client)).status_code == 200
    assert len(reloads.said("settings refused, the last good ones stay")) == 1
    await until(lambda: [entry["event"] for entry in reloads.events()] == [SETTINGS_REFUSED])
    assert reloads.settings.refused
    await reloads.take()
    assert not reloads.settings.refused


async def test_a_port_that_is_taken_changes_nothing(reloads: Reloads) -> None:
    """The rest of the file is good, and is not taken either."""
    with bind(Listen(port=0)) as taken:
        port = taken.getsockname()[1]
        await reloads.refused("cannot listen", limits="queue_limit = 3", tables=f"[admin]\nport = {port}")


async def answers(port: int) -> bool:
    async with httpx2.AsyncClient(trust_env=False) as http:
        try:
            return (await http.get(f"http://127.0.0.1:{port}/metrics")).status_code == 200
        except httpx2.TransportError:
            return False


async def test_the_admin_listener_moves(reloads: Reloads) -> None:
    """It begins, moves and ends; the call that asks for a move gets its answer."""
    stage, first, second = reloads.stage, free_port(), free_port()
    await reloads.take(tables=f"[admin]\nport = {first}")
    await until(lambda: answers(first))
    reloads.write(tables=f"[admin]\nport = {second}")
    headers = {"authorization": f"Bearer {stage.issuer.token(scope='lacre:admin', sub='root')}"}
    async with httpx2.AsyncClient(trust_env=False, timeout=60) as http:
        done = await http.post(f"http://127.0.0.1:{first}/v1/reload", headers=headers)
    assert (done.status_code, done.json()["settings"]) == (200, {"changed": ["admin"], "restart": [], "fault": None})
    await until(lambda: answers(second))
    async with asyncio.timeout(30):
        while await answers(first):
            await asyncio.sleep(0.05)
    await reloads.take()
    async with asyncio.timeout(30):
        while await answers(second):
            await asyncio.sleep(0.05)


async def test_the_admin_listener_moves_to_another_host_on_its_port(reloads: Reloads, tmp_path: Path) -> None:
    """To every address with TLS, and back: each includes the address that it had."""
    stage, port, ca = reloads.stage, free_port(), Ca(tmp_path / "ca")
    pair = ca.issue(tmp_path, "admin")
    tls = f'[listen.tls]\ncertificate = "{pair.certificate}"\nkey = "{pair.key}"\n'
    reloads.write(tables=tls)
    stage.gateway.settings = load(reloads.file)
    reloads.admin._context = lambda: tls_context(Tls(certificate=pair.certificate, key=pair.key))
    trusted = ssl.create_default_context(cafile=ca.file)

    async def serves(url: str) -> bool:
        async with httpx2.AsyncClient(trust_env=False, timeout=5, verify=trusted) as http:
            try:
                return (await http.get(f"{url}/v1/status")).status_code == 401
            except httpx2.TransportError:
                return False

    for host, scheme in (("127.0.0.1", "http"), ("0.0.0.0", "https"), ("127.0.0.1", "http"), ("localhost", "http")):
        assert await reloads.take(tables=f'{tls}[admin]\nhost = "{host}"\nport = {port}') == Changes(("admin",))
        await until(partial(serves, f"{scheme}://127.0.0.1:{port}"))
    with pytest.raises(SettingsError, match="admin: cannot listen"):
        bind(Listen(host="127.0.0.1", port=port), place="admin")


async def test_an_administrator_asks(reloads: Reloads) -> None:
    """The answer says what changed, what needs a restart, or what is wrong; the audit log says who asked."""
    stage = reloads.stage
    headers = {"authorization": f"Bearer {stage.issuer.token(scope='lacre:admin', sub='root')}"}
    async with stage.http(app=stage.admin) as admin:
        reloads.write(lines='log_level = "error"\nmemory = "elsewhere"')
        done = await admin.post("/v1/reload", headers=headers)
        told = {"changed": ["log_level"], "restart": ["memory"], "fault": None}
        assert (done.status_code, done.json()["settings"]) == (200, told)
        reloads.write(limits="queue_limit = -1")
        done = await admin.post("/v1/reload", headers=headers)
        assert (done.status_code, done.json()["taken"]) == (409, True)  # the rules do hold
        assert "limits.queue_limit" in done.json()["settings"]["fault"]
        shown = (await admin.get("/v1/status", headers=headers)).json()["settings"]
        assert shown["restart"] == ["memory"]
        assert "limits.queue_limit" in shown["fault"]
    await until(lambda: len(reloads.events()) == 2)
    assert [(entry["event"], entry["actor"]) for entry in reloads.events()] == [
        (SETTINGS_RELOADED, "acme/root"), (SETTINGS_REFUSED, "acme/root"),
    ]  # fmt: skip


async def test_the_level_of_the_log(reloads: Reloads) -> None:
    written = []
    for name in ("info", "warning", "error"):
        await reloads.take(lines=f'log_level = "{name}"')
        stream = io.StringIO()
        log = make_log(stream, reloads.level)
        log.info("one")
        log.warning("two")
        log.error("three")
        written.append(stream.getvalue().count("\n"))
    assert written == [3, 2, 1]
