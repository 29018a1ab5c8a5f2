"""Revocation: what is refused, for how long, and how soon on every gateway; and a gateway that does not know refuses."""

from __future__ import annotations

import asyncio
import io
import json
import math
import subprocess
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import httpx2
import pytest

import lacre
from lacre import problems
from lacre.errors import UsageError
from lacre.problems import Problem
from lacre_fabric.logs import make_log
from lacre_fabric.nats import subjects
from lacre_fabric.work.contract import FabricUnavailable
from lacre_fabric.work.revocations import Revocation, StoreMark, subject_key, token_key
from lacre_gateway.auth import revocation as module
from lacre_gateway.auth.revocation import MAX_AGE, RevocationList, revocation
from lacre_gateway.settings import Issuer as IssuerSettings
from parts.chat_app import ChatApp
from parts.fake_worker import FakeWorker
from parts.issuer import AUDIENCE, ISSUER, Issuer
from parts.memory_fabric import MemoryFabric
from parts.stage import POOL, TINY, GatewayProcess, LiveStage, Stage
from parts.stage.settings import issuer_table
from parts.up import LACRE
from parts.waiting import until

NOW = 1_800_000_000.0
DAY = 86400.0


class Clock:
    now = NOW

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
    known.add(Revocation("later", NOW + 100, issued_until=NOW))
    assert known.refuses(["other", "k"], NOW - 50) and known.refuses(["k"], NOW + 50)
    assert not known.refuses(["other"], NOW - 50)
    assert known.refuses(["later"], NOW) and not known.refuses(["later"], NOW + 0.001)  # what was issued later is not meant
    clock.now += 100
    assert not known.refuses(["k"], NOW - 50)


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
    await until(lambda: known.refuses(["k"], NOW))
    await known.close()


