"""Grants: what a worker does for whom. A forged one, an old one, one for another request, one that says something else."""

from __future__ import annotations

import base64
import json
import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import jwt
import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from hostile.adversary import AsgiWire, GatewayOwner, HostileFabric
from hostile.attacks import Verdict, attack
from hostile.callers import Caller
from lacre import ApiError, problems
from lacre.errors import Expired, InvalidAudit, InvalidSignature
from lacre.jose.jws import b64u, raw_public_key
from lacre.trust.manifest import Document
from lacre.trust.signing import sign_manifest
from lacre_fabric.work.contract import Work
from lacre_fabric.work.grants import TYP
from parts.bent import flipped
from parts.keys import MODEL, OTHER_MODEL, OTHER_POOL
from parts.stage import Stage

BY_THE_GATEWAY = "a grant is signed by the gateway's key, which the manifest names"
BOUND = "a grant is bound to the digest of one sealed request"
INSIDE = "the sealed request repeats the outer headers, and the worker compares them with the grant"


# The fabric's owner: no key


async def refused(stage: Stage, honest: Stage, wire: AsgiWire, verdict: Verdict, deliver: Callable[[Work], list[Work]]) -> None:
    """The caller's request reaches the worker as `deliver` has it; the app never hears of it."""
    worker = await stage.worker()
    stage.hub.deliver = deliver  # type: ignore[attr-defined]
    with verdict.refused():
        await stage.client(wire, honest.token).chat(stage.prompt)
    assert worker.calls == 0


def regranted(change: Callable[[str], str]) -> Callable[[Work], list[Work]]:
    return lambda work: [replace(work, grant=change(work.grant))]


def payload_of(token: str) -> dict[str, Any]:
    members: dict[str, Any] = json.loads(base64.urlsafe_b64decode(token.split(".")[1] + "=="))
    return members


def with_members(**members: Any) -> Callable[[str], str]:
    """The grant with other contents, under the old signature."""

    def change(token: str) -> str:
        header, _, signature = token.split(".")
        return f"{header}.{b64u(json.dumps(payload_of(token) | members).encode())}.{signature}"

    return change


@attack("forge a grant", by="fabric", defence=BY_THE_GATEWAY, refused=problems.INVALID_GRANT)
async def test_forge(stage: Stage, honest: Stage, wire: AsgiWire, verdict: Verdict) -> None:
    own = Ed25519PrivateKey.generate()
    forge = regranted(lambda token: jwt.encode(payload_of(token), own, algorithm="EdDSA", headers={"typ": TYP}))
    await refused(stage, honest, wire, verdict, forge)


@attack("sign a grant under `alg: none`", by="fabric", defence="EdDSA is the only algorithm", refused=problems.INVALID_GRANT)
async def test_unsigned(stage: Stage, honest: Stage, wire: AsgiWire, verdict: Verdict) -> None:
    forge = regranted(lambda token: jwt.encode(payload_of(token), None, algorithm="none", headers={"typ": TYP}))
    await refused(stage, honest, wire, verdict, forge)


@attack("omit the grant", by="fabric", defence="no request runs without a grant", refused=problems.INVALID_GRANT)
async def test_without(stage: Stage, honest: Stage, wire: AsgiWire, verdict: Verdict) -> None:
    await refused(stage, honest, wire, verdict, regranted(lambda _token: ""))


@attack("extend a grant's life, or raise its ceilings", by="fabric", defence=BY_THE_GATEWAY, refused=problems.INVALID_GRANT)
@pytest.mark.parametrize(
    "members",
    [{"exp": 9e9}, {"max_tokens": 2**31 - 1}, {"max_prompt_tokens": 10**6}, {"action": "http"}, {"features": ["all"]}],
)
async def test_extend(stage: Stage, honest: Stage, wire: AsgiWire, verdict: Verdict, members: dict[str, Any]) -> None:
    await refused(stage, honest, wire, verdict, regranted(with_members(**members)))


