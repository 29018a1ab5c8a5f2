"""Grants: what a worker does for whom. A forged one, an old one, one for another request, one that says something else."""

from __future__ import annotations

import base64
import json
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any, Final

import jwt
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from hostile.adversary import GatewayOwner, HostileFabric, HttpWire, inner
from hostile.attacks import Verdict, attack
from hostile.shapes import Caller, Test, bent, granted
from lacre import ApiError, problems
from lacre.errors import Expired, InvalidAudit, InvalidSignature
from lacre.jose.jws import b64u, raw_public_key
from lacre.trust.manifest import MAX_OUTPUT, Document
from lacre.trust.signing import sign_manifest
from lacre.wire.bhttp import encode_request
from lacre_fabric.work.contract import Work
from lacre_fabric.work.grants import TYP
from parts.bent import flipped
from parts.keys import MODEL, OTHER_MODEL, OTHER_POOL
from parts.stage import Stage

BY_THE_GATEWAY = "a grant is signed by the gateway's key, which the manifest names"
BOUND = "a grant is bound to the digest of one sealed request"
INSIDE = "the sealed request repeats the outer headers, and the worker compares them with the grant"
OTHER_KEYS = "another pool has other keys"
INVALID = problems.INVALID_GRANT


# The fabric's owner: no key


def delivered(
    name: str, defence: str, refused: problems.Problem, *changes: Callable[[Work], dict[str, Any]], **options: Any
) -> Test:
    """The attack of a fabric that changes the gateway's work so: no app hears of it. options: of the workers."""

    @attack(name, "fabric", defence, refused, cases=changes, ids=range(len(changes)))
    async def test(stage: Stage, honest: Stage, wire: HttpWire, fabric: HostileFabric, verdict: Verdict, case: Any) -> None:
        workers = [await stage.worker(pool=pool, **options) for pool in (stage.pool, OTHER_POOL)]
        fabric.deliver = lambda work: [replace(work, **case(work))]
        with verdict.refused():
            await stage.client(wire, honest.token).chat(stage.prompt)
        assert [worker.calls for worker in workers] == [0, 0]

    return test


def payload_of(token: str) -> dict[str, Any]:
    members: dict[str, Any] = json.loads(base64.urlsafe_b64decode(token.split(".")[1] + "=="))
    return members


def resigned(key: Ed25519PrivateKey | None, algorithm: str) -> Callable[[Work], dict[str, Any]]:
    return lambda work: {"grant": jwt.encode(payload_of(work.grant), key, algorithm=algorithm, headers={"typ": TYP})}


def rewritten(**members: Any) -> Callable[[Work], dict[str, Any]]:
    """The grant with other contents, under the old signature."""

    def change(work: Work) -> dict[str, Any]:
        header, _, signature = work.grant.split(".")
        return {"grant": f"{header}.{b64u(json.dumps(payload_of(work.grant) | members).encode())}.{signature}"}

    return change


test_forge = delivered("forge a grant", BY_THE_GATEWAY, INVALID, resigned(Ed25519PrivateKey.generate(), "EdDSA"))
test_unsigned = delivered(
    "sign a grant under `alg: none`", "EdDSA is the only algorithm", INVALID, resigned(None, algorithm="none")
)
test_without = delivered("omit the grant", "no request runs without a grant", INVALID, lambda _work: {"grant": ""})
test_extend = delivered(
    "extend a grant's life, or raise its ceilings", BY_THE_GATEWAY, INVALID,
    *(rewritten(**members) for members in (
        {"exp": 9e9}, {"max_tokens": 2**31 - 1}, {"max_prompt_tokens": 10**6}, {"action": "http"}, {"features": ["all"]})),
)  # fmt: skip
test_late = delivered("hold a request back until its grant has expired", "`exp` of the grant: a minute", INVALID,
    lambda _work: {}, clock=lambda: time.time() + 61)  # fmt: skip
test_another_pool = delivered(
    "deliver a request to another pool", "a grant names its pool", INVALID, lambda _work: {"pool": OTHER_POOL}
)
test_another_model = delivered(
    "deliver a request to another model", "a grant names its model", INVALID, lambda _work: {"model": OTHER_MODEL}
)
test_flip = delivered("flip a bit of the sealed request", "its chunks are authenticated", problems.INVALID_REQUEST,
    lambda work: {"sealed": flipped(work.sealed)})  # fmt: skip
