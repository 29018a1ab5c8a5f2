"""The manifest, served by an adversary who would rather have other keys in it."""

from __future__ import annotations

import base64
import json
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import httpx2
import jwt
import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

import lacre
from hostile.adversary import GatewayOwner, response
from hostile.attacks import Verdict, attack
from hostile.callers import Caller
from lacre import errors
from lacre.errors import (
    Expired,
    InvalidMessage,
    InvalidSignature,
    MessageTooLarge,
    Rollback,
    Unavailable,
    UnsupportedSuite,
    UntrustedRoot,
)
from lacre.exchange.call import Sealing
from lacre.jose.jws import ALGORITHM, b64u, raw_public_key, sign_bytes
from lacre.runtime.forks import PerLoop
from lacre.transport.sealed_async import AsyncSealedTransport
from lacre.trust.manifest import MANIFEST_TYP, ROOT_TYP, Document, RootStatement
from lacre.trust.manifest_store import VersionMemory, accept
from lacre.trust.signing import sign_manifest, sign_statement
from lacre.wire.header import Kem, SealedHeader
from lacre.wire.opening import PrivateKey
from parts.keys import POOL
from parts.stage import Stage
from parts.trust import NOW, ROOTS, changes, document, foreign, signature_checks, statement
from parts.wires import Pieces

SIGNED = "the manifest is signed by the signer, whom the pinned root names"
PIN = raw_public_key(ROOTS[0])
PINNED = "trust begins at the pinned root, and passes on by its signature only"


async def refused(caller: Caller, stage: Stage, gateway: GatewayOwner, verdict: Verdict) -> None:
    """The caller raises, and nothing that is sealed has left."""
    with verdict.refused():
        await caller.chat(stage.prompt)
    assert not gateway.posts


def parts(document: bytes) -> tuple[list[list[str]], dict[str, Any], str]:
    """The roots, and the manifest's payload and token."""
    served = json.loads(document)
    payload = served["manifest"].split(".")[1]
    return served["roots"], json.loads(base64.urlsafe_b64decode(payload + "==")), served["manifest"]


def with_payload(document: bytes, change: Callable[[dict[str, Any]], object], header: str | None = None) -> bytes:
    """The manifest with other contents, under the old signature. header: in place of the old one."""
    roots, payload, token = parts(document)
    change(payload)
    old, _, signature = token.split(".")
    header = header or old
    return json.dumps({"roots": roots, "manifest": f"{header}.{b64u(json.dumps(payload).encode())}.{signature}"}).encode()


@attack("substitute its own pool key in the manifest", by="gateway", defence=SIGNED, refused=InvalidSignature)
async def test_own_pool_key(stage: Stage, caller: Caller, gateway: GatewayOwner, verdict: Verdict) -> None:
    own = b64u(PrivateKey.generate(1).config.encode())
    bent = with_payload(stage.bucket, lambda payload: payload["pools"][POOL]["keys"][0].update(config=own))
    gateway.manifest = lambda: bent
    await refused(caller, stage, gateway, verdict)


@attack("do so under a header that says the same in another form", by="gateway", defence=SIGNED, refused=InvalidSignature)
async def test_other_words(stage: Stage, caller: Caller, gateway: GatewayOwner, verdict: Verdict) -> None:
    own = b64u(PrivateKey.generate(1).config.encode())
    header = b64u(json.dumps({"typ": MANIFEST_TYP, "alg": ALGORITHM}).encode())
    bent = with_payload(stage.bucket, lambda payload: payload["pools"][POOL]["keys"][0].update(config=own), header)
    gateway.manifest = lambda: bent
    await refused(caller, stage, gateway, verdict)


@attack("sign a manifest with a key of its own", by="gateway", defence=SIGNED, refused=InvalidSignature)
async def test_own_manifest(stage: Stage, caller: Caller, gateway: GatewayOwner, verdict: Verdict) -> None:
    forged = stage.manifest(2, pools=stage.pools(PrivateKey.generate(1)))
    document = Document((stage.statement(),), sign_manifest(forged, Ed25519PrivateKey.generate())).encode()
    gateway.manifest = lambda: document
    await refused(caller, stage, gateway, verdict)


