"""A request that ends whichever worker begins it, against all workers of the pool."""

from __future__ import annotations

from collections.abc import AsyncIterator

import httpx2

from hostile.adversary import AsgiWire, GatewayOwner, HostileFabric, SealedAnswer, framed
from hostile.attacks import Verdict, attack
from lacre import StreamBroken, problems
from lacre.client import DEFAULT_RESUMES
from lacre_fabric.work.contract import WorkerLost
from lacre_fabric.work.frames import Frame
from parts.stage import Stage


@attack("crash one worker after another with one call", "client",
        "a redelivered request does not begin again, and the SDK counts the workers that a call lost", problems.UNCLAIMED,
        gain="two workers for each SDK call, one for each sealed request")  # fmt: skip
async def test_one_after_another(stage: Stage, honest: Stage, wire: AsgiWire, fabric: HostileFabric, verdict: Verdict) -> None:
    worker = await stage.worker()
    fabric.lost = 1  # each request has ended a worker already when this one gets it
    with verdict.refused():
        await stage.client(wire, honest.token, retries=5, resume=5).chat(stage.prompt)
    assert (len(fabric.works), worker.calls) == (2, 0)


@attack("crash one worker after another during its answer", "client",
        "the gateway ends an answer in order if its worker may be lost, and the SDK counts that over all parts of a call",
        StreamBroken, gain="two workers for each SDK call, one for each sealed request")  # fmt: skip
async def test_in_mid_answer(stage: Stage, honest: Stage, wire: AsgiWire, fabric: HostileFabric, verdict: Verdict) -> None:
    await stage.worker()

    def die(request_id: str, frame: Frame) -> list[tuple[str, Frame]]:
        if frame.sequence == 4:
            fabric.inbound[request_id].fail(WorkerLost("silent"))
        return [(request_id, frame)]

    fabric.pass_on = die
    with verdict.refused():
        async for _ in stage.client(wire, honest.token, retries=5, resume=5).chat_stream(stage.prompt):
            pass
    assert len(fabric.works) == 2


@attack("break each answer like a dying gateway, so that the caller counts no worker", "gateway",
        "the SDK counts every broken answer of a call", StreamBroken,
        gain=f"{DEFAULT_RESUMES} more sealed requests for each answer, with their sizes and token ceilings")  # fmt: skip
async def test_as_if_it_had_died(stage: Stage, gateway: GatewayOwner, verdict: Verdict) -> None:
    worker = await stage.worker()

    async def breaking(answer: SealedAnswer) -> AsyncIterator[bytes]:
        yield answer.nonce + b"".join(map(framed, answer.chunks[:4]))
        raise httpx2.ReadError("reset by peer")

    gateway.change = breaking
    with verdict.refused():
        async for _ in stage.client(gateway, resume=DEFAULT_RESUMES).chat_stream(stage.prompt):
            pass
    assert len(gateway.posts) == worker.calls == 1 + DEFAULT_RESUMES
