"""Bytes of any kind in any field that somebody reads: a refusal of the table, never a fault of the gateway."""

from __future__ import annotations

import asyncio
import re

import pytest

from parts.stage import Stage

from .test_streaming import connected, served

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
        b"POST /v1/sealed", b"GET /v1/manifest", b"GET /readyz", b"HEAD /healthz", b"OPTIONS /v1/sealed", b"DELETE /nowhere",
    ),
    "admin": (
        b"POST /v1/revocations", b"GET /v1/usage?tenant=%C3%A9&tenant=x", b"GET /v1/status", b"GET /metrics", b"PUT /v1/drain",
    ),
}  # fmt: skip


def request_of(call: bytes, name: bytes, *values: bytes, token: bytes) -> bytes:
    usual = {
        b"host": b"x", b"authorization": b"Bearer " + token, b"content-type": b"application/json", b"connection": b"close",
    }  # fmt: skip
    lines = [key + b": " + value for key, value in usual.items() if key != name]
    lines += [name + b": " + value for value in values]
    return b"\r\n".join([call + b" HTTP/1.1", *lines, b"content-length: 2", b"", b"{}"])


async def status(url: str, said: bytes) -> int:
    async with connected(url) as (reader, writer), asyncio.timeout(20):
        writer.write(said)
        line = await reader.readline()
        writer.transport.abort()
    found = re.fullmatch(rb"HTTP/1\.1 (\d{3}) [ -~]+\r\n", line)
    assert found, line
    return int(found[1])


@pytest.mark.parametrize("name", FIELDS)
@pytest.mark.parametrize("which", CALLS)
async def test_any_value(which: str, stage: Stage, name: bytes, caplog: pytest.LogCaptureFixture) -> None:
    stage.gateway.refusals._clock = lambda: 0.0
    stage.gateway.refusals._limits = {"subject": 10**6, "address": 10**6}
    token = stage.issuer.token(scope="lacre:admin", sub="root").encode()
    async with served(stage, drain=1, app=stage.app if which == "public" else stage.admin) as url:
        for call in CALLS[which]:
            for values in [*((value,) for value in VALUES), (b"a", b"b")]:
                got = await status(url, request_of(call, name, *values, token=token))
                assert got < 500 or got == 503, (call, name, values, got)
    assert [record.getMessage() for record in caplog.records if record.exc_info] == []
