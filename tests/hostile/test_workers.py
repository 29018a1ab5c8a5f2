"""A worker that lies: to the gateway that bills by its receipts, and to the caller who pays."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from email.utils import formatdate
from typing import Any

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from hostile.adversary import AsgiWire, GatewayOwner, HostileFabric
from hostile.attacks import Verdict, attack
from hostile.workers import TOKENS, Headers, LyingWorker
from lacre import ApiError, problems
from lacre.errors import InvalidReceipt
from lacre.evidence.receipts import TRAILER, Receipt
from lacre.jose.jws import b64u_decode
from parts.stage import Stage

OF_THE_POOL = "the caller accepts one final receipt by the pool's key, which must name this request and keep its token ceiling"

Lie = Callable[[Headers, Receipt], Headers]


async def lied_to(stage: Stage, gateway: GatewayOwner, verdict: Verdict, trailers: Lie) -> None:
    async with LyingWorker(stage, trailers):
        with verdict.refused():
            await stage.client(gateway).chat(stage.prompt)


def resigned(stage: Stage, **members: Any) -> Lie:
    return lambda _honest, receipt: ((TRAILER, replace(receipt, **members).sign(stage.keys.receipts)),)


@attack("send the caller no receipt, or two", by="worker", defence=OF_THE_POOL, refused=InvalidReceipt)
@pytest.mark.parametrize("number", [0, 2])
async def test_none_or_two(stage: Stage, gateway: GatewayOwner, verdict: Verdict, number: int) -> None:
    await lied_to(stage, gateway, verdict, lambda honest, _receipt: honest * number)


@attack("sign a receipt with a key that is not the pool's", by="worker", defence=OF_THE_POOL, refused=InvalidReceipt)
async def test_own_key(stage: Stage, gateway: GatewayOwner, verdict: Verdict) -> None:
    own = Ed25519PrivateKey.generate()
    await lied_to(stage, gateway, verdict, lambda _honest, receipt: ((TRAILER, receipt.sign(own)),))


@attack("send the receipt of another request", by="worker", defence=OF_THE_POOL, refused=InvalidReceipt)
async def test_another_request(stage: Stage, gateway: GatewayOwner, verdict: Verdict) -> None:
    await lied_to(stage, gateway, verdict, resigned(stage, enc="A" * 43))


@attack("send a receipt that is not final", by="worker", defence=OF_THE_POOL, refused=InvalidReceipt)
async def test_not_final(stage: Stage, gateway: GatewayOwner, verdict: Verdict) -> None:
    await lied_to(stage, gateway, verdict, resigned(stage, final=False))


@attack("claim more tokens than the caller asked for", by="worker", defence=OF_THE_POOL, refused=InvalidReceipt)
async def test_above(stage: Stage, gateway: GatewayOwner, verdict: Verdict) -> None:
    usage = {"prompt_tokens": 9, "completion_tokens": 513}
    async with LyingWorker(stage, resigned(stage, completion_tokens=513), usage=usage):
        with verdict.refused():
            await stage.client(gateway).chat(stage.prompt)


@attack(
    "claim a different token count in the receipt than in the answer",
    by="worker",
    refused=InvalidReceipt,
    defence="the caller compares the receipt with the answer's `usage`",
)
@pytest.mark.parametrize("claimed", [TOKENS - 1, TOKENS + 1, 512])
async def test_other_than_told(stage: Stage, gateway: GatewayOwner, verdict: Verdict, claimed: int) -> None:
    await lied_to(stage, gateway, verdict, resigned(stage, completion_tokens=claimed))


@attack(
    "claim tokens that it did not make, in the receipt and in the answer alike",
    by="worker",
    refused=None,
    gain="a bill up to the reservation; `reply.recount()` shows tokens without text",
    defence="nothing at once: a receipt attributes the count but does not prove it",
)
async def test_overcount(stage: Stage, gateway: GatewayOwner) -> None:
    usage = {"prompt_tokens": 9, "completion_tokens": 500}
    async with LyingWorker(stage, resigned(stage, completion_tokens=500), usage=usage):
        reply = await stage.client(gateway).chat(stage.prompt)
    assert (reply.receipt.completion_tokens, reply.recount().unexplained) == (500, 500 - TOKENS)


@attack(
    "bill the gateway for more than was granted",
    by="worker",
    refused=None,
    gain="nothing; the request is booked as `unreceipted`",
    defence="receipts are bounded by the reservation",
)
@pytest.mark.parametrize("told", [{"completion_tokens": 513}, {"prompt_tokens": 10**6}])
async def test_bill_above(stage: Stage, honest: Stage, wire: AsgiWire, told: dict[str, int]) -> None:
    async with LyingWorker(stage, told=told):
        await stage.client(wire, honest.token).chat(stage.prompt)
    (outcome,) = await honest.outcomes()
    assert (outcome["unreceipted"], outcome["completion_tokens"]) == (True, None)


@attack(
    "tell the gateway another count than the caller",
    by="worker",
    refused=None,
    gain="a bill up to the reservation, and two receipts by the pool's key that contradict each other",
    defence="nothing at once: gateway and caller can compare",
)
async def test_two_stories(stage: Stage, honest: Stage, wire: AsgiWire) -> None:
    async with LyingWorker(stage, told={"completion_tokens": 500}):
        reply = await stage.client(wire, honest.token).chat(stage.prompt)
    (outcome,) = await honest.outcomes()
    assert (reply.receipt.completion_tokens, outcome["completion_tokens"]) == (TOKENS, 500)


@attack(
    "look for the caller's name in opened requests",
    by="worker",
    refused=None,
    gain="the prompt, which it must read; no name",
    defence="inner headers by allow-list, identifying fields dropped, grants without a name",
)
async def test_who(stage: Stage, honest: Stage, wire: AsgiWire, fabric: HostileFabric) -> None:
    client = stage.client(wire, honest.token)
    names = ("authorization", "cookie", "user-agent", "x-stainless-os", "traceparent", "baggage", "forwarded", "x-request-id")
    about = {"user": "jocelyn", "metadata": {"name": "jocelyn"}, "safety_identifier": "jocelyn", "prompt_cache_key": "jocelyn"}
    body = {"messages": [{"role": "user", "content": stage.prompt}], **about}
    async with LyingWorker(stage) as worker:
        headers = dict.fromkeys(names, "jocelyn")
        assert (await client.post("/v1/chat/completions", json=body, headers=headers)).status_code == 200
    work = fabric.works[0]
    everything = (worker.opened[0] + b64u_decode(work.grant.split(".")[1])).lower()
    assert stage.canary.encode() in everything
    for secret in ("jocelyn", "alice", "acme", honest.token.lower(), "lacre/", "192.0.2.1"):
        assert secret.encode() not in everything


@attack(
    "mark a caller by a false clock",
    by="worker",
    refused=ApiError,
    code=problems.DATE.type,
    defence="one correction a request, 30 days at most, forgotten with the hour's salt",
)
@pytest.mark.parametrize("date", [formatdate(4e9, usegmt=True), "Mon, 01 Jan 99999999999999 00:00:00 GMT", "yesterday"])
async def test_clock(stage: Stage, gateway: GatewayOwner, verdict: Verdict, date: str) -> None:
    headers = (("content-type", problems.MEDIA_TYPE), ("date", date))
    async with LyingWorker(stage, status=400, headers=headers, body=problems.DATE.body()) as worker:
        with verdict.refused():
            await stage.client(gateway).chat(stage.prompt)
    assert len(worker.opened) == 1


@attack(
    "have the caller correct its clock again and again",
    by="worker",
    refused=ApiError,
    code=problems.DATE.type,
    defence="one correction a request",
    gain="one more run of its own request, counted in `attempts`",
)
async def test_clock_again(stage: Stage, gateway: GatewayOwner, verdict: Verdict) -> None:
    headers = (("content-type", problems.MEDIA_TYPE), ("date", formatdate(None, usegmt=True)))
    async with LyingWorker(stage, status=400, headers=headers, body=problems.DATE.body()) as worker:
        with verdict.refused():
            await stage.client(gateway).chat(stage.prompt)
    assert len(worker.opened) == 2
