"""The manifest, served by an adversary who would rather have other keys in it."""

from __future__ import annotations

import base64
import json
import shutil
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, Final

import httpx2
import jwt
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

import lacre
from hostile.adversary import GatewayOwner, response
from hostile.attacks import Verdict, attack
from hostile.shapes import Caller, Test, flooded
from lacre import errors, problems
from lacre.errors import Expired, InvalidMessage, InvalidSignature, Rollback, Unavailable, UnsupportedSuite, UntrustedRoot
from lacre.exchange.call import Sealing
from lacre.jose.jws import ALGORITHM, b64u, raw_public_key, sign_bytes
from lacre.runtime.forks import PerLoop
from lacre.transport.sealed_async import AsyncSealedTransport
from lacre.trust.manifest import MANIFEST_TYP, ROOT_TYP, Document, ModelEntry, RootStatement
from lacre.trust.manifest_store import VersionFile, VersionMemory, accept
from lacre.trust.signing import sign_manifest, sign_statement
from lacre.wire.header import Kem, SealedHeader
from lacre.wire.opening import PrivateKey
from lacre_fabric.operate.catching_up import catch_up, remembered
from lacre_fabric.operate.site import Site
from parts.keys import MODEL, POOL
from parts.stage import Stage
from parts.trust import NOW, ROOTS, changes, document, foreign, signature_checks, statement
from parts.wires import Pieces

SIGNED = "the manifest is signed by the signer, whom the pinned root names"
PIN = raw_public_key(ROOTS[0])
PINNED = "trust begins at the pinned root, and passes on by its signature only"
ONE_ALGORITHM = "EdDSA is the only algorithm"
OWN: Final = PrivateKey.generate(1)


def served(
    name: str, defence: str, refused: type[errors.LacreError], *manifests: Callable[[Stage], bytes | httpx2.Response]
) -> Test:
    """The attack of a gateway that serves these in place of the manifest: the caller raises, and nothing sealed has left."""

    @attack(name, "gateway", defence, refused, cases=manifests, ids=range(len(manifests)))
    async def test(stage: Stage, caller: Caller, gateway: GatewayOwner, verdict: Verdict, case: Any) -> None:
        gateway.manifest = lambda: case(stage)
        with verdict.refused():
            await caller.chat(stage.prompt)
        assert not gateway.posts
        assert {request.url.host for request in gateway.requests} == {"127.0.0.1"}

    return test


def rewritten(change: Callable[[dict[str, Any]], object], header: str = "") -> Callable[[Stage], bytes]:
    """The manifest with other contents, under the old signature. header: in place of the old one."""

    def document(stage: Stage) -> bytes:
        served = json.loads(stage.bucket or b"")
        old, contents, signature = served["manifest"].split(".")
        payload = json.loads(base64.urlsafe_b64decode(contents + "=="))
        change(payload["pools"][POOL])
        return json.dumps(served | {"manifest": f"{header or old}.{b64u(json.dumps(payload).encode())}.{signature}"}).encode()

    return document


def with_own_key(pool: dict[str, Any]) -> None:
    pool["keys"][0]["config"] = b64u(OWN.config.encode())


def forged(sign: Callable[[Stage, Any], str]) -> Callable[[Stage], bytes]:
    """A manifest with its own pool key, under the true statement, signed like this."""
    return lambda stage: Document((stage.statement(),), sign(stage, stage.manifest(2, pools=stage.pools(OWN)))).encode()


def encoded(stage: Stage, manifest: Any, algorithm: str) -> str:
    secret = None if algorithm == "none" else raw_public_key(stage.keys.signer)
    return jwt.encode(manifest.members(), secret, algorithm=algorithm, headers={"typ": MANIFEST_TYP})


def appointing(own: Ed25519PrivateKey, *signers: Callable[[Stage], Ed25519PrivateKey]) -> Callable[[Stage], bytes]:
    """A chain that goes on, after the true statement, with one that makes `own` root and signer."""

    def document(stage: Stage) -> bytes:
        statement = RootStatement(raw_public_key(own), time.time() + 3600, raw_public_key(own))
        entry = tuple(sign_bytes(statement.payload(), signer(stage), ROOT_TYP) for signer in signers)
        manifest = stage.manifest(2, pools=stage.pools(OWN))
        return Document((stage.statement(), entry), sign_manifest(manifest, own)).encode()

    return document