@attack(
    "sign a manifest with the gateway's key, which the manifest names",
    by="gateway",
    refused=InvalidSignature,
    defence="the gateway's key certifies grants and nothing else",
)
async def test_the_gateways_key(stage: Stage, caller: Caller, gateway: GatewayOwner, verdict: Verdict) -> None:
    forged = stage.manifest(2, pools=stage.pools(PrivateKey.generate(1)))
    document = Document((stage.statement(),), sign_manifest(forged, stage.keys.gateway)).encode()
    gateway.manifest = lambda: document
    await refused(caller, stage, gateway, verdict)


@attack("serve a manifest under `alg: none`", by="gateway", defence="EdDSA is the only algorithm", refused=InvalidSignature)
async def test_no_algorithm(stage: Stage, caller: Caller, gateway: GatewayOwner, verdict: Verdict) -> None:
    payload = stage.manifest(2, pools=stage.pools(PrivateKey.generate(1))).members()
    token = jwt.encode(payload, None, algorithm="none", headers={"typ": MANIFEST_TYP})
    document = Document((stage.statement(),), token).encode()
    gateway.manifest = lambda: document
    await refused(caller, stage, gateway, verdict)


@attack(
    "sign a manifest by HMAC, with the signer's public key as the secret",
    by="gateway",
    refused=InvalidSignature,
    defence="EdDSA is the only algorithm",
)
async def test_hmac(stage: Stage, caller: Caller, gateway: GatewayOwner, verdict: Verdict) -> None:
    payload = stage.manifest(2, pools=stage.pools(PrivateKey.generate(1))).members()
    token = jwt.encode(payload, raw_public_key(stage.keys.signer), algorithm="HS256", headers={"typ": MANIFEST_TYP})
    document = Document((stage.statement(),), token).encode()
    gateway.manifest = lambda: document
    await refused(caller, stage, gateway, verdict)


@attack("serve its own chain, signer and manifest", by="gateway", defence=PINNED, refused=UntrustedRoot)
async def test_own_root(stage: Stage, caller: Caller, gateway: GatewayOwner, verdict: Verdict) -> None:
    document = Stage(gateway.fabric, replace(stage.keys, root=Ed25519PrivateKey.generate())).bucket
    gateway.manifest = lambda: document
    await refused(caller, stage, gateway, verdict)


def appointing(stage: Stage, own: Ed25519PrivateKey, *signed_by: Ed25519PrivateKey) -> bytes:
    """A chain that goes on, after the true statement, with one that makes `own` root and signer."""
    statement = RootStatement(raw_public_key(own), time.time() + 3600, raw_public_key(own))
    entry = tuple(sign_bytes(statement.payload(), key, ROOT_TYP) for key in signed_by)
    manifest = stage.manifest(2, pools=stage.pools(PrivateKey.generate(1)))
    return Document((stage.statement(), entry), sign_manifest(manifest, own)).encode()


@attack("appoint itself as the next root", by="gateway", defence=PINNED, refused=UntrustedRoot)
async def test_own_next_root(stage: Stage, caller: Caller, gateway: GatewayOwner, verdict: Verdict) -> None:
    own = Ed25519PrivateKey.generate()
    document = appointing(stage, own, own)
    gateway.manifest = lambda: document
    await refused(caller, stage, gateway, verdict)


@attack(
    "let a stolen old root appoint a key whose holder never agreed",
    by="gateway",
    refused=UntrustedRoot,
    defence="a change of root is signed by the old root and by the new one",
)
async def test_next_root_that_never_agreed(stage: Stage, caller: Caller, gateway: GatewayOwner, verdict: Verdict) -> None:
    document = appointing(stage, Ed25519PrivateKey.generate(), stage.keys.root)
    gateway.manifest = lambda: document
    await refused(caller, stage, gateway, verdict)


@attack(
    "appoint itself as the next root with the stolen key of the signer", by="gateway", defence=PINNED, refused=UntrustedRoot
)
async def test_next_root_by_the_signer(stage: Stage, caller: Caller, gateway: GatewayOwner, verdict: Verdict) -> None:
    own = Ed25519PrivateKey.generate()
    document = appointing(stage, own, stage.keys.signer, own)
    gateway.manifest = lambda: document
    await refused(caller, stage, gateway, verdict)