test_cut = delivered("cut the end off the sealed request", "its final chunk is marked", problems.INVALID_REQUEST,
    lambda work: {"sealed": work.sealed[:-17]})  # fmt: skip


async def mixed(stage: Stage, honest: Stage, wire: HttpWire, verdict: Verdict, part: str) -> None:
    """A second request is delivered with that part of a first one, which was answered."""
    worker = await stage.worker()
    client, fabric = stage.client(wire, honest.token), stage.hub
    assert isinstance(fabric, HostileFabric)
    await client.chat("A cheap question.", max_tokens=1)
    recorded = {part: getattr(fabric.works[0], part)}
    fabric.forget()
    fabric.deliver = lambda work: [replace(work, **recorded)]
    with verdict.refused():
        await client.chat(stage.prompt)
    assert worker.calls == 1


@attack("send one request's grant with another request", "fabric", BOUND, INVALID)
async def test_another_request(stage: Stage, honest: Stage, wire: HttpWire, verdict: Verdict) -> None:
    await mixed(stage, honest, wire, verdict, "grant")


@attack("swap the sealed request under a good grant", "fabric", BOUND, INVALID)
async def test_swap(stage: Stage, honest: Stage, wire: HttpWire, verdict: Verdict) -> None:
    await mixed(stage, honest, wire, verdict, "sealed")


# The manifest in the fabric, from which workers know the gateway's key


@attack("serve workers a manifest with a gateway key of its own", "fabric",
        "workers verify it against the root that they pin, and keep the one they had", InvalidSignature)  # fmt: skip
async def test_own_gateway_key(stage: Stage, verdict: Verdict) -> None:
    own = Ed25519PrivateKey.generate()
    forged = sign_manifest(stage.manifest(2, gateway_key=raw_public_key(own)), own)
    await not_taken(stage, verdict, Document((stage.statement(),), forged).encode())


@attack("serve workers a manifest that has expired", "fabric", "`exp`, by the worker's own clock", Expired)
async def test_expired_manifest(stage: Stage, verdict: Verdict) -> None:
    await not_taken(stage, verdict, stage.document(2, lives=-1))


async def not_taken(stage: Stage, verdict: Verdict, document: bytes) -> None:
    """A worker that is served this keeps the manifest that it had."""
    worker = await stage.worker()
    stage.bucket = document
    with verdict.refused():
        await worker.feed.refresh()
    assert (worker.feed.manifest.version, worker.feed.manifest.gateway_key) == (1, raw_public_key(stage.keys.gateway))


@attack("serve workers an older manifest, whose gateway key was withdrawn", "fabric",
        "versions only rise; a worker remembers the newest", INVALID)  # fmt: skip
async def test_older_gateway_key(stage: Stage, gateway: GatewayOwner, verdict: Verdict) -> None:
    """The adversary has the withdrawn key: `GatewayOwner` goes on signing with it."""
    older, now = stage.bucket, Ed25519PrivateKey.generate()
    stage.bucket = stage.document(2, gateway_key=raw_public_key(now))
    worker = await stage.worker()
    stage.bucket = older
    await worker.feed.refresh()
    with verdict.refused():
        await stage.client(gateway).chat(stage.prompt)
    assert worker.calls == 0


@attack("withhold from workers that the gateway's key was withdrawn", "fabric",
        "`exp`: a worker takes no grant by a manifest that has expired", INVALID,
        gain="the withdrawn key, until `exp`")  # fmt: skip
async def test_withheld(stage: Stage, gateway: GatewayOwner, verdict: Verdict) -> None:
    shift = 0.0
    worker = await stage.worker(clock=lambda: time.time() + shift)
    stage.bucket = stage.document(lives=10**6)
    await stage.client(gateway).chat(stage.prompt)
    shift = 3600.0
    gateway.fabric.forget()
    again = await gateway.run(gateway.posts[-1].content, iat=time.time() + shift, exp=time.time() + 2 * shift)
    verdict.said(again.problem)
    assert worker.calls == 1


# The gateway's owner: any grant, and anything outside


