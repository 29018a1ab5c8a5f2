"""A sealed request that is sent again: recorded, or because it ended the worker that began it."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator, Callable
from email.utils import formatdate
from typing import Any

import httpx2

from hostile.adversary import (
    Agreeable,
    GatewayOwner,
    HostileFabric,
    HttpWire,
    Respond,
    SealedAnswer,
    framed,
    inner,
    opened,
    response,
)
from hostile.attacks import Verdict, attack
from lacre import ApiError, OpenError, StreamBroken, problems
from lacre.asgi import Sealed
from lacre.asgi.admission import DATE_WINDOW, ReplayMemory
from lacre.client import DEFAULT_RESUMES
from lacre.wire import bhttp
from lacre.wire.bhttp import encode_request
from lacre.wire.header import MEDIA_TYPE_REQUEST, MEDIA_TYPE_RESPONSE, WELL_KNOWN
from lacre.wire.ohttp import seal_request
from lacre.wire.opening import PrivateKey
from lacre_fabric.work.contract import CLAIM_TTL, WorkerLost
from lacre_fabric.work.frames import Frame
from parts.stage import Stage, Worker
from parts.waiting import until

NOW = 1_800_000_000.0
ONCE = "a worker remembers each opened digest for longer than its date is valid"
CLAIM = "a worker claims a request in the whole pool before it sends any part of an answer"
DATE = "the sealed `date` bounds the window: 300 s"
AGAIN = "one more sealed answer"
NO_MORE = "nothing; the second copy ends without an answer"


async def recorded(stage: Stage, gateway: GatewayOwner) -> bytes:
    """A caller's sealed request, which has had its answer. The fabric has forgotten it."""
    await stage.client(gateway).chat(stage.prompt)
    gateway.fabric.forget()
    return gateway.posts[-1].content


async def restarted(stage: Stage, gateway: GatewayOwner, **options: Any) -> tuple[bytes, Worker]:
    """A recorded request, and another worker in the place of the one that answered it. options: of its own."""
    before = await stage.worker()
    sealed = await recorded(stage, gateway)
    await before.stop()
    assert before.calls == 1
    return sealed, await stage.worker(**options)


async def copied(stage: Stage, honest: Stage, wire: HttpWire, fabric: HostileFabric, copies: int, workers: int) -> list[Worker]:
    """A request is delivered so often to so many workers, and its caller answered."""
    running = [await stage.worker(slots=1) for _ in range(workers)]
    fabric.deliver = lambda work: [work] * copies
    assert (await stage.client(wire, honest.token).chat(stage.prompt)).text == stage.prompt
    await settled(fabric, copies)
    return running


@attack("send a recorded request to the gateway again, with another token", "client",
        "the queue takes a digest once, from all gateways together", problems.REPLAYED)  # fmt: skip
async def test_at_the_gateway(stage: Stage, honest: Stage, wire: HttpWire, verdict: Verdict) -> None:
    worker = await stage.worker()
    await stage.client(wire, honest.token).chat(stage.prompt)
    recorded = next(request for request in wire.requests if request.url.path == "/v1/sealed")
    again = httpx2.Request("POST", recorded.url, headers=recorded.headers, content=recorded.content)
    answer = await wire.handle_async_request(again)
    verdict.said(problems.Problem.type_in(await answer.aread()))
    assert (answer.status_code, worker.calls) == (409, 1)


@attack("deliver a request twice", "fabric", CLAIM, gain=NO_MORE)
async def test_twice(stage: Stage, honest: Stage, wire: HttpWire, fabric: HostileFabric) -> None:
    [worker] = await copied(stage, honest, wire, fabric, 2, 1)
    assert worker.calls == 1


async def settled(fabric: HostileFabric, ended: int) -> None:
    await until(lambda: len(fabric.eyes.outcomes) >= ended)


@attack("deliver a request to two workers at once", "fabric", CLAIM, gain=NO_MORE)
async def test_two_workers(stage: Stage, honest: Stage, wire: HttpWire, fabric: HostileFabric) -> None:
    workers = await copied(stage, honest, wire, fabric, 2, 2)
    assert sum(worker.calls for worker in workers) == 1
    assert sorted(outcome for _, outcome in fabric.eyes.outcomes) == ["answered", "replayed"]


@attack("send a request to the same worker again, under a fresh grant", "gateway", f"{CLAIM}; {ONCE}", gain=NO_MORE)
async def test_same_worker(stage: Stage, gateway: GatewayOwner, fabric: HostileFabric) -> None:
    worker = await stage.worker()
    await stage.client(gateway).chat(stage.prompt)
    fabric.published.clear()
    assert (await gateway.run(gateway.posts[-1].content)).outcome == "replayed"
    assert worker.calls == 1


@attack("wipe the fabric's memory, and send a request to the same worker again", "fabric", ONCE, gain=NO_MORE)
async def test_same_worker_wiped(stage: Stage, gateway: GatewayOwner, fabric: HostileFabric) -> None:
    worker = await stage.worker()
    sealed = await recorded(stage, gateway)
    assert (await gateway.run(sealed, token=fabric.works[0].grant)).outcome == "replayed"
    assert worker.calls == 1