async def test_a_gateway_that_does_not_know_serves_nobody(
    stage: Stage, worker: FakeWorker, client: httpx2.AsyncClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    token = stage.issuer.token()
    assert (await stage.post(client, token)).status_code == 200
    monkeypatch.setattr(module, "MAX_AGE", 0.0)
    response = await stage.post(client, token)
    assert (Problem.type_in(response.content), response.headers["retry-after"]) == (problems.UNAVAILABLE.type, "5")
    assert stage.logged()[-1]["reason"] == "revocations: the list is not current"
    assert (await client.get("/readyz")).json()["missing"].keys() == {"revocations"}
    assert len(worker.opened) == 1
    monkeypatch.setattr(module, "MAX_AGE", MAX_AGE)
    assert (await stage.post(client, token)).status_code == 200


async def test_a_gateway_whose_fabric_lost_its_stores_serves_nobody_until_it_is_settled(
    stage: Stage, worker: FakeWorker, client: httpx2.AsyncClient
) -> None:
    token, hub = stage.issuer.token(), MemoryFabric()
    for mark, status in (
        (StoreMark(("budgets", "revocations")), 503),
        (StoreMark((), time.time() - 3600), 200),
        (StoreMark((), time.time() + 3600), 401),
    ):
        hub.store_mark = mark
        await stage.gateway.revocations.refresh(hub.gateway())
        assert (await stage.post(client, token)).status_code == status
        if mark.lost:
            assert stage.logged()[-1]["reason"] == "stores: NATS lost budgets, revocations: run `lacre state settle`"
            assert (await client.get("/readyz")).json()["missing"].keys() == {"stores"}
    assert len(worker.opened) == 1


# What is asked for


OTHER = "https://other.example"


def asked(*names: str, **said: Any) -> Revocation:
    issuers = [
        IssuerSettings(issuer=name, audience="a", algorithms=("EdDSA",), jwks={}, leeway=10.0, token_lifetime=DAY)
        for name in names or (ISSUER,)
    ]
    return revocation(issuers, now=NOW, **said)


def test_what_is_revoked_and_until_when() -> None:
    """Until the token expires and no clock that may be off takes it any more; at most a token's whole life."""
    t1, most = token_key(ISSUER, "t1"), NOW + DAY + 20
    assert asked(jti="t1") == Revocation(t1, most)
    assert asked(subject="bob") == Revocation(subject_key(ISSUER, "bob"), most, NOW)
    assert asked(jti="t1", until=NOW + 60) == Revocation(t1, NOW + 70)
    assert asked(jti="t1", until=NOW + 99 * DAY) == Revocation(t1, most)
    assert asked(ISSUER, OTHER, jti="t1", issuer=OTHER) == Revocation(token_key(OTHER, "t1"), most)


@pytest.mark.parametrize(
    ("names", "said", "remedy"),
    [
        ([ISSUER], {}, "--jti"),
        ([ISSUER], {"jti": "t1", "subject": "bob"}, "--jti"),
        ([ISSUER], {"jti": " "}, "--jti or --sub is empty"),
        ([ISSUER], {"subject": ""}, "--jti or --sub is empty"),
        ([ISSUER], {"jti": "t1", "until": NOW - 60}, "--until"),
        ([ISSUER], {"jti": "t1", "issuer": "https://third.example"}, "--issuer"),
        ([ISSUER, OTHER], {"jti": "t1"}, "--issuer"),
    ],
)
def test_what_cannot_be_meant_is_said(names: list[str], said: dict[str, object], remedy: str) -> None:
    with pytest.raises(UsageError, match=remedy):
        asked(*names, **said)


async def test_a_later_token_lets_a_subject_in_again(stage: Stage, worker: FakeWorker, client: httpx2.AsyncClient) -> None:
    now = int(time.time())
    tokens = [stage.issuer.token(sub="bob", iat=now + away) for away in (-5, 5)]

    async def statuses() -> list[int]:
        return [(await stage.post(client, token)).status_code for token in tokens]

    assert await statuses() == [200, 200]
    revoked = await stage.gateway.revoke(subject="bob")
    # Its issuer's clock may be 10 s ahead: what says that it was issued soon after may have been issued before.
    for ago, expected in ((3.0, [401, 401]), (6.0, [401, 200])):
        stage.gateway.revocations._entries[revoked.key] = (revoked.until, now - ago)
        assert await statuses() == expected


# On real gateways


@pytest.fixture
async def cluster(tmp_path: Path, issuer: Issuer) -> AsyncIterator[LiveStage]:
    (tmp_path / "jwks.json").write_text(json.dumps(issuer.jwks()))
    tables = f"{issuer_table(ISSUER, AUDIENCE, tmp_path / 'jwks.json')}\n[limits]\nfailed_auth_per_minute = 100000"
    async with LiveStage.on_air(tmp_path, ChatApp(), gateways=2, tables=tables) as cluster:
        yield cluster


async def refused_by(gateways: list[GatewayProcess], token: str) -> None:
    """Until all of these refuse the token. What they answer before says that they let it in."""
    headers = {"lacre-pool": POOL, "lacre-model": TINY, "lacre-action": "chat", "content-type": "text/plain"}
    headers["authorization"] = f"Bearer {token}"
    for gateway in gateways:
        async with httpx2.AsyncClient(base_url=gateway.base_url, trust_env=False, verify=False) as client, asyncio.timeout(20):
            while (response := await client.post("/v1/sealed", headers=headers)).status_code != 401:
                assert response.status_code == 415
                await asyncio.sleep(0.005)


@pytest.mark.slow
@pytest.mark.parametrize("what", ["--jti", "--sub"])
async def test_lacre_revoke(what: str, cluster: LiveStage, issuer: Issuer) -> None:
    """Every gateway refuses it, also one that starts later."""
    token = issuer.token(sub="bob", jti="bob")
    await let_in(cluster, token)
    arguments = [what, "bob", "--settings", str(cluster.gateways[1].settings)]
    done = await asyncio.to_thread(lacre_command, "revoke", *arguments)
    assert done.returncode == 0 and done.stdout.startswith("revoked until "), done.stderr
    await refused_by(cluster.gateways, token)
    for wrong in ("--until=2020-01-01", "--issuer=https://third.example", "--sub=x" if what == "--jti" else "--jti=x"):
        done = await asyncio.to_thread(lacre_command, "revoke", *arguments, wrong)
        assert done.returncode == 1 and done.stderr.startswith("error: "), done.stdout
    first = cluster.gateways[0]
    first.stop()
    first.start()
    await first.ready()
    await refused_by([first], token)
    other = {"sub": "carol", "jti": "bob"} if what == "--sub" else {"sub": "bob", "jti": "another"}
    await let_in(cluster, issuer.token(**other))  # which nobody revoked


def lacre_command(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([*LACRE, *arguments], capture_output=True, text=True, timeout=60, check=False)


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
    while (missing := await first.missing()).keys() != {"revocations"}:
        await asyncio.sleep(0.05)
    assert "cannot be read" in missing["revocations"]
    assert "no bucket of revocations" in first.log.read_text()
