"""Bytes of any kind in any field that somebody reads: a refusal of the table, never a fault of the gateway."""

from __future__ import annotations

import asyncio
import re
from collections.abc import AsyncIterator

import pytest

from lacre_gateway.http.server import bind, make_server
from lacre_gateway.settings import Listen
from parts.stage import Stage

VALUES = (
    b"", b"\xff\xfe", b"\xc3\xa9", b"\t", b"[", b"%00", b"a" * 30_000, b"=?utf-8?q?x?=", b'; ; =;"', b"9" * 400, b"-1", b"{}",
)  # fmt: skip
FIELDS = (
    b"accept", b"authorization", b"connection", b"content-encoding", b"content-type", b"cookie", b"dpop", b"expect", b"host",
    b"forwarded", b"if-none-match", b"lacre-action", b"lacre-max-tokens", b"lacre-model", b"lacre-pool", b"lacre-shape",
    b"origin", b"range", b"te", b"traceparent", b"upgrade", b"x-forwarded-for", b"x-forwarded-proto",
)  # fmt: skip
CALLS = {
    "public": (
        b"POST /v1/sealed",
        b"GET /v1/manifest",
        b"GET /readyz",
        b"HEAD /healthz",
        b"OPTIONS /v1/sealed",
        b"DELETE /nowhere",
    ),
    "admin": (
        b"POST /v1/revocations",
        b"GET /v1/usage?tenant=%C3%A9&tenant=x",
        b"GET /v1/status",
        b"GET /metrics",
        b"PUT /v1/drain",
    ),
}


@pytest.fixture(params=CALLS)
async def port(request: pytest.FixtureRequest, stage: Stage) -> AsyncIterator[tuple[str, int]]:
    settings = Listen(port=0, drain=1, trusted_proxies=("127.0.0.1",))
    with bind(settings) as listener:
        server = make_server(stage.app if request.param == "public" else stage.admin, settings)
        serving = asyncio.create_task(server.serve(sockets=[listener]))
        while not server.started:
            await asyncio.sleep(0.01)
        yield request.param, listener.getsockname()[1]
        server.should_exit = True
        await serving
        await server.settle()


def request_of(call: bytes, name: bytes, *values: bytes, token: bytes) -> bytes:
    usual = {
        b"host": b"x", b"authorization": b"Bearer " + token, b"content-type": b"application/json", b"connection": b"close",
    }  # fmt: skip
    lines = [key + b": " + value for key, value in usual.items() if key != name]
    lines += [name + b": " + value for value in values]
    return b"\r\n".join([call + b" HTTP/1.1", *lines, b"content-length: 2", b"", b"{}"])


async def status(port: int, said: bytes) -> int:
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    writer.write(said)
    async with asyncio.timeout(20):
        line = await reader.readline()
    writer.transport.abort()
    found = re.fullmatch(rb"HTTP/1\.1 (\d{3}) [ -~]+\r\n", line)
    assert found, line
    return int(found[1])


@pytest.mark.parametrize("name", FIELDS)
async def test_any_value(port: tuple[str, int], stage: Stage, name: bytes, caplog: pytest.LogCaptureFixture) -> None:
    which, at = port
    stage.gateway.refusals._clock = lambda: 0.0
    stage.gateway.refusals._limits = {"subject": 10**6, "address": 10**6}
    token = stage.issuer.token(scope="lacre:admin", sub="root").encode()
    for call in CALLS[which]:
        for values in [*((value,) for value in VALUES), (b"a", b"b")]:
            got = await status(at, request_of(call, name, *values, token=token))
            assert got < 500 or got == 503, (call, name, values, got)
    assert [record.getMessage() for record in caplog.records if record.exc_info] == []
