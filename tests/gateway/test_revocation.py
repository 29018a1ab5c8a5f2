"""Revocation: what is refused, for how long, and how soon on every gateway; and a gateway that does not know refuses."""

from __future__ import annotations

import asyncio
import io
import json
import math
import subprocess
import sys
import time
from collections.abc import AsyncIterator
from pathlib import Path

import httpx2
import pytest

import lacre
from lacre import problems
from lacre.errors import UsageError
from lacre_fabric.logs import make_log
from lacre_fabric.nats import subjects
from lacre_fabric.nats.connection import Connection
from lacre_fabric.nats.revocations import revoke
from lacre_fabric.nats.roles import Credential
from lacre_fabric.work.contract import FabricUnavailable
from lacre_fabric.work.revocations import Revocation, subject_key, token_key
from lacre_gateway.auth import revocation as module
from lacre_gateway.auth.revocation import MAX_AGE, RevocationList, revocation
from lacre_gateway.settings import Issuer as IssuerSettings
from lacre_gateway.settings import load
from parts.chat_app import ChatApp
from parts.fake_worker import FakeWorker
from parts.issuer import ISSUER, Issuer
from parts.memory_fabric import MemoryFabric
from parts.stage import POOL, TINY, GatewayProcess, LiveStage, Stage

NOW = 1_800_000_000.0
DAY = 86400.0


class Clock:
    def __init__(self) -> None:
        self.now = NOW

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def known(clock: Clock) -> RevocationList:
    return RevocationList(make_log(io.StringIO()), clock)


def test_until_its_time_is_over(known: RevocationList, clock: Clock) -> None:
    known.add(Revocation("k", NOW + 100))
    assert known.refuses(["other", "k"], NOW - 50)
    assert known.refuses(["k"], NOW + 50)
    assert not known.refuses(["other"], NOW - 50)
    clock.now += 100
    assert not known.refuses(["k"], NOW - 50)


def test_what_was_issued_later_is_not_meant(known: RevocationList) -> None:
    known.add(Revocation("k", NOW + 100, issued_until=NOW))
    assert known.refuses(["k"], NOW)
    assert not known.refuses(["k"], NOW + 0.001)


@pytest.mark.parametrize("order", [1, -1])
def test_of_two_the_wider(order: int, known: RevocationList, clock: Clock) -> None:
    """Nothing that comes later, or again, makes a revocation less."""
    for entry in [Revocation("k", NOW + 100, NOW), Revocation("k", NOW + 50, NOW + 30), Revocation("k", NOW + 10)][::order]:
        known.add(entry)
    assert known.refuses(["k"], NOW + 1000)
    clock.now += 99
    assert known.refuses(["k"], NOW)


async def test_entries_are_forgotten_when_their_time_is_over(known: RevocationList, clock: Clock) -> None:
    hub = MemoryFabric()
    hub.revocations += [Revocation("a", NOW + 10), Revocation("b", NOW + 1000)]
    fabric = hub.gateway()
    await known.refresh(fabric)
    assert len(known) == 2
    clock.now += 11
    known._sweep_at = -math.inf
    await known.refresh(fabric)
    assert len(known) == 1


async def test_a_list_that_was_not_read_is_not_current(known: RevocationList, monkeypatch: pytest.MonkeyPatch) -> None:
    fabric = MemoryFabric().gateway()
    assert not known.current
    await known.refresh(fabric)
    assert known.current
    fabric.connected = False
    with pytest.raises(FabricUnavailable):
        await known.refresh(fabric)
    assert known.current  # for a while: the fabric may choose a new leader
    monkeypatch.setattr(module, "MAX_AGE", 0.0)
    assert not known.current


async def test_it_goes_on_looking(known: RevocationList, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "LOOK", 0.01)
    hub = MemoryFabric()
    fabric = hub.gateway()
    fabric.connected = False
    await known.start(lambda: fabric)
    assert not known.current
    fabric.connected = True
    hub.revocations.append(Revocation("k", NOW + 100))
    async with asyncio.timeout(10):
        while not known.refuses(["k"], NOW):
            await asyncio.sleep(0.005)
    await known.close()


