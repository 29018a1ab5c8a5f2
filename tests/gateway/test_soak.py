"""No request outlives its end: neither its exchange nor its body waits for the collector of cycles.

A server collects rarely. A cycle that holds a body kept 882 MB of them in a prototype.
"""

from __future__ import annotations

import asyncio
import dataclasses
import gc
import tracemalloc
import weakref
from collections.abc import Awaitable, Callable, Iterator

import pytest

from lacre_fabric.work.contract import Work, WorkerLost
from lacre_gateway.http.exchange import Exchange
from lacre_gateway.http.server import make_server
from lacre_gateway.settings import Listen
from parts.fake_worker import FakeWorker, Script
from parts.in_memory_http import Connection
from parts.stage import Stage
from parts.waiting import until

BODY = 512 * 1024  # bytes of a request
ROUNDS = 4
MOST = BODY // 2  # bytes that all rounds together may leave: books, logs and pools, and no body


@pytest.fixture
def uncollected() -> Iterator[None]:
    gc.collect()
    gc.disable()
    tracemalloc.start()
    yield
    tracemalloc.stop()
    gc.enable()


def held() -> int:
    """Bytes that code of the gateway and the SDK allocated, and somebody still refers to."""
    ours = [tracemalloc.Filter(True, f"*/{room}/*") for room in ("lacre", "lacre_gateway", "lacre_fabric")]
    return sum(each.size for each in tracemalloc.take_snapshot().filter_traces(ours).statistics("filename"))


@pytest.fixture
def served(stage: Stage) -> list[weakref.ref[Exchange]]:
    """All exchanges of the stage's app."""
    kept: list[weakref.ref[Exchange]] = []
    serve = stage.app.sealed.serve  # type: ignore[attr-defined]

    async def watched(exchange: Exchange) -> None:
        kept.append(weakref.ref(exchange))
        await serve(exchange)

    stage.app.sealed = dataclasses.replace(stage.app.sealed, serve=watched)  # type: ignore[attr-defined]
    return kept


class Client:
    """Speaks in raw bytes, one connection for each request: a library's client keeps its requests in cycles of its own."""

    def __init__(self, stage: Stage, worker: FakeWorker) -> None:
        self.stage = stage
        self.worker = worker
        self._server = make_server(stage.app, Listen(port=0))
        self._enqueue, stage.hub.enqueue = stage.hub.enqueue, self._copied  # type: ignore[method-assign]

    async def _copied(self, work: Work, deliveries: int) -> None:
        """The worker gets bytes of its own, as over a network: it may keep them for longer."""
        await self._enqueue(dataclasses.replace(work, sealed=bytes(memoryview(work.sealed))), deliveries)

    def sealed(self) -> bytes:
        return self.stage.seal(content=bytes(BODY))[0]

    async def post(self, body: bytes, *, leave: Callable[[], bool] = lambda: False, **headers: str) -> int | None:
        """The status. leave: when it hangs up."""
        connection = Connection(self._server.connection(), "192.0.2.1")
        fields = {**self.stage.headers(**headers), "host": "x", "content-length": str(len(body)), "connection": "close"}
        lines = "".join(f"{name}: {value}\r\n" for name, value in fields.items())
        await connection.say(f"POST /v1/sealed HTTP/1.1\r\n{lines}\r\n".encode() + body)
        await until(lambda: connection.transport.ended or leave())
        connection.transport.hang_up()
        await until(lambda: connection.transport.protocol is None)
        said = b"" if connection.news.empty() else connection.news.get_nowait()
        return int(said.split()[1]) if said else None


async def answered(client: Client) -> None:
    assert await client.post(client.sealed()) == 200


async def denied(client: Client) -> None:
    assert await client.post(client.sealed(), lacre_action="http") == 403


async def unknown(client: Client) -> None:
    assert await client.post(client.sealed(), lacre_pool="another") == 404


async def nobody(client: Client) -> None:
    assert await client.post(client.sealed(), authorization="Bearer x") == 401


async def refused_by_its_worker(client: Client) -> None:
    client.worker.script = Script(pieces=(), ending="error:urn:lacre:problem:busy")
    assert await client.post(client.sealed()) == 503


async def broken(client: Client) -> None:
    client.worker.script = Script(ending="error:x")
    assert await client.post(client.sealed()) == 200


async def lost(client: Client) -> None:
    async def fail() -> None:
        for inbound in client.stage.hub.inbound.values():
            inbound.fail(WorkerLost("x"))
        await asyncio.Event().wait()

    client.worker.script = Script(before=fail)
    assert await client.post(client.sealed()) == 502


async def replayed(client: Client) -> None:
    body = client.sealed()
    assert await client.post(body) == 200
    assert await client.post(body) == 409


async def cut_off(client: Client) -> None:
    assert await client.post(client.sealed()[: BODY // 2]) == 400


async def left(client: Client) -> None:
    """While the worker works for it."""
    client.worker.script = Script(before=asyncio.Event().wait)
    assert await client.post(client.sealed(), leave=lambda: bool(client.worker.opened)) is None


Ending = Callable[[Client], Awaitable[None]]
ENDINGS: list[Ending] = [answered, denied, unknown, nobody, refused_by_its_worker, broken, lost, replayed, cut_off, left]


@pytest.mark.parametrize("ending", ENDINGS, ids=lambda each: each.__name__)
async def test_nothing_is_left(
    ending: Ending, stage: Stage, worker: FakeWorker, served: list[weakref.ref[Exchange]], uncollected: None
) -> None:
    stage.gateway.refusals._limits = {"subject": 10**6, "address": 10**6}
    client = Client(stage, worker)
    for number in range(ROUNDS):
        await ending(client)
        worker.script = Script()
        await until(lambda: stage.gateway.limits.running == 0)
        worker.opened.clear()
        stage.hub.published.clear()
        if number == 0:
            before = held()
    assert len(served) >= ROUNDS
    await until(lambda: not any(each() is not None for each in served), why=lambda: [each() for each in served])
    await until(lambda: held() - before < MOST, why=held)


async def test_a_running_answer_keeps_no_token(stage: Stage, worker: FakeWorker, served: list[weakref.ref[Exchange]]) -> None:
    """It may take minutes, and its token was checked before it began. Its trace context is read at its end."""
    client, goes_on = Client(stage, worker), asyncio.Event()
    worker.script = Script(before=goes_on.wait)
    trace = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"
    asked = asyncio.create_task(client.post(client.sealed(), traceparent=trace))
    await until(lambda: bool(worker.opened))
    exchange = served[0]()
    assert exchange is not None and exchange.fields.values == {b"traceparent": trace.encode()}
    goes_on.set()
    assert await asked == 200