@attack("fill a worker's replay memory with requests, until it forgets", "gateway",
        "a digest that could still be replayed is never forgotten", gain="nothing; a full memory refuses requests")  # fmt: skip
async def test_flood() -> None:
    now = time.time()
    seen = ReplayMemory(limit=1000)
    assert seen.add(b"recorded", now)
    assert [seen.add(bytes([number // 256, number % 256]), now + 1) for number in range(1200)].count(True) == 999
    assert not seen.add(b"recorded", now + 2)
    assert not seen.add(b"recorded", now + CLAIM_TTL - 1)
    assert seen.add(b"another", now + CLAIM_TTL + 2)


@attack("send endless requests with wrong dates, until an app behind `Sealed` has no replay memory left", "client",
        "a request that is refused for its date is not remembered", gain="a sealed refusal for each of them")  # fmt: skip
async def test_stale_requests() -> None:
    """Seen by one of them: once its date has come it runs, and then it is remembered."""
    now = NOW
    key = PrivateKey.generate(1)
    app = Sealed(empty_app, keys=key, clock=lambda: now)
    request = bhttp.Request("GET", "https", "lacre.invalid", "/", (("date", formatdate(NOW + 600, usegmt=True)),), b"")
    body, _, _ = seal_request(key.config, bhttp.encode_request(request))
    async with httpx2.AsyncClient(transport=httpx2.ASGITransport(app), base_url="http://service") as client:
        ends = []
        for now in (NOW, NOW + 1, NOW + 600, NOW + 601):  # noqa: B007 - it is the app's clock
            headers = {"content-type": MEDIA_TYPE_REQUEST}
            ends.append((await client.post(WELL_KNOWN, content=body, headers=headers)).headers["content-type"])
    assert ends == [MEDIA_TYPE_RESPONSE] * 3 + [problems.MEDIA_TYPE]


async def empty_app(_scope: object, _receive: object, send: Any) -> None:
    await send({"type": "http.response.start", "status": 204, "headers": []})
    await send({"type": "http.response.body", "body": b""})


@attack("fill a worker's replay memory with requests of every valid date, until it refuses everyone", "client",
        "a full memory refuses the oldest dates first, and future dates get a quarter of it",
        gain="fewer dates are accepted; callers with a correct clock continue, and nothing runs twice")  # fmt: skip
async def test_flood_of_dates() -> None:
    now, seen = NOW, ReplayMemory(limit=1000)
    honest = [number.to_bytes(2) for number in range(500)]
    for number, digest in enumerate(honest):
        for more in range(20):  # as far from now as may be, and of this very moment too
            sent = now + (-1, 1)[more % 2] * DATE_WINDOW * (20 - more) / 20
            for date in (sent, now):
                if seen.takes(date, now):
                    seen.add(digest + bytes([more, date == now]), now, date)
        assert seen.takes(now, now) and seen.add(digest, now, now)
        assert not seen.add(digest, now, now)
        now += number % 2
    for number, digest in enumerate(honest):  # replays of the flood's honest requests, each sent at a date of its own
        sent = NOW + number // 2
        assert abs(sent - now) > DATE_WINDOW or not seen.takes(sent, now) or not seen.add(digest, now, sent)


@attack("lie about claims, and send a request to every worker of the pool", "fabric", "nothing: the fabric keeps the claims",
        gain=f"{AGAIN} from each other worker process of the pool, all unreadable")  # fmt: skip
async def test_every_worker(stage: Stage, honest: Stage, wire: HttpWire, fabric: HostileFabric) -> None:
    fabric.claims = Agreeable()
    workers = await copied(stage, honest, wire, fabric, 3, 3)
    assert [worker.calls for worker in workers] == [1, 1, 1]
    fabric.deliver = lambda work: [work]
    await fabric.enqueue(fabric.works[0], 2)  # nor more often than that
    await settled(fabric, 4)
    assert [worker.calls for worker in workers] == [1, 1, 1]


@attack("wipe the fabric's memory, and send a request again after its worker restarted", "fabric",
        "nothing: both memories are new",
        gain=f"{AGAIN} within the date window and the grant's minute, which it cannot read")  # fmt: skip
async def test_restarted(stage: Stage, gateway: GatewayOwner, fabric: HostileFabric) -> None:
    sealed, after = await restarted(stage, gateway)
    ran = await gateway.run(sealed, token=fabric.works[0].grant)
    assert (ran.outcome, after.calls) == ("answered", 1)
    assert ran.sealed != gateway.answers[0]


@attack("send a request again to a restarted worker, after its grant has expired", "fabric", "a grant is good for a minute",
        problems.INVALID_GRANT)  # fmt: skip
async def test_restarted_late(stage: Stage, gateway: GatewayOwner, fabric: HostileFabric, verdict: Verdict) -> None:
    sealed, after = await restarted(stage, gateway, clock=lambda: time.time() + 61)
    verdict.said((await gateway.run(sealed, token=fabric.works[0].grant)).problem)
    assert after.calls == 0


@attack("send a request again to a restarted worker, after the date window, under a fresh grant", "gateway", DATE, ApiError,
        code=problems.DATE.type)  # fmt: skip
async def test_restarted_too_late(stage: Stage, gateway: GatewayOwner, fabric: HostileFabric, verdict: Verdict) -> None:
    before = await stage.worker()
    sealed, _, opener = seal_request(stage.keys.pool.config, encode_request(inner(stage.prompt.encode())))
    assert (await gateway.run(sealed)).outcome == "answered"
    await before.stop()
    fabric.forget()
    after = await stage.worker(clock=lambda: time.time() + 301)
    answer = opened(await gateway.run(sealed, exp=time.time() + 600), opener)
    verdict.answered(answer.status, answer.code)
    assert (answer.outcome, after.calls) == ("refused-inside", 0)


def in_two_workers(stage: Stage, gateway: GatewayOwner, chosen: Callable[..., SealedAnswer]) -> Respond:
    """Has one request run in two workers, and gives the caller what is `chosen` of the two answers."""

    async def respond(request: httpx2.Request) -> httpx2.Response:
        answers = []
        for _ in range(2):
            worker = await stage.worker()
            gateway.fabric.forget()
            answers.append(SealedAnswer.parse((await gateway.run(request.content, gateway.outer(request))).sealed))
            assert worker.calls == 1
            await worker.stop()
        return response(200, chosen(*answers).encode(), MEDIA_TYPE_RESPONSE)

    return respond


@attack("have a request run in two workers, and choose which answer the caller gets", "gateway",
        "nothing: both are answers to this request",
        gain="the choice between two true answers, neither of which it can read")  # fmt: skip
async def test_choose(stage: Stage, gateway: GatewayOwner) -> None:
    gateway.respond = in_two_workers(stage, gateway, lambda _first, second: second)
    reply = await stage.client(gateway).chat(stage.prompt)
    assert (reply.text, reply.attempts) == (stage.prompt, 1)


@attack("have a request run in two workers, and splice the two answers", "gateway",
        "each answer has a key of its own, from its worker's nonce", OpenError)  # fmt: skip
async def test_splice(stage: Stage, gateway: GatewayOwner, verdict: Verdict) -> None:
    gateway.respond = in_two_workers(
        stage, gateway, lambda first, second: SealedAnswer(first.nonce, [*first.chunks[:5], *second.chunks[5:]], second.final)
    )
    with verdict.refused():
        [piece async for piece in stage.client(gateway).chat_stream(stage.prompt)]


@attack("have a request run, and then claim that its key is unknown", "gateway",
        "advice before the seal is followed once, and counted",
        gain="a second run of the same question, under a second seal; the caller sees `attempts` = 2")  # fmt: skip
async def test_run_and_deny(stage: Stage, gateway: GatewayOwner) -> None:
    worker = await stage.worker()

    async def respond(request: httpx2.Request) -> httpx2.Response | None:
        if len(gateway.posts) > 1:
            return None
        await gateway.run(request.content, gateway.outer(request))
        return response(422, problems.UNKNOWN_KEY.body(), problems.MEDIA_TYPE)

    gateway.respond = respond
    reply = await stage.client(gateway).chat(stage.prompt)
    assert (reply.attempts, worker.calls) == (2, 2)


@attack("hand the answer to a recorded request to the caller's next one", "gateway",
        "the answer's key is exported from this one request's context", OpenError)  # fmt: skip
async def test_recorded_answer(stage: Stage, gateway: GatewayOwner, fabric: HostileFabric, verdict: Verdict) -> None:
    """Even where the same question was asked, and the recorded request was answered anew."""
    sealed, _ = await restarted(stage, gateway)
    anew = await gateway.run(sealed)
    gateway.change = lambda _answer: anew.sealed
    with verdict.refused():
        await stage.client(gateway).chat(stage.prompt)


@attack("crash one worker after another with one call", "client",
        "a redelivered request does not begin again, and the SDK counts the workers that a call lost", problems.UNCLAIMED,
        gain="two workers for each SDK call, one for each sealed request")  # fmt: skip
async def test_one_after_another(stage: Stage, honest: Stage, wire: HttpWire, fabric: HostileFabric, verdict: Verdict) -> None:
    worker = await stage.worker()
    fabric.lost = 1  # each request has ended a worker already when this one gets it
    with verdict.refused():
        await stage.client(wire, honest.token, retries=5, resume=5).chat(stage.prompt)
    assert (len(fabric.works), worker.calls) == (2, 0)


@attack("crash one worker after another during its answer", "client",
        "the gateway ends an answer in order if its worker may be lost, and the SDK counts that over all parts of a call",
        StreamBroken, gain="two workers for each SDK call, one for each sealed request")  # fmt: skip
async def test_in_mid_answer(stage: Stage, honest: Stage, wire: HttpWire, fabric: HostileFabric, verdict: Verdict) -> None:
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