@attack("send one request's grant with another request", by="fabric", defence=BOUND, refused=problems.INVALID_GRANT)
async def test_another_request(stage: Stage, honest: Stage, wire: AsgiWire, fabric: HostileFabric, verdict: Verdict) -> None:
    worker = await stage.worker()
    client = stage.client(wire, honest.token)
    await client.chat("A cheap question.", max_tokens=1)
    fabric.deliver = regranted(lambda _token: fabric.works[0].grant)
    with verdict.refused():
        await client.chat(stage.prompt)
    assert worker.calls == 1


@attack("swap the sealed request under a good grant", by="fabric", defence=BOUND, refused=problems.INVALID_GRANT)
async def test_swap(stage: Stage, honest: Stage, wire: AsgiWire, fabric: HostileFabric, verdict: Verdict) -> None:
    worker = await stage.worker()
    client = stage.client(wire, honest.token)
    await client.chat("A recorded question.")
    recorded = fabric.works[0].sealed
    fabric.forget()
    fabric.deliver = lambda work: [replace(work, sealed=recorded)]
    with verdict.refused():
        await client.chat(stage.prompt)
    assert worker.calls == 1


@attack(
    "hold a request back until its grant has expired",
    by="fabric",
    defence="`exp` of the grant: a minute",
    refused=problems.INVALID_GRANT,
)
async def test_late(stage: Stage, honest: Stage, wire: AsgiWire, verdict: Verdict) -> None:
    worker = await stage.worker(clock=lambda: time.time() + 61)
    with verdict.refused():
        await stage.client(wire, honest.token).chat(stage.prompt)
    assert worker.calls == 0


@attack("deliver a request to another pool", by="fabric", defence="a grant names its pool", refused=problems.INVALID_GRANT)
async def test_another_pool(stage: Stage, honest: Stage, wire: AsgiWire, verdict: Verdict) -> None:
    other = await stage.worker(pool=OTHER_POOL)
    await refused(stage, honest, wire, verdict, lambda work: [replace(work, pool=OTHER_POOL)])
    assert other.calls == 0


@attack("deliver a request to another model", by="fabric", defence="a grant names its model", refused=problems.INVALID_GRANT)
async def test_another_model(stage: Stage, honest: Stage, wire: AsgiWire, verdict: Verdict) -> None:
    await refused(stage, honest, wire, verdict, lambda work: [replace(work, model=OTHER_MODEL)])


@attack(
    "flip a bit of the sealed request", by="fabric", defence="its chunks are authenticated", refused=problems.INVALID_REQUEST
)
async def test_flip(stage: Stage, honest: Stage, wire: AsgiWire, verdict: Verdict) -> None:
    await refused(stage, honest, wire, verdict, lambda work: [replace(work, sealed=flipped(work.sealed))])


@attack(
    "cut the end off the sealed request", by="fabric", defence="its final chunk is marked", refused=problems.INVALID_REQUEST
)
async def test_cut(stage: Stage, honest: Stage, wire: AsgiWire, verdict: Verdict) -> None:
    await refused(stage, honest, wire, verdict, lambda work: [replace(work, sealed=work.sealed[:-17])])


# The manifest in the fabric, from which workers know the gateway's key


@attack(
    "serve workers a manifest with a gateway key of its own",
    by="fabric",
    refused=InvalidSignature,
    defence="workers verify it against the root that they pin, and keep the one they had",
)
async def test_own_gateway_key(stage: Stage, verdict: Verdict) -> None:
    worker = await stage.worker()
    own = Ed25519PrivateKey.generate()
    forged = sign_manifest(stage.manifest(2, gateway_key=raw_public_key(own)), own)
    stage.bucket = Document((stage.statement(),), forged).encode()
    with verdict.refused():
        await worker.feed.refresh()
    assert worker.feed.manifest.gateway_key == raw_public_key(stage.keys.gateway)


@attack(
    "serve workers an older manifest, whose gateway key was withdrawn",
    by="fabric",
    refused=problems.INVALID_GRANT,
    defence="versions only rise; a worker remembers the newest",
)
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