THIEF: Final = Ed25519PrivateKey.generate()

test_own_pool_key = served("substitute its own pool key in the manifest", SIGNED, InvalidSignature, rewritten(with_own_key))
test_other_words = served("do so under a header that says the same in another form", SIGNED, InvalidSignature,
    rewritten(with_own_key, b64u(json.dumps({"typ": MANIFEST_TYP, "alg": ALGORITHM}).encode())))  # fmt: skip
test_own_manifest = served(
    "sign a manifest with a key of its own", SIGNED, InvalidSignature, forged(lambda _stage, said: sign_manifest(said, THIEF))
)
test_the_gateways_key = served("sign a manifest with the gateway's key, which the manifest names",
    "the gateway's key certifies grants and nothing else", InvalidSignature,
    forged(lambda stage, said: sign_manifest(said, stage.keys.gateway)))  # fmt: skip
test_no_algorithm = served("serve a manifest under `alg: none`", ONE_ALGORITHM, InvalidSignature,
    forged(lambda stage, said: encoded(stage, said, "none")))  # fmt: skip
test_hmac = served("sign a manifest by HMAC, with the signer's public key as the secret", ONE_ALGORITHM, InvalidSignature,
    forged(lambda stage, said: encoded(stage, said, "HS256")))  # fmt: skip
test_own_root = served("serve its own chain, signer and manifest", PINNED, UntrustedRoot,
    lambda stage: Stage(stage.hub, replace(stage.keys, root=THIEF)).document())  # fmt: skip
test_own_next_root = served("appoint itself as the next root", PINNED, UntrustedRoot, appointing(THIEF, lambda _stage: THIEF))
test_next_root_that_never_agreed = served("let a stolen old root appoint a key whose holder never agreed",
    "a change of root is signed by the old root and by the new one", UntrustedRoot,
    appointing(THIEF, lambda stage: stage.keys.root))  # fmt: skip
test_next_root_by_the_signer = served("appoint itself as the next root with the stolen key of the signer", PINNED,
    UntrustedRoot, appointing(THIEF, lambda stage: stage.keys.signer, lambda _stage: THIEF))  # fmt: skip
# The signer signed something else with these very contents.
test_another_type = served(
    "present another statement of the signer as a manifest",
    "each kind of statement has its own `typ`, which the verifier requires", InvalidSignature,
    forged(lambda stage, said: sign_bytes(json.dumps(said.members()).encode(), stage.keys.signer, "lacre-grant+jwt")),
)  # fmt: skip
test_signer_past_its_time = served(
    "keep serving the manifests of a signer whose time is over", "the root's statement limits the signer's time", Expired,
    lambda stage: Document((stage.statement(lives=-1),), sign_manifest(stage.manifest(2), stage.keys.signer)).encode(),
)  # fmt: skip


@attack("name other weights in the manifest than those that the caller pinned", "gateway",
        "`pin_models`: a digest that the caller got elsewhere outranks the manifest", errors.WrongModel)  # fmt: skip
async def test_other_weights_than_pinned(stage: Stage, gateway: GatewayOwner, verdict: Verdict) -> None:
    """The manifest is signed by the signer: its key was stolen, or its operator was deceived."""
    stage.named[MODEL] = ModelEntry(("2" * 64,))
    stage.bucket = stage.document()
    client = stage.client(gateway, pin_models={MODEL: "sha256:" + "1" * 64})
    with verdict.refused():
        await client.chat(stage.prompt)
    assert not gateway.posts


# Time


test_expired = served(
    "serve an expired manifest", "`exp`, by the caller's own clock", Expired, lambda stage: stage.document(lives=-1)
)


@attack("serve an older manifest to a caller who has seen a newer one", "gateway",
        "the newest manifest seen is remembered, and used while it lasts", gain="nothing; the newer keys are used")  # fmt: skip
async def test_older(stage: Stage, gateway: GatewayOwner) -> None:
    newer = PrivateKey.generate(7)
    worker = await stage.worker(keys={7: newer, **stage.held})
    await chat_twice(stage, gateway, stage.document(2, pools=stage.pools(newer)), stage.bucket)
    assert (used(gateway), worker.calls) == ([7, 7], 2)


async def chat_twice(stage: Stage, gateway: GatewayOwner, *served: bytes | None) -> None:
    """Two clients with one memory, each of which is served one of these."""
    memory = lacre.VersionMemory()
    for stage.bucket in served:
        await stage.client(gateway, memory=memory).chat(stage.prompt)


