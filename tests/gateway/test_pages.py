"""Pages of other origins: which of them a browser lets read the gateway's answers, in raw bytes over real sockets."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

import pytest

from lacre_gateway.settings import Listen
from parts.by_hand import opened
from parts.fake_worker import PIECES, FakeWorker
from parts.stage import Stage

from .conftest import PutUp, served
from .test_raw_sealed import Wire, dial, request

PAGE = "https://app.example:8443"
STRANGERS = (
    "https://evil.example", "https://app.example", "http://app.example:8443", "https://app.example:8443.evil.example", "null",
    "*", "", "https://APP.example:8443", f"{PAGE}, {PAGE}",
)  # fmt: skip
PREFLIGHT = "access-control-request-method: POST\r\naccess-control-request-headers: authorization,lacre-pool"


@pytest.fixture
async def stage(put_up: PutUp) -> Stage:
    return await put_up(settings=f'listen.origins = ["https://other.example", "{PAGE}"]')


@pytest.fixture
async def wire(stage: Stage) -> AsyncIterator[Wire]:
    async with served(stage.app) as (_, port), dial(port) as wire:
        yield wire


def fields(head: bytes) -> dict[str, str]:
    lines = head.decode().split("\r\n")[1:]
    return dict(line.split(": ", 1) for line in lines if line)


def ask(method: str, path: str, *origins: str, more: str = "") -> bytes:
    named = "".join(f"origin: {origin}\r\n" for origin in origins)
    return f"{method} {path} HTTP/1.1\r\nhost: x\r\n{named}{more}{chr(13) + chr(10) if more else ''}\r\n".encode()


async def test_a_page_of_the_list_may_read_an_answer_and_what_its_client_verifies(
    stage: Stage, worker: FakeWorker, wire: Wire
) -> None:
    body, _, opener = stage.seal()
    wire.say(request(stage, body, f"origin: {PAGE}"))
    got = fields(await wire.head())
    assert opened(opener, await wire.chunks()) == b"".join(PIECES)
    assert (got["access-control-allow-origin"], got["vary"]) == (PAGE, "origin")
    exposed = set(got["access-control-expose-headers"].split(", "))
    assert exposed == {"lacre-audit", "lacre-manifest", "lacre-request-id", "retry-after"}
    assert exposed - {"retry-after"} <= set(got)
    assert "access-control-allow-credentials" not in got


async def test_a_refusal_can_be_read_too(stage: Stage, wire: Wire) -> None:
    wire.say(request(stage, b"", f"origin: {PAGE}", "connection: close", pool="missing"))
    head = await wire.head()
    assert b" 4" in head.split(b"\r\n")[0]
    assert fields(head)["access-control-allow-origin"] == PAGE


@pytest.mark.parametrize("origin", STRANGERS)
async def test_no_other_page_may(stage: Stage, worker: FakeWorker, wire: Wire, origin: str) -> None:
    wire.say(request(stage, stage.seal()[0], f"origin: {origin}"))
    got = fields(await wire.head())
    assert not [name for name in got if name.startswith("access-control")]
    assert got["vary"] == "origin"
    await wire.chunks()
    wire.say(ask("OPTIONS", "/v1/sealed", origin, more=PREFLIGHT))
    head = await wire.head()
    assert head.startswith(b"http/1.1 405")
    assert b"access-control" not in head


async def test_two_origins_are_none(wire: Wire) -> None:
    wire.say(ask("GET", "/v1/manifest", PAGE, PAGE, more="connection: close"))
    assert b"access-control" not in await wire.head()


@pytest.mark.parametrize(("path", "method"), [("/v1/sealed", "POST"), ("/v1/manifest", "GET"), ("/v1/me/usage", "GET")])
async def test_a_preflight_of_the_list(wire: Wire, path: str, method: str) -> None:
    private = "access-control-request-private-network: true"
    wire.say(ask("OPTIONS", path, PAGE, more=f"{PREFLIGHT}\r\n{private}"))
    head = await wire.head()
    got = fields(head)
    assert head.startswith(b"http/1.1 204")
    assert (got["access-control-allow-origin"], got["access-control-allow-methods"]) == (PAGE, method.lower())
    asked = {"authorization", "content-type", "incremental", "lacre-pool", "lacre-model", "lacre-action", "lacre-max-tokens",
             "lacre-affinity"}  # fmt: skip
    assert asked <= set(got["access-control-allow-headers"].split(", "))
    assert got["access-control-max-age"] == "600"
    assert not {"access-control-allow-credentials", "access-control-allow-private-network"} & set(got)


@pytest.mark.parametrize("path", ["/healthz", "/readyz", "/v1/nothing"])
async def test_no_preflight_for_other_paths(wire: Wire, path: str) -> None:
    wire.say(ask("OPTIONS", path, PAGE, more=PREFLIGHT))
    assert not (await wire.head()).startswith(b"http/1.1 204")


async def test_without_a_list_nothing_is_added(put_up: PutUp) -> None:
    stage = await put_up()
    async with served(stage.app) as (_, port), dial(port) as wire:
        for said in (ask("GET", "/v1/manifest", PAGE), ask("OPTIONS", "/v1/sealed", PAGE, more=PREFLIGHT)):
            wire.say(said)
            async with asyncio.timeout(20):
                head = await wire.head()
                await wire.exactly(int(fields(head)["content-length"]))
            assert b"access-control" not in head
            assert b"vary" not in head


@pytest.mark.parametrize(
    "origin",
    ["*", "null", "app.example", "https://app.example/", "https://app.example/x", "http://app.example", "https://App.example",
     "https://app.example:443", "https://*.example", "https://a@app.example", "https://bücher.example", "ftp://app.example"],
)  # fmt: skip
def test_an_origin_that_could_never_match_is_a_settings_error(origin: str) -> None:
    with pytest.raises(ValueError, match=r"origin|small letters"):
        Listen(origins=(origin,))
    Listen(origins=("https://app.example", "http://localhost:8080", "http://127.0.0.1", "http://[::1]:3000"))
