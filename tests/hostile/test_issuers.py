"""What an issuer's server publishes, and what a genuine token claims, against the gateway that reads it."""

from __future__ import annotations

import asyncio
import io
import json
import time
from contextlib import suppress
from typing import Any

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from hostile.attacks import Verdict, attack
from lacre import problems
from lacre.jose.jws import b64u, raw_public_key
from lacre_fabric.logs import make_log
from lacre_gateway.auth.issuers import trusted
from lacre_gateway.auth.jwks import KeySet, Unusable
from lacre_gateway.auth.jwks_remote import RemoteKeys, Timing
from lacre_gateway.auth.revocation import RevocationList
from lacre_gateway.auth.throttle import FailureThrottle
from lacre_gateway.auth.tokens import Authenticator
from lacre_gateway.http.refusal import Refusal
from lacre_gateway.settings import Issuer as IssuerSettings
from parts.issuer import AUDIENCE, ISSUER, Issuer
from parts.memory_fabric import MemoryFabric
from parts.waiting import until

KEY = {"kty": "OKP", "crv": "Ed25519", "kid": "a", "alg": "EdDSA", "x": b64u(raw_public_key(Ed25519PrivateKey.generate()))}
ODD = [{"kid": ["a"]}, {"crv": ["Ed25519"]}, {"alg": {"a": 1}}, {"x": 7}, {"kty": ["OKP"]}, {"use": ["sig"]}]


@attack("publish a key whose members are lists, numbers or objects, to stop the reading of keys", "issuer",
        "text members of a key must be text", Unusable, cases=ODD, ids=repr)  # fmt: skip
async def test_odd_members(case: dict[str, Any], verdict: Verdict) -> None:
    with verdict.refused():
        KeySet.parse({"keys": [{**KEY, **case}]}, ["EdDSA"], "issuers.0")


ANSWERS = (
    b"", b"HTTP/1.1 200 OK\r\ncontent-length: -1\r\n\r\n{}",
    b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\nage: \xff\r\ncache-control: max-age=\xff\r\n\r\n{}",
    b"HTTP/1.1 200 OK\r\netag: \xff\xfe\r\ncontent-length: 2\r\n\r\n{}",
    b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\nzz\r\n", b"HTTP/1.1 304 Not Modified\r\n\r\n", b"\x00" * 4096,
)  # fmt: skip


@attack("answer with bytes that break client libraries, so that the gateway never looks again and accepts a withdrawn key",
        "issuer", "any exception is a failed look: the next one follows, and old keys expire", gain="the delay of one retry",
        cases=ANSWERS, ids=range(7))  # fmt: skip
async def test_odd_answers(case: bytes) -> None:
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
        served = case
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


@pytest.fixture(scope="module")
def issuer() -> Issuer:
    return Issuer()


async def shown(issuer: Issuer, verdict: Verdict, claims: dict[str, Any]) -> None:
    """To a gateway whose settings say no more than they must."""
    log = make_log(io.StringIO())
    table = {"issuer": ISSUER, "audience": AUDIENCE, "algorithms": ("EdDSA",), "jwks": issuer.jwks()}
    revocations = RevocationList(log)
    await revocations.refresh(MemoryFabric().gateway())
    auth = Authenticator(trusted([IssuerSettings.model_validate(table)], log), revocations, FailureThrottle(9), time.time)
    with pytest.raises(Refusal) as refused:
        await auth.authenticate(f"Bearer {issuer.token(**claims)}".encode(), "192.0.2.1")
    verdict.said(refused.value.problem.type)


ELSEWHERE = {
    "marked": {"hasgroups": True},
    "distributed": {"_claim_names": {"groups": "a"}, "_claim_sources": {"a": {"endpoint": "https://graph.example"}}},
    "in part": {"groups": ["staff"], "_claim_names": {"groups": "a"}},
}


@attack("join so many groups that the token only links to them, which hides one that a rule forbids", "client",
        "a token whose groups are elsewhere is refused, unless the settings say otherwise", problems.CLAIMS_ELSEWHERE,
        cases=ELSEWHERE.values(), ids=ELSEWHERE)  # fmt: skip
async def test_groups_elsewhere(issuer: Issuer, verdict: Verdict, case: dict[str, Any]) -> None:
    await shown(issuer, verdict, case)


@attack("carry a name that reverses the text around it, so that a list of callers shows another name", "client",
        "a name with control characters, or with characters that reorder text, is refused", problems.UNUSABLE_CLAIMS,
        cases=["nimda\u202e", "\u2066admin\u2069", "alice\u2028admin", "alice\x1b[2K"], ids=ascii)  # fmt: skip
async def test_name_that_shows_another(issuer: Issuer, verdict: Verdict, case: str) -> None:
    await shown(issuer, verdict, {"sub": case})


@attack("use a token without a tenant, which would count as the tenant called default", "client",
        "a token that names no tenant is refused, unless the settings name one for it", problems.UNUSABLE_CLAIMS)  # fmt: skip
async def test_no_tenant(issuer: Issuer, verdict: Verdict) -> None:
    await shown(issuer, verdict, {"tenant": None})