def used(gateway: GatewayOwner) -> list[int]:
    """The keys that were sealed to."""
    return [SealedHeader.parse(post.content).key_id for post in gateway.posts]


@attack("serve an older manifest once the newer one has expired", "gateway",
        "versions only rise, and the newest seen is remembered", Rollback)  # fmt: skip
async def test_rollback(stage: Stage, gateway: GatewayOwner, verdict: Verdict) -> None:
    older, stage.bucket = stage.bucket, stage.document(2, lives=60)
    await later(stage, gateway, verdict, older, 61)


@attack("serve the same manifest forever, while newer ones are published", "gateway", "`exp`: hours to days", Expired)
async def test_freeze(stage: Stage, gateway: GatewayOwner, verdict: Verdict) -> None:
    await later(stage, gateway, verdict, stage.bucket, 3601)


async def later(stage: Stage, gateway: GatewayOwner, verdict: Verdict, served: bytes | None, seconds: float) -> None:
    """A client asks, and asks again so much later, when it is served this. A clock that the test turns is the transport's."""
    await stage.worker()
    now = [time.time()]
    sealing = Sealing(raw_public_key(stage.keys.root), lacre.VersionMemory(), clock=lambda: now[0])
    outer = PerLoop(lambda: httpx2.AsyncClient(base_url="http://127.0.0.1:9", transport=gateway))
    transport = AsyncSealedTransport(sealing, outer, "t0ken")
    body = {"messages": [{"role": "user", "content": stage.prompt}]}
    async with httpx2.AsyncClient(transport=transport, base_url="https://lacre.invalid") as client:
        assert (await client.post("/v1/chat/completions", json=body)).status_code == 200
        stage.bucket = served
        now[0] += seconds
        with verdict.refused():
            await client.post("/v1/chat/completions", json=body)
    assert len(gateway.posts) == 1


@attack("serve an older manifest to a caller without a memory", "gateway",
        "nothing but `exp`: a fresh container has seen nothing", gain="use of an older key, until `exp`")  # fmt: skip
async def test_older_to_a_newcomer(stage: Stage, gateway: GatewayOwner) -> None:
    worker = await stage.worker()
    gateway.manifest = lambda older=stage.bucket: older  # type: ignore[misc]
    stage.bucket = stage.document(2, pools=stage.pools(PrivateKey.generate(7)))
    await stage.client(gateway).chat(stage.prompt)
    assert (used(gateway), worker.calls) == ([1], 1)


@attack("take a newer statement of the root out of the chain", "gateway",
        "statements are only added: a chain without the newest one seen counts as older",
        gain="nothing; the newer chain is used")  # fmt: skip
async def test_a_statement_less(stage: Stage, gateway: GatewayOwner) -> None:
    """The signer was replaced, its key stolen. It signs a manifest of a higher version, under the chain of before."""
    worker = await stage.worker()
    fresh, before = Ed25519PrivateKey.generate(), stage.statement()
    after = sign_statement(RootStatement(raw_public_key(fresh), time.time() + 7200), stage.keys.root)
    stolen = sign_manifest(stage.manifest(3, pools=stage.pools(PrivateKey.generate(9))), stage.keys.signer)
    newer = Document((before, after), sign_manifest(stage.manifest(2), fresh)).encode()
    await chat_twice(stage, gateway, newer, Document((before,), stolen).encode())
    assert (used(gateway), worker.calls) == ([1, 1], 2)


# Suites and keys


test_strip = served(
    "strip the post-quantum key from the manifest", SIGNED, InvalidSignature, rewritten(lambda pool: pool["keys"].pop(0))
)
test_classic_only = served("serve a signed manifest without post-quantum keys",
    "the caller's own choice of KEM; there is no fallback", UnsupportedSuite,
    lambda stage: stage.document(pools=stage.pools(stage.keys.classic)))  # fmt: skip
test_old_generation = served("have requests sealed to an older generation's key", "`not_after` of each key", UnsupportedSuite,
    lambda stage: stage.document(pools=stage.pools(stage.keys.pool, lives=-1)))  # fmt: skip


@attack("claim that the key is unknown, so that another one is used", "gateway",
        "the advice leads to a verified manifest and one fresh seal, never to another suite", errors.RefusedError,
        gain="a second seal of the same request, to the same key, counted in `attempts`")  # fmt: skip