@attack(
    "present another statement of the signer as a manifest",
    by="gateway",
    defence="each kind of statement has its own `typ`, which the verifier requires",
    refused=InvalidSignature,
)
async def test_another_type(stage: Stage, caller: Caller, gateway: GatewayOwner, verdict: Verdict) -> None:
    """The signer signed something else with these very contents."""
    payload = json.dumps(stage.manifest(2, pools=stage.pools(PrivateKey.generate(1))).members()).encode()
    document = Document((stage.statement(),), sign_bytes(payload, stage.keys.signer, "lacre-grant+jwt")).encode()
    gateway.manifest = lambda: document
    await refused(caller, stage, gateway, verdict)


@attack(
    "keep serving the manifests of a signer whose time is over",
    by="gateway",
    refused=Expired,
    defence="the root's statement limits the signer's time",
)
async def test_signer_past_its_time(stage: Stage, caller: Caller, gateway: GatewayOwner, verdict: Verdict) -> None:
    document = Document((stage.statement(lives=-1),), sign_manifest(stage.manifest(2), stage.keys.signer)).encode()
    gateway.manifest = lambda: document
    await refused(caller, stage, gateway, verdict)


# Time


@attack("serve an expired manifest", by="gateway", defence="`exp`, by the caller's own clock", refused=Expired)
async def test_expired(stage: Stage, caller: Caller, gateway: GatewayOwner, verdict: Verdict) -> None:
    stage.bucket = stage.document(lives=-1)
    await refused(caller, stage, gateway, verdict)


@attack(
    "serve an older manifest to a caller who has seen a newer one",
    by="gateway",
    refused=None,
    defence="the newest manifest seen is remembered, and used while it lasts",
    gain="nothing; the newer keys are used",
)
async def test_older(stage: Stage, gateway: GatewayOwner) -> None:
    older = stage.bucket
    newer_key = PrivateKey.generate(7)
    worker = await stage.worker(keys={7: newer_key, **stage.held})
    stage.bucket = stage.document(2, pools=stage.pools(newer_key))
    memory = lacre.VersionMemory()
    await stage.client(gateway, memory=memory).chat(stage.prompt)
    stage.bucket = older
    await stage.client(gateway, memory=memory).chat(stage.prompt)
    assert [SealedHeader.parse(post.content).key_id for post in gateway.posts] == [7, 7]
    assert worker.calls == 2


@attack(
    "serve an older manifest once the newer one has expired",
    by="gateway",
    refused=Rollback,
    defence="versions only rise, and the newest seen is remembered",
)
async def test_rollback(stage: Stage, gateway: GatewayOwner, verdict: Verdict) -> None:
    await stage.worker()
    older, now = stage.bucket, [time.time()]
    stage.bucket = stage.document(2, lives=60)
    memory = lacre.VersionMemory()
    client = clocked(stage, gateway, memory, now)
    await client.post("/v1/chat/completions", json={"messages": [{"role": "user", "content": stage.prompt}]})
    stage.bucket = older
    now[0] += 61
    posts = len(gateway.posts)
    with verdict.refused():
        await client.post("/v1/chat/completions", json={"messages": [{"role": "user", "content": stage.prompt}]})
    assert len(gateway.posts) == posts
    await client.aclose()


def clocked(stage: Stage, gateway: GatewayOwner, memory: lacre.VersionMemory, now: list[float]) -> httpx2.AsyncClient:
    """The SDK's transport under a clock that the test turns."""
    sealing = Sealing(raw_public_key(stage.keys.root), memory, clock=lambda: now[0])
    outer = PerLoop(lambda: httpx2.AsyncClient(base_url="http://127.0.0.1:9", transport=gateway))
    return httpx2.AsyncClient(transport=AsyncSealedTransport(sealing, outer, "t0ken"), base_url="https://lacre.invalid")


