"""How often one address may call what needs no sealed request, and that no route of it is forgotten."""

from __future__ import annotations

import httpx2
import pytest

from lacre import problems
from lacre_gateway.http.address_limit import AddressLimit
from parts.stage import Stage

from .conftest import PutUp

CEILING = 3


@pytest.fixture
async def stage(put_up: PutUp) -> Stage:
    return await put_up(limits=f"calls_per_address = {CEILING}")


def check_refused(answer: httpx2.Response) -> None:
    assert answer.status_code == problems.RATE_LIMITED.status, answer.text
    assert answer.headers["content-type"] == problems.MEDIA_TYPE
    assert 0 <= int(answer.headers["retry-after"]) <= 60
    document = answer.json()
    assert document["type"] == problems.RATE_LIMITED.type
    assert (document["limit"], document["scope"], document["ceiling"]) == ("calls_per_address", "address", CEILING)


async def test_the_manifest(stage: Stage) -> None:
    async with stage.http("192.0.2.1") as one, stage.http("192.0.2.2") as other:
        for _ in range(CEILING):
            assert (await one.get("/v1/manifest")).status_code == 200
        check_refused(await one.get("/v1/manifest"))
        for path in ("/healthz", "/readyz"):
            assert (await one.get(path)).status_code == 200, "probes come from one address"
        assert (await other.get("/v1/manifest")).status_code == 200
    refused = [line for line in stage.logged() if line.get("status") == 429]
    assert len(refused) == 1 and "slowapi" not in str(stage.logged())


@pytest.mark.parametrize(
    "addresses",
    [
        pytest.param([f"2001:db8::{number}" for number in range(CEILING + 1)], id="an IPv6 household"),
        pytest.param([""] * (CEILING + 1), id="callers without an address"),  # slowapi lets a call pass whose key is empty
    ],
)
async def test_who_shares_one_count(stage: Stage, addresses: list[str]) -> None:
    *early, late = addresses
    for address in early:
        async with stage.http(address) as client:
            assert (await client.get("/v1/manifest")).status_code == 200
    async with stage.http(late) as client:
        check_refused(await client.get("/v1/manifest"))


async def test_every_call_of_the_admin_listener(stage: Stage) -> None:
    """Before its token is looked at, and whether or not it needs one."""
    described = stage.admin.openapi()["paths"]
    calls = [(method.upper(), path) for path, methods in described.items() for method in methods]
    assert len(calls) > CEILING
    async with stage.http("192.0.2.7", stage.admin) as client:
        for _ in range(CEILING):
            assert (await client.get("/metrics")).status_code == 200
        for method, path in calls:
            check_refused(await client.request(method, path))


async def test_no_environment_switches_it_off(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RATELIMIT_ENABLED", "false")
    limit = AddressLimit(CEILING)
    assert limit._limiter.enabled is True