async def test_unknown_key(stage: Stage, caller: Caller, gateway: GatewayOwner, verdict: Verdict) -> None:
    problem = problems.UNKNOWN_KEY
    gateway.respond = lambda _request: response(problem.status, problem.body(), problems.MEDIA_TYPE)
    with verdict.refused() as caught:
        await caller.chat(stage.prompt)
    assert caught.value.problem == problem.type  # type: ignore[attr-defined]
    headers = [SealedHeader.parse(post.content) for post in gateway.posts]
    assert [(header.key_id, header.suite.kem) for header in headers] == [(1, Kem.XWING)] * 2
    assert headers[0].enc != headers[1].enc


# Form


test_respelt = served(
    "spell the manifest's signature in another way, so that the honest one looks like a second manifest of its version",
    "a signed statement has one spelling (canonical base64url)", InvalidMessage,
    lambda stage: (stage.bucket or b"").removesuffix(b'"}') + b'=="}')  # fmt: skip
test_nested = served("serve JSON that is nested a hundred thousand deep", "parsing ends in a typed error", InvalidMessage,
    lambda _stage: b'{"roots":' + b"[" * 100_000)  # fmt: skip
ELSEWHERE = {"location": "http://evil.example/v1/manifest"}
test_no_manifest = served(
    "refuse the manifest, to be asked in the clear", "there is no plaintext fallback", Unavailable,
    *(lambda _stage, status=status: httpx2.Response(status, headers=ELSEWHERE, stream=Pieces([b""]))
      for status in (500, 503, 301)),
)  # fmt: skip


test_huge = flooded("serve a manifest document of 100 MB", "a limit, beyond which nothing is read", errors.MessageTooLarge, "",
    piece=b"[" * 65536, below=2**21, to="manifest")  # fmt: skip


@attack("put a thousand statements of its own before the pinned root's, to be verified for each root ever seen", "gateway",
        "the search looks first where the chain itself points, and is otherwise bounded",
        gain="nothing; a dozen signature checks, plus one or two for each root ever seen if the pinned root is a later "
        "one")  # fmt: skip
async def test_foreign_statements() -> None:
    memory = remembering(20)
    served = document(*foreign(999), statement(ROOTS[0]))
    assert signature_checks(lambda: accept(served, PIN, memory, NOW)) < 12
    served, later = document(*foreign(900), *changes()), raw_public_key(ROOTS[2])
    assert signature_checks(lambda: accept(served, later, memory, NOW)) < 120


@attack("forge a history of a thousand roots that lead to the pinned one, each with a valid signature", "gateway",
        "a limited number of root changes is followed back", gain="a hundred signature checks in a thread, once")  # fmt: skip
async def test_endless_history() -> None:
    others = [Ed25519PrivateKey.generate() for _ in range(500)]
    served, memory = document(*changes([*others, ROOTS[0]])), remembering(20)
    assert signature_checks(lambda: accept(served, PIN, memory, NOW)) < 500


@attack("sign with a stolen signer, after its replacement, a manifest that a restored state folder catches up with", "gateway",
        "a manifest counts for nothing if another one has all its statements and more",
        gain="nothing; the folder takes up the published one")  # fmt: skip
async def test_caught_up(tmp_path: Path) -> None:
    """Some worker had accepted it. A folder that took it up would list its pools in the place of damaged ones."""
    site, now = Site(tmp_path / "site", {POOL: (MODEL,)}), time.time()
    site.create()
    first = site.sign_manifest(now)
    stolen, old = (Site(shutil.copytree(site.folder, tmp_path / name), site.pools) for name in ("stolen", "old"))
    for _ in range(9):
        forged = stolen.sign_manifest(now)
    for newer in (first, forged):
        accept(newer, site.root, VersionFile(tmp_path / "memory"), now)
    site.authority.rotate_signer(now)
    published = site.sign_manifest(now)
    async with old.changing():
        done = catch_up(old, published, now, remembered(tmp_path / "memory", old.root))
    assert (done.version, done.statements) == (2, 1)
    assert (old.folder / "trust" / "manifest.json").read_bytes() == published


def remembering(lineages: int) -> VersionMemory:
    memory = VersionMemory()
    for _ in range(lineages):
        other = Ed25519PrivateKey.generate()
        accept(document(statement(other)), raw_public_key(other), memory, NOW)
    return memory