@attack(
    "serve an older manifest to a caller without a memory",
    by="gateway",
    refused=None,
    gain="use of an older key, until `exp`",
    defence="nothing but `exp`: a fresh container has seen nothing",
)
async def test_older_to_a_newcomer(stage: Stage, gateway: GatewayOwner) -> None:
    worker = await stage.worker()
    gateway.manifest = lambda older=stage.bucket: older  # type: ignore[misc]
    stage.bucket = stage.document(2, pools=stage.pools(PrivateKey.generate(7)))
    await stage.client(gateway).chat(stage.prompt)
    assert (SealedHeader.parse(gateway.posts[0].content).key_id, worker.calls) == (1, 1)


@attack(
    "serve the same manifest forever, while newer ones are published",
    by="gateway",
    refused=Expired,
    defence="`exp`: hours to days",
)
async def test_freeze(stage: Stage, gateway: GatewayOwner, verdict: Verdict) -> None:
    await stage.worker()
    now = [time.time()]
    client = clocked(stage, gateway, lacre.VersionMemory(), now)
    body = {"messages": [{"role": "user", "content": stage.prompt}]}
    assert (await client.post("/v1/chat/completions", json=body)).status_code == 200
    now[0] += 3601
    with verdict.refused():
        await client.post("/v1/chat/completions", json=body)
    assert len(gateway.posts) == 1
    await client.aclose()


@attack(
    "take a newer statement of the root out of the chain",
    by="gateway",
    refused=None,
    gain="nothing; the newer chain is used",
    defence="statements are only added: a chain without the newest one seen counts as older",
)
async def test_a_statement_less(stage: Stage, gateway: GatewayOwner) -> None:
    """The signer was replaced, its key stolen. It signs a manifest of a higher version, under the chain of before."""
    worker = await stage.worker()
    stolen, own = stage.keys.signer, PrivateKey.generate(9)
    fresh = Ed25519PrivateKey.generate()
    before = stage.statement()
    after = sign_statement(RootStatement(raw_public_key(fresh), time.time() + 7200), stage.keys.root)
    stage.bucket = Document((before, after), sign_manifest(stage.manifest(2), fresh)).encode()
    memory = lacre.VersionMemory()
    await stage.client(gateway, memory=memory).chat(stage.prompt)
    stage.bucket = Document((before,), sign_manifest(stage.manifest(3, pools=stage.pools(own)), stolen)).encode()
    await stage.client(gateway, memory=memory).chat(stage.prompt)
    assert [SealedHeader.parse(post.content).key_id for post in gateway.posts] == [1, 1]
    assert worker.calls == 2


@attack(
    "spell the manifest's signature in another way, so that the honest one looks like a second manifest of its version",
    by="gateway",
    defence="a signed statement has one spelling (canonical base64url)",
    refused=InvalidMessage,
)
async def test_respelt(stage: Stage, caller: Caller, gateway: GatewayOwner, verdict: Verdict) -> None:
    roots, _, token = parts(stage.bucket)
    gateway.manifest = lambda: json.dumps({"roots": roots, "manifest": token + "=="}).encode()
    await refused(caller, stage, gateway, verdict)


# Suites and keys


@attack("strip the post-quantum key from the manifest", by="gateway", defence=SIGNED, refused=InvalidSignature)
async def test_strip(stage: Stage, caller: Caller, gateway: GatewayOwner, verdict: Verdict) -> None:
    bent = with_payload(stage.bucket, lambda payload: payload["pools"][POOL]["keys"].pop(0))
    gateway.manifest = lambda: bent
    await refused(caller, stage, gateway, verdict)


@attack(
    "serve a signed manifest without post-quantum keys",
    by="gateway",
    refused=UnsupportedSuite,
    defence="the caller's own choice of KEM; there is no fallback",
)
async def test_classic_only(stage: Stage, caller: Caller, gateway: GatewayOwner, verdict: Verdict) -> None:
    stage.bucket = stage.document(pools=stage.pools(stage.keys.classic))
    await refused(caller, stage, gateway, verdict)


@attack(
    "have requests sealed to an older generation's key",
    by="gateway",
    defence="`not_after` of each key",
    refused=UnsupportedSuite,
)
async def test_old_generation(stage: Stage, caller: Caller, gateway: GatewayOwner, verdict: Verdict) -> None:
    stage.bucket = stage.document(pools=stage.pools(stage.keys.pool, lives=-1))
    await refused(caller, stage, gateway, verdict)


