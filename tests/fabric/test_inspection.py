"""`lacre fabric check`: nothing to say of what provisioning made, and each weakened setting named."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from nats.js.api import StorageType, StreamConfig

from lacre_fabric.nats import streams, subjects
from lacre_fabric.nats.connection import Connection
from lacre_fabric.nats.provisioning import provision
from lacre_fabric.nats.roles import Credential, Role
from lacre_fabric.nats.servers import Servers
from lacre_fabric.operate.allowed_check import check_allowed
from lacre_fabric.operate.fabric_check import FabricFinding, Severity, _room, _takes_writes, inspect
from lacre_fabric.operate.site import Site
from parts.fabric import LiveFabric, Parties

Change = Callable[[dict[str, Any]], None]


@pytest.fixture
def site(tmp_path: Path) -> Site:
    return Site(tmp_path, {"a": ("m1",), "b": ("m1",)})


@asynccontextmanager
async def running(site: Site, **how: Any) -> AsyncIterator[Connection]:
    """The provisioner's connection to a server with every role; how: as `LiveFabric.start` has it."""
    with LiveFabric.running(site.folder, site.roles(), **how) as live:
        async with Parties.of(live) as parties:
            connection = await parties.connect()
            await provision(connection, site.pools)
            yield connection


async def weak(site: Site, connection: Connection, replicas: int = 1) -> dict[str, str]:
    """What is not ok, by check."""
    servers = Servers.of(connection.client.connected_url.geturl())
    found: list[FabricFinding] = await inspect(servers, site.pools, replicas, site.credentials())
    assert all(bool(finding.remedy) == (finding.verdict is not Severity.OK) for finding in found)
    return {finding.check: finding.detail for finding in found if finding.verdict is not Severity.OK}


async def not_allowed(site: Site, connection: Connection) -> dict[str, str]:
    """What gateways and workers may not do and must, by check."""
    servers = Servers.of(connection.client.connected_url.geturl())
    found = await check_allowed(servers, tuple(site.pools), site.credentials(), site.regions)
    assert [finding.check for finding in found] == [
        "allowed gateway for a", "allowed worker-a", "allowed gateway for b", "allowed worker-b",
    ]  # fmt: skip
    assert all(bool(finding.remedy) == (finding.verdict is not Severity.OK) for finding in found)
    return {finding.check: finding.detail for finding in found if finding.verdict is not Severity.OK}


# What is taken from a role, and what it then cannot do.
NARROWER = {
    "work.a.lacre.*": ("gateway-g1", "allowed gateway for a", "queue work"),
    "$JS.API.STREAM.MSG.DELETE.WORK_a_lacre": ("gateway-g1", "allowed gateway for a", "withdraw work"),
    "$JS.API.CONSUMER.MSG.NEXT.WORK_a_lacre.*": ("worker-a-n1", "allowed worker-a", "pull work"),
    "$KV.claims_a.*": ("worker-a-n1", "allowed worker-a", "claim a request"),
    "reply.a.>": ("worker-a-n1", "allowed worker-a", "answer"),
    "$KV.budgets.gateway-g1.>": ("gateway-g1", "allowed gateway for a", "write a lease"),
    "credit.a.*": ("gateway-g1", "allowed gateway for a", "give credit"),
    "$KV.revocations.gateway-g1": ("gateway-g1", "allowed gateway for a", "revoke"),
}


@pytest.mark.parametrize("taken", sorted(NARROWER))
async def test_permissions_that_are_too_narrow(site: Site, taken: str) -> None:
    name, check, what = NARROWER[taken]
    seen: list[str] = []

    def narrowed(role: Role) -> Role:
        if role.credential.name != name:
            return role
        kept = tuple(subject for subject in role.publish if subject != taken.replace("$JS.API", subjects.API))
        seen.append(str(len(role.publish) - len(kept)))
        return replace(role, publish=kept)

    async with running(site, as_role=narrowed) as connection:
        told = await not_allowed(site, connection)
        assert seen == ["1"]
        assert f"it cannot {what}: NATS denies {name}" in told[check]
        assert "worker-b" not in "".join(told)


async def test_a_lost_queue_and_a_wrong_password_are_not_allowed_either(site: Site) -> None:
    async with running(site) as connection:
        await connection.jetstream.delete_stream("WORK_a_lacre")
        servers = Servers.of(connection.client.connected_url.geturl())
        credentials = {**site.credentials(), "worker-b": Credential.new("worker-b-n1")}
        found = await check_allowed(servers, tuple(site.pools), credentials, site.regions)
        assert {finding.check: finding.verdict for finding in found} == {
            "allowed worker-a": Severity.WRONG, "allowed worker-b": Severity.WRONG,
        }  # fmt: skip