async def test_a_gateway_that_does_not_know_serves_nobody(
    stage: Stage, worker: FakeWorker, client: httpx2.AsyncClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    headers = stage.headers(stage.issuer.token())
    assert (await client.post("/v1/sealed", content=stage.seal()[0], headers=headers)).status_code == 200
    monkeypatch.setattr(module, "MAX_AGE", 0.0)
    response = await client.post("/v1/sealed", content=stage.seal()[0], headers=headers)
    assert response.content == problems.UNAVAILABLE.body()
    assert response.headers["retry-after"] == "5"
    assert (await client.get("/readyz")).json()["missing"].keys() == {"revocations"}
    assert len(worker.opened) == 1
    monkeypatch.setattr(module, "MAX_AGE", MAX_AGE)
    assert (await client.post("/v1/sealed", content=stage.seal()[0], headers=headers)).status_code == 200


# What is asked for


def issuers(*names: str, **changes: float) -> list[IssuerSettings]:
    return [IssuerSettings(issuer=name, audience="a", algorithms=("EdDSA",), jwks={}, **changes) for name in names]


def test_a_token_and_a_subject() -> None:
    one = issuers(ISSUER, leeway=10.0, token_lifetime=DAY)
    assert revocation(one, jti="t1", now=NOW) == Revocation(token_key(ISSUER, "t1"), NOW + DAY + 20)
    assert revocation(one, subject="bob", now=NOW) == Revocation(subject_key(ISSUER, "bob"), NOW + DAY + 20, NOW)


def test_until_the_token_expires_and_is_not_taken_any_more() -> None:
    one = issuers(ISSUER, leeway=10.0, token_lifetime=DAY)
    assert revocation(one, jti="t1", until=NOW + 60, now=NOW).until == NOW + 70
    assert revocation(one, jti="t1", until=NOW + 99 * DAY, now=NOW).until == NOW + DAY + 20


@pytest.mark.parametrize(
    ("asked", "remedy"),
    [
        ({}, "--jti"),
        ({"jti": "t1", "subject": "bob"}, "--jti"),
        ({"jti": " "}, "--jti or --sub is empty"),
        ({"subject": ""}, "--jti or --sub is empty"),
        ({"jti": "t1", "until": NOW - 60}, "--until"),
        ({"jti": "t1", "issuer": "https://third.example"}, "--issuer"),
    ],
)
def test_what_cannot_be_meant_is_said(asked: dict[str, object], remedy: str) -> None:
    with pytest.raises(UsageError, match=remedy):
        revocation(issuers(ISSUER), now=NOW, **asked)  # type: ignore[arg-type]


def test_of_several_issuers_one_is_named() -> None:
    two = issuers(ISSUER, "https://other.example")
    with pytest.raises(UsageError, match="--issuer"):
        revocation(two, jti="t1", now=NOW)
    assert revocation(two, jti="t1", issuer="https://other.example", now=NOW).key == token_key("https://other.example", "t1")


async def test_a_subject_is_let_in_again_with_a_token_issued_later(
    stage: Stage, worker: FakeWorker, client: httpx2.AsyncClient
) -> None:
    async def status(token: str) -> int:
        return (await stage.post(client, token)).status_code

    now = int(time.time())
    before, during = stage.issuer.token(sub="bob", iat=now - 5), stage.issuer.token(sub="bob", iat=now + 5)
    assert [await status(before), await status(during)] == [200, 200]
    revoked = await stage.gateway.revoke(subject="bob")
    stage.gateway.revocations._entries[revoked.key] = (revoked.until, now - 3.0)
    # Its issuer's clock may be 10 s ahead: what says that it was issued soon after may have been issued before.
    assert [await status(before), await status(during)] == [401, 401]
    stage.gateway.revocations._entries[revoked.key] = (revoked.until, now - 6.0)
    assert [await status(before), await status(during)] == [401, 200]


# On real gateways


@pytest.fixture
async def cluster(tmp_path: Path, issuer: Issuer) -> AsyncIterator[LiveStage]:
    (tmp_path / "jwks.json").write_text(json.dumps(issuer.jwks()))
    tables = f"""
        [[issuers]]
        issuer = "{ISSUER}"
        audience = "lacre-test"
        algorithms = ["EdDSA"]
        jwks = "{tmp_path}/jwks.json"
        [limits]
        failed_auth_per_minute = 100000
    """
    async with LiveStage.on_air(tmp_path, ChatApp(), gateways=2, tables=tables) as cluster:
        yield cluster


async def refused_by(gateways: list[GatewayProcess], token: str) -> None:
    """Until all of these refuse the token. What they answer before says that they let it in."""
    await asyncio.gather(*(_refused_by(gateway, token) for gateway in gateways))


async def _refused_by(gateway: GatewayProcess, token: str) -> None:
    headers = {"lacre-pool": POOL, "lacre-model": TINY, "lacre-action": "chat", "content-type": "text/plain"}
    async with httpx2.AsyncClient(base_url=gateway.base_url, trust_env=False, verify=False) as client, asyncio.timeout(20):
        while True:
            response = await client.post("/v1/sealed", headers={**headers, "authorization": f"Bearer {token}"})
            if response.status_code == 401:
                return
            assert response.status_code == 415
            await asyncio.sleep(0.005)


@pytest.mark.slow
async def test_refused_everywhere(cluster: LiveStage, issuer: Issuer) -> None:
    tokens = [issuer.token(sub=f"s{number}", jti=f"t{number}") for number in range(20)]
    settings = load(cluster.gateways[0].settings)
    connection = await Connection.open(settings.nats.servers, Credential.load(settings.nats.credentials))
    for number, token in enumerate(tokens):
        await let_in(cluster, token)
        what = {"jti": f"t{number}"} if number % 2 else {"subject": f"s{number}"}
        await revoke(connection, revocation(settings.issuers, now=time.time(), **what))  # type: ignore[arg-type]
        await refused_by(cluster.gateways, token)
    await connection.close()

    # And by a gateway that starts later.
    first = cluster.gateways[0]
    first.stop()
    first.start()
    await first.ready()
    for token in tokens:
        await refused_by([first], token)
    await let_in(cluster, issuer.token(sub="s1", jti="another"))  # s1 was not revoked, its token t1 was


@pytest.mark.slow
@pytest.mark.parametrize("what", ["--jti", "--sub"])
async def test_lacre_revoke(what: str, cluster: LiveStage, issuer: Issuer) -> None:
    token = issuer.token(sub="bob", jti="bob")
    await let_in(cluster, token)
    arguments = [what, "bob", "--settings", str(cluster.gateways[1].settings)]
    done = await asyncio.to_thread(lacre_command, "revoke", *arguments)
    assert done.returncode == 0 and done.stdout.startswith("revoked until "), done.stderr
    await refused_by(cluster.gateways, token)
    for wrong in (
        ["--until", "2020-01-01"],
        ["--issuer", "https://third.example"],
        ["--sub" if what == "--jti" else "--jti", "x"],
    ):
        done = await asyncio.to_thread(lacre_command, "revoke", *arguments, *wrong)
        assert done.returncode == 1 and done.stderr.startswith("error: "), done.stdout


def lacre_command(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-P", "-m", "lacre", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)


async def let_in(cluster: LiveStage, token: str) -> None:
    """By every gateway, which then remembers that it is good."""
    memory = lacre.VersionMemory()
    for gateway in cluster.gateways:
        async with lacre.AsyncClient(gateway.url, token=token, memory=memory, shape="none") as client:
            assert (await client.chat("Count.", max_tokens=8)).text == "one two three"


@pytest.mark.slow
async def test_without_its_bucket_a_gateway_is_not_ready(cluster: LiveStage) -> None:
    provisioner = await cluster.connect()
    await provisioner.jetstream.delete_stream(subjects.REVOCATIONS_STREAM)
    await provisioner.close()
    first = cluster.gateways[0]
    first.stop()
    first.start()
    async with asyncio.timeout(60):
        while True:
            try:
                if (missing := await first.missing()).keys() == {"revocations"}:
                    break
            except httpx2.TransportError:
                pass
            await asyncio.sleep(0.05)
    assert "cannot be read" in missing["revocations"]
    assert "no bucket of revocations" in first.log.read_text()