mismatch: Final = partial(granted, code="grant_mismatch", status=403)

test_model = mismatch("grant another model than was asked for", INSIDE, ApiError, {"model": OTHER_MODEL})
test_action = mismatch("grant another action than was asked for", INSIDE, ApiError, {"action": "complete"}, {"action": "http"})
test_max_tokens = mismatch("grant more or fewer tokens than were asked for", INSIDE, ApiError,
    *({"max_tokens": granted} for granted in (1, 511, 513, 2**31 - 1)), max_tokens=512)  # fmt: skip
test_default_tokens = mismatch("grant more tokens than the client's default", INSIDE, ApiError,
    *({"max_tokens": granted} for granted in (MAX_OUTPUT + 1, 2**31 - 1)))  # fmt: skip
test_shape = mismatch(
    "grant an answer without padding, so that its records tell their tokens", INSIDE, ApiError, {"shape": "none"}
)
test_unknown_shape = granted(
    "grant a shape that does not exist", "a worker refuses a shape that it does not know", INVALID, {"shape": "round"}
)
test_prompt_tokens = mismatch("grant so few prompt tokens that the request cannot run",
    "the worker refuses inside the seal: the gateway does not learn the reason", ApiError, {"max_prompt_tokens": 3},
    calls=1)  # fmt: skip
test_pool = granted("send a request to another pool, under a grant for it", OTHER_KEYS, problems.INVALID_REQUEST,
    {"pool": OTHER_POOL}, pool=OTHER_POOL)  # fmt: skip
test_suite = bent("sealed", "change the suite in the header of a sealed request",
    "the header is bound into the keys (HPKE's `info`)", problems.INVALID_REQUEST,
    *(lambda sealed, aead=aead: sealed[:6] + bytes([aead]) + sealed[7:] for aead in (1, 3)))  # fmt: skip


@attack("grant features that do not exist", "gateway", "workers know no features")
async def test_features(stage: Stage, caller: Caller, gateway: GatewayOwner) -> None:
    await stage.worker()
    gateway.grant = {"features": ("debug", "log_prompts")}
    assert (await caller.chat(stage.prompt)).text == stage.prompt


async def meddled(stage: Stage, honest: Stage, wire: HttpWire, verdict: Verdict, header: str, value: str) -> None:
    """Somebody between TLS and the gateway: a proxy, or a load balancer."""
    workers = [await stage.worker(pool=pool) for pool in (stage.pool, OTHER_POOL)]
    changed = f"lacre-{header}".encode()
    wire.meddle = lambda headers: [(name, value.encode() if name == changed else old) for name, old in headers]
    with verdict.refused():
        await stage.client(wire, honest.token).chat(stage.prompt, max_tokens=512)
    assert [worker.calls for worker in workers] == [0, 0]


OUTSIDE = [("model", OTHER_MODEL), ("action", "complete"), ("max-tokens", "64"), ("max-tokens", "2048"), ("shape", "none")]


@attack("change an outer header on its way to an honest gateway", "gateway",
        "the gateway's proof names the headers that it received; the worker compares them with the sealed copy, and calls no "
        "app", InvalidAudit, cases=OUTSIDE)  # fmt: skip
async def test_outside(stage: Stage, honest: Stage, wire: HttpWire, verdict: Verdict, case: tuple[str, str]) -> None:
    await meddled(stage, honest, wire, verdict, *case)


@attack("change the outer pool on its way to an honest gateway", "gateway", OTHER_KEYS, problems.INVALID_REQUEST)
async def test_outside_pool(stage: Stage, honest: Stage, wire: HttpWire, verdict: Verdict) -> None:
    await meddled(stage, honest, wire, verdict, "pool", OTHER_POOL)


@attack("seal a request of its own to the pool, and grant it to itself", "gateway", "nothing: it signs the grants",
        gain="answers to its own questions, on the pool's machines")  # fmt: skip
async def test_own_request(stage: Stage, gateway: GatewayOwner) -> None:
    await stage.worker()
    body = json.dumps({"model": MODEL, "messages": [{"role": "user", "content": "Mine."}]}).encode()
    answer = await gateway.submit(encode_request(inner(body)))
    assert json.loads(answer.body)["choices"][0]["message"]["content"] == "Mine."