@attack(
    "claim that the key is unknown, so that another one is used",
    by="gateway",
    refused=errors.RefusedError,
    defence="the advice leads to a verified manifest and one fresh seal, never to another suite",
    gain="a second seal of the same request, to the same key, counted in `attempts`",
)
async def test_unknown_key(stage: Stage, caller: Caller, gateway: GatewayOwner, verdict: Verdict) -> None:
    problem = lacre.problems.UNKNOWN_KEY
    gateway.respond = lambda _request: response(problem.status, problem.body(), lacre.problems.MEDIA_TYPE)
    with verdict.refused() as caught:
        await caller.chat(stage.prompt)
    assert caught.value.problem == problem.type  # type: ignore[attr-defined]
    headers = [SealedHeader.parse(post.content) for post in gateway.posts]
    assert [(header.key_id, header.suite.kem) for header in headers] == [(1, Kem.XWING)] * 2
    assert headers[0].enc != headers[1].enc


# Form


@attack(
    "serve a manifest document of 100 MB",
    by="gateway",
    defence="a limit, beyond which nothing is read",
    refused=MessageTooLarge,
)
async def test_huge(stage: Stage, caller: Caller, gateway: GatewayOwner, verdict: Verdict) -> None:
    def pieces() -> Iterator[bytes]:
        for _ in range(1600):
            yield b"[" * 65536

    body = Pieces(pieces())
    gateway.manifest = lambda: httpx2.Response(200, stream=body)
    await refused(caller, stage, gateway, verdict)
    assert body.pulled < 2**21


@attack(
    "serve JSON that is nested a hundred thousand deep",
    by="gateway",
    defence="parsing ends in a typed error",
    refused=InvalidMessage,
)
async def test_nested(stage: Stage, caller: Caller, gateway: GatewayOwner, verdict: Verdict) -> None:
    gateway.manifest = lambda: b'{"roots":' + b"[" * 100_000
    await refused(caller, stage, gateway, verdict)


@attack(
    "refuse the manifest, to be asked in the clear", by="gateway", defence="there is no plaintext fallback", refused=Unavailable
)
@pytest.mark.parametrize("status", [500, 503, 301])
async def test_no_manifest(stage: Stage, caller: Caller, gateway: GatewayOwner, verdict: Verdict, status: int) -> None:
    elsewhere = {"location": "http://evil.example/v1/manifest"}
    gateway.manifest = lambda: httpx2.Response(status, headers=elsewhere, stream=Pieces([b""]))
    await refused(caller, stage, gateway, verdict)
    assert {request.url.host for request in gateway.requests} == {"127.0.0.1"}


@attack(
    "put a thousand statements of its own before the pinned root's, to be verified for each root ever seen",
    by="gateway",
    refused=None,
    gain="nothing; a dozen signature checks, plus one or two for each root ever seen if the pinned root is a later one",
    defence="the search looks first where the chain itself points, and is otherwise bounded",
)
async def test_foreign_statements() -> None:
    memory = remembering(20)
    served = document(*foreign(999), statement(ROOTS[0]))
    assert signature_checks(lambda: accept(served, PIN, memory, NOW)) < 12
    served, later = document(*foreign(900), *changes()), raw_public_key(ROOTS[2])
    assert signature_checks(lambda: accept(served, later, memory, NOW)) < 120


@attack(
    "forge a history of a thousand roots that lead to the pinned one, each with a valid signature",
    by="gateway",
    refused=None,
    gain="a hundred signature checks in a thread, once",
    defence="a limited number of root changes is followed back",
)
async def test_endless_history() -> None:
    others = [Ed25519PrivateKey.generate() for _ in range(500)]
    served, memory = document(*changes([*others, ROOTS[0]])), remembering(20)
    assert signature_checks(lambda: accept(served, PIN, memory, NOW)) < 500


def remembering(lineages: int) -> VersionMemory:
    memory = VersionMemory()
    for _ in range(lineages):
        other = Ed25519PrivateKey.generate()
        accept(document(statement(other)), raw_public_key(other), memory, NOW)
    return memory