async def test_streams_and_consumers(site: Site) -> None:
    async with running(site) as connection:
        js = connection.jetstream
        assert await not_allowed(site, connection) == {}
        for pool in site.pools:
            info = await js.stream_info(f"WORK_{pool}_lacre")
            assert (info.state.messages, info.state.consumer_count) == (0, 1)
        assert await weak(site, connection) == {}
        await provision(connection, site.pools, ack_wait=60.0)
        told = await weak(site, connection)
        assert told.keys() == {"consumers WORK_a_lacre", "consumers WORK_b_lacre"}
        assert "ack_wait is 60.0, should be 5.0" in told["consumers WORK_a_lacre"]
        await provision(connection, site.pools)
        await js.update_stream((await js.stream_info("WORK_a_lacre")).config.evolve(duplicate_window=1.0))
        await js.update_stream((await js.stream_info("KV_claims_b")).config.evolve(max_age=5.0, duplicate_window=5.0))
        await js.delete_stream("KV_budgets")
        await js.add_stream(StreamConfig(name="KV_budgets", subjects=["$KV.budgets.>"], storage=StorageType.MEMORY))
        await js.delete_stream("KV_trust")
        told = await weak(site, connection)
        assert told.keys() == {"WORK_a_lacre", "KV_claims_b", "KV_budgets", "KV_trust"}
        words = {"WORK_a_lacre": "duplicate_window is 1", "KV_claims_b": "max_age is 5.0", "KV_budgets": "storage is"}
        assert not [check for check, said in words.items() if said not in told[check]]
        assert told["KV_trust"] == "missing"


async def test_a_full_stream(site: Site) -> None:
    """It is as it should be, and takes no writes; or soon takes none."""
    async with running(site) as connection:
        js = connection.jetstream
        small = streams.BucketLimits(streams.CLAIMS.size, 10, streams.CLAIMS.largest)
        await js.delete_stream("KV_claims_a")
        await provision(connection, site.pools, claims=small)
        for number in range(8):
            await js.publish(f"$KV.claims_a.fill{number}", b"x")
        room = _room("KV_claims_a", await js.stream_info("KV_claims_a"))
        assert told_of(room) == (Severity.WEAK, "80% of its limit is used")
        assert await _takes_writes(connection, "KV_claims_a") is None
        await js.publish("$KV.claims_a.fill9", b"x")
        refused = "it takes no writes: NATS refuses: maximum messages exceeded"
        assert told_of(await _takes_writes(connection, "KV_claims_a")) == (Severity.WRONG, refused)
        told = await weak(site, connection)
        assert told.keys() == {"KV_claims_a", "KV_claims_b"}
        assert "max_msgs is 10" in told["KV_claims_a"]
        for name in ("KV_trust", "KV_budgets", "KV_revocations", "WORK_a_lacre", "KV_claims_b"):
            assert await _takes_writes(connection, name) is None


def told_of(finding: FabricFinding | None) -> tuple[Severity, str]:
    assert finding is not None
    return finding.verdict, finding.detail


SERVERS: dict[str, Change] = {
    "max_payload": lambda config: config.update(max_payload=2**20),
    "power cut": lambda config: config["jetstream"].update(sync_interval="2m"),
}


@pytest.mark.parametrize("told", SERVERS)
async def test_servers(site: Site, told: str) -> None:
    async with running(site, change=SERVERS[told]) as connection:
        found = await weak(site, connection)
        assert found.keys() == {"server lacre"}
        assert told in found["server lacre"]
        assert {"servers", "WORK_a_lacre", "KV_trust"} <= (await weak(site, connection, replicas=3)).keys()


async def test_permissions_that_are_too_wide(site: Site) -> None:
    wider = {"worker-a-n1": ("reply.>",), "gateway-g1": ("$JS.API.>",)}

    def widened(role: Role) -> Role:
        more = wider.get(role.credential.name, ())
        return replace(role, publish=(*role.publish, *more), subscribe=(*role.subscribe, *(["work.>"] if more else [])))

    async with running(site, as_role=widened) as connection:
        told = await weak(site, connection)
        assert told.keys() == {"permissions worker-a", "permissions gateway"}
        assert "subscribe to work.>" in told["permissions worker-a"]
        assert "publish to reply.b." in told["permissions worker-a"]
        assert "publish to $JS.API.STREAM.CREATE." in told["permissions gateway"]