@attack("serve workers a manifest that has expired", by="fabric", defence="`exp`, by the worker's own clock", refused=Expired)
async def test_expired_manifest(stage: Stage, verdict: Verdict) -> None:
    worker = await stage.worker()
    stage.bucket = stage.document(2, lives=-1)
    with verdict.refused():
        await worker.feed.refresh()
    assert worker.feed.manifest.version == 1


@attack(
    "withhold from workers that the gateway's key was withdrawn",
    by="fabric",
    refused=problems.INVALID_GRANT,
    defence="`exp`: a worker takes no grant by a manifest that has expired",
    gain="the withdrawn key, until `exp`",
)
async def test_withheld(stage: Stage, gateway: GatewayOwner, verdict: Verdict) -> None:
    worker = await stage.worker(clock=lambda: time.time() + shift[0])
    shift = [0.0]
    stage.bucket = stage.document(lives=10**6)
    await stage.client(gateway).chat(stage.prompt)
    shift[0] = 3600.0
    sealed = gateway.posts[-1].content
    gateway.fabric.forget()
    verdict.said((await gateway.run(sealed, iat=time.time() + 3600, exp=time.time() + 7200)).problem)
    assert worker.calls == 1


# The gateway's owner: any grant, and anything outside


@attack("grant another model than was asked for", by="gateway", defence=INSIDE, refused=ApiError, code="grant_mismatch")
async def test_model(stage: Stage, caller: Caller, gateway: GatewayOwner, verdict: Verdict) -> None:
    await mismatch(stage, caller, gateway, verdict, model=OTHER_MODEL)


@attack("grant another action than was asked for", by="gateway", defence=INSIDE, refused=ApiError, code="grant_mismatch")
@pytest.mark.parametrize("action", ["complete", "http"])
async def test_action(stage: Stage, caller: Caller, gateway: GatewayOwner, verdict: Verdict, action: str) -> None:
    await mismatch(stage, caller, gateway, verdict, action=action)


@attack("grant more or fewer tokens than were asked for", by="gateway", defence=INSIDE, refused=ApiError, code="grant_mismatch")
@pytest.mark.parametrize("max_tokens", [1, 511, 513, 2**31 - 1])
async def test_max_tokens(stage: Stage, caller: Caller, gateway: GatewayOwner, verdict: Verdict, max_tokens: int) -> None:
    await mismatch(stage, caller, gateway, verdict, max_tokens=max_tokens)


@attack(
    "grant an answer without padding, so that its records tell their tokens",
    by="gateway",
    defence=INSIDE,
    refused=ApiError,
    code="grant_mismatch",
)
async def test_shape(stage: Stage, caller: Caller, gateway: GatewayOwner, verdict: Verdict) -> None:
    await mismatch(stage, caller, gateway, verdict, shape="none")


async def mismatch(stage: Stage, caller: Caller, gateway: GatewayOwner, verdict: Verdict, **grant: Any) -> None:
    worker = await stage.worker()
    gateway.grant = grant
    with verdict.refused() as caught:
        await caller.chat(stage.prompt)
    assert isinstance(caught.value, ApiError)
    assert (caught.value.status, worker.calls) == (403, 0)


@attack(
    "grant a shape that does not exist",
    by="gateway",
    defence="a worker refuses a shape that it does not know",
    refused=problems.INVALID_GRANT,
)
async def test_unknown_shape(stage: Stage, caller: Caller, gateway: GatewayOwner, verdict: Verdict) -> None:
    worker = await stage.worker()
    gateway.grant = {"shape": "round"}
    with verdict.refused():
        await caller.chat(stage.prompt)
    assert worker.calls == 0


