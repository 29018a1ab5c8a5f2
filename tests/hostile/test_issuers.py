"""Whoever serves an issuer's documents, against the gateway that reads them: odd ones must not keep a withdrawn key alive."""

from __future__ import annotations

import asyncio
import io
import json
from collections.abc import Callable
from contextlib import suppress
from typing import Any

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from hostile.attacks import Verdict, attack
from lacre.jose.jws import b64u, raw_public_key
from lacre_fabric.logs import make_log
from lacre_gateway.auth.jwks import KeySet, Unusable
from lacre_gateway.auth.jwks_remote import RemoteKeys, Timing

KEY = {"kty": "OKP", "crv": "Ed25519", "kid": "a", "alg": "EdDSA", "x": b64u(raw_public_key(Ed25519PrivateKey.generate()))}
ODD = [{"kid": ["a"]}, {"crv": ["Ed25519"]}, {"alg": {"a": 1}}, {"x": 7}, {"kty": ["OKP"]}, {"use": ["sig"]}]


@attack("publish a key whose members are lists, numbers or objects, to stop the reading of keys", "issuer",
        "text members of a key must be text", Unusable)  # fmt: skip
@pytest.mark.parametrize("odd", ODD, ids=repr)
async def test_odd_members(odd: dict[str, Any], verdict: Verdict) -> None:
    with verdict.refused():
        KeySet.parse({"keys": [{**KEY, **odd}]}, ["EdDSA"], "issuers.0")


@attack("answer with bytes that break client libraries, so that the gateway never looks again and accepts a withdrawn key",
        "issuer", "any exception is a failed look: the next one follows, and old keys expire",
        gain="the delay of one retry")  # fmt: skip
@pytest.mark.parametrize(
    "answer",
    [
        b"",
        b"HTTP/1.1 200 OK\r\ncontent-length: -1\r\n\r\n{}",
        b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\nage: \xff\r\ncache-control: max-age=\xff\r\n\r\n{}",
        b"HTTP/1.1 200 OK\r\netag: \xff\xfe\r\ncontent-length: 2\r\n\r\n{}",
        b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\nzz\r\n",
        b"HTTP/1.1 304 Not Modified\r\n\r\n",
        b"\x00" * 4096,
    ],
    ids=range(7),
)
async def test_odd_answers(answer: bytes) -> None:
    served = whole(KEY)

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with suppress(asyncio.IncompleteReadError, ConnectionError):  # it left before it asked, or before it was answered
            await reader.readuntil(b"\r\n\r\n")
            writer.write(served)
            await writer.drain()
        writer.close()

    server = await asyncio.start_server(serve, "127.0.0.1", 0)
    address = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}/keys"
    timing = Timing(least=0.01, default=0.01, retry=0.01, patience=0.01, cooldown=0.005, stale_limit=3600.0)
    log = io.StringIO()
    keys = RemoteKeys("http://127.0.0.1", address, ["EdDSA"], place="issuers.0", log=make_log(log), timing=timing)
    try:
        keys.start()
        await until(lambda: keys.find("a", "EdDSA"))
        served = answer
        await until(lambda: "not read" in log.getvalue())
        served = whole({**KEY, "kid": "c"})  # the owner of the issuer withdraws key a
        await until(lambda: keys.find("c", "EdDSA"))
        assert keys.find("a", "EdDSA") is None
    finally:
        await keys.close()
        server.close()


def whole(key: dict[str, Any]) -> bytes:
    body = json.dumps({"keys": [key]}).encode()
    return b"HTTP/1.1 200 OK\r\nconnection: close\r\ncontent-length: %d\r\n\r\n" % len(body) + body


async def until(condition: Callable[[], Any]) -> None:
    async with asyncio.timeout(8):
        while not condition():
            await asyncio.sleep(0.005)