@attack(
    "send a request to another pool, under a grant for it",
    by="gateway",
    refused=problems.INVALID_REQUEST,
    defence="another pool has other keys",
)
async def test_pool(stage: Stage, caller: Caller, gateway: GatewayOwner, verdict: Verdict) -> None:
    worker = await stage.worker(pool=OTHER_POOL)
    gateway.grant = {"pool": OTHER_POOL}
    with verdict.refused():
        await caller.chat(stage.prompt)
    assert worker.calls == 0


@attack(
    "grant so few prompt tokens that the request cannot run",
    by="gateway",
    refused=ApiError,
    code="grant_mismatch",
    defence="the worker refuses inside the seal: the gateway does not learn the reason",
)
async def test_prompt_tokens(stage: Stage, caller: Caller, gateway: GatewayOwner, verdict: Verdict) -> None:
    await stage.worker()
    gateway.grant = {"max_prompt_tokens": 3}
    with verdict.refused():
        await caller.chat(stage.prompt)


@attack("grant features that do not exist", by="gateway", defence="workers know no features", refused=None, gain="nothing")
async def test_features(stage: Stage, caller: Caller, gateway: GatewayOwner) -> None:
    await stage.worker()
    gateway.grant = {"features": ("debug", "log_prompts")}
    assert (await caller.chat(stage.prompt)).text == stage.prompt


@attack(
    "change an outer header on its way to an honest gateway",
    by="gateway",
    refused=InvalidAudit,
    defence="the gateway's proof names the headers that it received; the worker compares them with the sealed copy, and "
    "calls no app",
)
@pytest.mark.parametrize(
    ("header", "value"),
    [("model", OTHER_MODEL), ("action", "complete"), ("max-tokens", "64"), ("max-tokens", "2048"), ("shape", "none")],
)
async def test_outside(stage: Stage, honest: Stage, wire: AsgiWire, verdict: Verdict, header: str, value: str) -> None:
    """Somebody between TLS and the gateway: a proxy, or a load balancer."""
    worker = await stage.worker()
    changed = f"lacre-{header}".encode()
    wire.meddle = lambda headers: [(name, value.encode() if name == changed else old) for name, old in headers]
    with verdict.refused():
        await stage.client(wire, honest.token).chat(stage.prompt)
    assert worker.calls == 0


@attack(
    "change the outer pool on its way to an honest gateway",
    by="gateway",
    defence="another pool has other keys",
    refused=problems.INVALID_REQUEST,
)
async def test_outside_pool(stage: Stage, honest: Stage, wire: AsgiWire, verdict: Verdict) -> None:
    worker = await stage.worker(pool=OTHER_POOL)
    wire.meddle = lambda headers: [(name, b"other" if name == b"lacre-pool" else value) for name, value in headers]
    with verdict.refused():
        await stage.client(wire, honest.token).chat(stage.prompt)
    assert worker.calls == 0


@attack(
    "change the suite in the header of a sealed request",
    by="gateway",
    refused=problems.INVALID_REQUEST,
    defence="the header is bound into the keys (HPKE's `info`)",
)
@pytest.mark.parametrize("aead", [1, 3])
async def test_suite(stage: Stage, caller: Caller, gateway: GatewayOwner, verdict: Verdict, aead: int) -> None:
    worker = await stage.worker()
    gateway.sealed = lambda sealed: sealed[:6] + bytes([aead]) + sealed[7:]
    with verdict.refused():
        await caller.chat(stage.prompt)
    assert worker.calls == 0


@attack(
    "seal a request of its own to the pool, and grant it to itself",
    by="gateway",
    refused=None,
    gain="answers to its own questions, on the pool's machines",
    defence="nothing: it signs the grants",
)
async def test_own_request(stage: Stage, gateway: GatewayOwner) -> None:
    from hostile.adversary import inner  # noqa: PLC0415
    from lacre.wire.bhttp import encode_request  # noqa: PLC0415

    await stage.worker()
    body = json.dumps({"model": MODEL, "messages": [{"role": "user", "content": "Mine."}]}).encode()
    answer = await gateway.submit(encode_request(inner(body)))
    assert json.loads(answer.body)["choices"][0]["message"]["content"] == "Mine."
