"""One exchange on a connection that does as it is told: what the relay relies on when the other side misbehaves."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Awaitable, Callable

import pytest

from lacre import problems
from lacre.runtime.http1 import parse_head
from lacre_fabric.work.contract import WorkerLost
from lacre_gateway.budget.in_flight import BodyBytes, BodyReservation, LimitExceeded
from lacre_gateway.http.clock import TICK, Clock
from lacre_gateway.http.connection import SealedRoute
from lacre_gateway.http.exchange import Attended, ClientGone, Exchange, Stalled
from lacre_gateway.http.refusal import RawHeaders, Refusal
from lacre_gateway.http.server import make_server
from lacre_gateway.settings import Listen
from parts.in_memory_http import Connection
from parts.waiting import until

LATER = 10**9  # seconds after which every limit has passed


class Told:
    """A connection that keeps what it is told. ended: how the exchange left it."""

    def __init__(self) -> None:
        self.default_fields: RawHeaders = [(b"date", b"today")]
        self.write_paused = self.draining = False
        self.written = b""
        self.ended = ""
        self.was_asked = self.reads = 0

    def write(self, data: bytes) -> None:
        self.written += data

    def asked(self) -> None:
        self.was_asked += 1

    def read_on(self) -> None:
        self.reads += 1

    def answered(self, *, keep_alive: bool) -> None:
        self.ended = "kept" if keep_alive else "closed"

    def break_off(self, *, reset: bool) -> None:
        self.ended = "reset" if reset else "broken off"

    @property
    def head(self) -> bytes:
        return self.written.partition(b"\r\n\r\n")[0]

    @property
    def body(self) -> bytes:
        return self.written.partition(b"\r\n\r\n")[2]


def exchange(*fields: bytes, version: bytes = b"1.1") -> tuple[Exchange, Told]:
    raw = b"\r\n".join([b"POST /v1/sealed HTTP/" + version, b"host: x", *fields, b""])
    told = Told()
    return Exchange(told, parse_head(raw), "192.0.2.1", "0" * 32), told


def room(total: int = 100) -> BodyReservation:
    return BodyReservation(BodyBytes(total=total, each=100), "alice")


def soon(*steps: Callable[[], object]) -> None:
    """Each in a turn of the loop of its own, the first in the next one."""
    first, *rest = steps
    asyncio.get_running_loop().call_soon(lambda: (first(), soon(*rest) if rest else None))


async def test_body_in_pieces() -> None:
    reading, told = exchange()
    counted = room()
    soon(lambda: reading.take(b"a"), lambda: reading.take(b"b"))
    assert await reading.sealed_start(counted, 1, 2) == b"ab"
    assert (counted.size, reading.received, told.was_asked) == (2, 2, 1), "the rest waits in the network"
    soon(lambda: reading.take(b"c"), reading.finish)
    assert await reading.sealed_body(counted) == b"abc"
    assert (counted.size, reading.received) == (3, 3)
    assert told.reads, "the connection was told that there is room"


@pytest.mark.parametrize("size", [1, 2])
async def test_client_gone_in_the_body(size: int) -> None:
    """Also if what it needs has arrived: nobody waits for the answer."""
    reading, _ = exchange()
    reading.take(b"a")
    soon(reading.lost) if size == 2 else reading.lost()
    with pytest.raises(ClientGone):
        await reading.sealed_start(room(), 1, size)


@pytest.mark.parametrize("size", [1, 2])
async def test_body_that_stops_coming(size: int) -> None:
    reading, _ = exchange()
    reading.take(b"a")
    soon(lambda: None, lambda: reading.late(time.monotonic() + 0.5), lambda: reading.late(time.monotonic() + 2))
    with pytest.raises(Refusal) as refused:
        await reading.sealed_start(room(), 1, size)
        await reading.sealed_body(room())
    assert refused.value.problem is problems.SLOW_BODY


async def test_body_for_which_there_is_no_room() -> None:
    reading, _ = exchange()
    counted = room(100)
    reading.take(b"a" * 60)
    await reading.sealed_start(counted, 1, 10)
    reading.take(b"b" * 60)
    with pytest.raises(LimitExceeded):
        await reading.sealed_body(counted)
    assert counted.size == 60, "bytes are asked for before they are kept"


@pytest.mark.parametrize(("version", "told_to_send"), [(b"1.1", True), (b"1.0", False)])
async def test_permission_to_send(version: bytes, told_to_send: bool) -> None:
    """Once, when the body is wanted; an HTTP/1.0 client would not know it (RFC 9110 section 10.1.1)."""
    waiting, told = exchange(b"expect: 100-continue", version=version)
    soon(lambda: waiting.take(b"a"), lambda: waiting.take(b"b"))
    await waiting.sealed_start(room(), 1, 2)
    assert told.written == (b"HTTP/1.1 100 Continue\r\n\r\n" if told_to_send else b"")


async def test_a_client_that_waits_to_be_told_is_not_told_to_send_what_is_refused() -> None:
    waiting, told = exchange(b"expect: 100-continue", b"content-length: 7")
    await asyncio.wait_for(waiting.refuse(Refusal(problems.INVALID_TOKEN)), 1)
    assert told.head.startswith(b"HTTP/1.1 401 ") and b"\r\nconnection: close" in told.head
    assert (told.ended, told.was_asked) == ("closed", 0)


async def test_client_that_takes_nothing() -> None:
    stuck, told = exchange()
    stuck.finish()
    told.write_paused = True
    soon(lambda: stuck.late(time.monotonic() + 9), lambda: stuck.late(time.monotonic() + 11))
    with pytest.raises(Stalled):
        await stuck.write([b"a"])
    assert told.written == b""


async def test_client_that_takes_it_in_the_end() -> None:
    slow, told = exchange()
    told.write_paused = True

    def catch_up() -> None:
        told.write_paused = False
        slow.writable()

    soon(lambda: slow.late(time.monotonic() + 9), slow.writable, catch_up)
    await slow.begin(Proof())  # type: ignore[arg-type]
    await slow.write([b"a", b"bc"])
    await slow.end([b"d"])
    assert told.body == b"3\r\nabc\r\n1\r\nd\r\n0\r\n\r\n"
    assert (told.ended, slow.whole, slow.sent, slow.records) == ("kept", True, 4, 3)


async def test_a_refusal_waits_for_the_client() -> None:
    refused, told = exchange()
    refused.finish()
    told.write_paused = True
    before: list[bytes] = []

    def catch_up() -> None:
        before.append(told.written)
        told.write_paused = False
        refused.writable()

    soon(lambda: refused.late(time.monotonic() + 9), refused.writable, catch_up)
    await refused.refuse(Refusal(problems.INVALID_TOKEN))
    assert before == [b""] and told.head.startswith(b"HTTP/1.1 401 ") and told.ended == "kept"


async def test_a_client_that_does_not_read_its_refusal() -> None:
    """The end of its patience is no failure: a refusal is sent where a failure is handled."""
    refused, told = exchange()
    refused.finish()
    told.write_paused = True
    soon(lambda: refused.late(time.monotonic() + 9), lambda: refused.late(time.monotonic() + 11))
    await refused.refuse(Refusal(problems.INVALID_TOKEN))
    refused.close()
    assert (told.written, told.ended, refused.whole) == (b"", "broken off", False)


class Proof:
    """In place of an audit proof."""

    def header(self) -> str:
        return "proof"


async def test_an_answer_whose_head_still_waits_cannot_be_ended_in_order() -> None:
    """Its worker may be lost meanwhile: the client learns from the broken connection that nothing more comes."""
    waiting, told = exchange()
    told.write_paused = True
    waiting.task = asyncio.create_task(attended(waiting, asyncio.ensure_future(waiting.begin(Proof()))))  # type: ignore[arg-type]
    await asyncio.sleep(0)
    waiting.late(LATER)
    with pytest.raises(WorkerLost):
        await waiting.task
    await waiting.give_up()
    assert (told.written, told.ended, waiting.first_byte) == (b"", "broken off", None)
    assert waiting.started and not waiting.unanswered and not waiting.whole


async def test_what_is_over_keeps_no_token() -> None:
    """A connection that waits for its next request keeps its last exchange."""
    trace = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"
    over, told = exchange(b"authorization: Bearer secret", b"dpop: proof", b"traceparent: " + trace.encode())
    over.recorded = asyncio.get_running_loop().create_future()
    await over.begin(Proof())  # type: ignore[arg-type]
    await over.end()
    assert over.fields.authorization() == b"Bearer secret"
    over.close()
    assert over.fields.values.keys() == {b"traceparent"} and over.recorded is None
    assert (told.ended, over.traceparent) == ("kept", trace), "the trace is told once the request is settled"


@pytest.mark.parametrize("version", [b"1.1", b"1.0"])
@pytest.mark.parametrize("ends", [True, False])
async def test_an_end_that_no_client_takes_for_another(version: bytes, ends: bool) -> None:
    """An HTTP/1.0 client sees only how the connection ends."""
    broken, told = exchange(version=version)
    await broken.begin(Proof())  # type: ignore[arg-type]
    await broken.write([b"abc"])
    if ends:
        await broken.give_up()
    broken.abort() if not ends else None
    broken.close()
    broken.close()
    assert not broken.whole
    if version == b"1.1":
        assert told.body == b"3\r\nabc\r\n" + b"0\r\n\r\n" * ends
        assert told.ended == ("kept" if ends else "broken off")
    else:
        assert (told.body, told.ended) == (b"abc", "closed" if ends else "reset")
        assert b"transfer-encoding" not in told.head


@pytest.mark.parametrize("refused", [False, True])
async def test_no_connection_is_used_again_while_the_listener_drains(refused: bool) -> None:
    one, told = exchange()
    one.finish()
    told.draining = True
    if refused:
        await one.refuse(Refusal(problems.FORBIDDEN))
    else:
        await one.begin(Proof())  # type: ignore[arg-type]
        await one.end()
    assert (told.head.count(b"\r\nconnection: close"), told.ended, one.whole) == (1, "closed", True)


async def attended(one: Exchange, doing: asyncio.Future[None], longest: float = 100) -> None:
    with Attended(one, longest, lambda: WorkerLost("x")):
        await doing


@pytest.mark.parametrize(
    ("ending", "error"),
    [
        (lambda one: one.lost(), ClientGone),
        (lambda one: one.late(LATER), WorkerLost),
        (lambda one: (one.lost(), one.late(LATER)), ClientGone),
        (lambda one: one.task.cancel(), asyncio.CancelledError),
        (lambda one: (one.lost(), one.task.cancel()), asyncio.CancelledError),
    ],
    ids=["client", "clock", "client, then clock", "server", "client and server"],
)
async def test_what_ends_its_work(ending: Callable[[Exchange], object], error: type[BaseException]) -> None:
    """One cancellation, whose reason is told; if the server cancelled too, that is what counts."""
    one, _ = exchange()
    one.task = asyncio.create_task(attended(one, asyncio.get_running_loop().create_future()))
    await asyncio.sleep(0)
    ending(one)
    with pytest.raises(error):
        await one.task
    one.lost()
    one.late(LATER)


async def test_a_client_that_left_before_its_work_begins() -> None:
    one, _ = exchange()
    one.lost()
    with pytest.raises(ClientGone):
        await attended(one, asyncio.get_running_loop().create_future())


async def test_its_work_can_end_in_peace() -> None:
    """What is done after it is not cancelled: that is how a worker is told."""
    one, _ = exchange()

    async def work() -> str:
        with contextlib.suppress(ClientGone):
            await attended(one, asyncio.get_running_loop().create_future())
        one.lost()
        await asyncio.sleep(0)
        return "told"

    one.task = task = asyncio.create_task(work())  # type: ignore[assignment]
    await asyncio.sleep(0)
    one.lost()
    assert await task == "told"


REST: list[list[Callable[[Exchange], None]]] = [
    [],
    [lambda one: one.lost()],
    [lambda one: one.take(b"a" * 70_000)] * 2,
    [lambda one: one.take(b"a"), lambda one: one.lost()],
    [lambda one: one.finish()],
]


@pytest.mark.parametrize("rest", REST)
async def test_refusal_is_sent_whole_whatever_still_comes(rest: list[Callable[[Exchange], None]]) -> None:
    """Without a body to come, it keeps the connection."""
    one, told = exchange(b"content-length: 200000")
    if rest:
        soon(*((lambda step=step: step(one)) for step in rest))
    await one.refuse(Refusal(problems.FORBIDDEN))
    whole = problems.FORBIDDEN.body({"request_id": one.request_id})
    if one.gone:
        assert told.ended == "" and told.body in (b"", whole)
        return
    assert told.head.startswith(b"HTTP/1.1 403 ") and told.body == whole
    assert f"lacre-request-id: {one.request_id}".encode() in told.head
    finished = len(rest) == 1
    assert (told.ended, b"\r\nconnection: close" in told.head) == (("kept", False) if finished else ("closed", True))


async def test_one_clock_for_all(caplog: pytest.LogCaptureFixture) -> None:
    """It asks while somebody is there to be asked, and rests otherwise."""
    asked: list[str] = []

    class Asked:
        def __init__(self, name: str) -> None:
            self.name = name

        def late(self, now: float) -> None:
            asked.append(self.name)
            assert now <= time.monotonic()
            if self.name == "faulty":
                clock.remove(self)
                raise ValueError("a fault")

    clock, first, second = Clock(), Asked("first"), Asked("second")
    clock.add(Asked("faulty"))
    clock.add(first)
    clock.add(second)
    clock._tick()
    assert sorted(asked) == ["faulty", "first", "second"], "one that fails keeps no other from this tick"
    assert caplog.messages == ["a try failed: clock"]
    asked.clear()
    await asyncio.sleep(2.6 * TICK)
    assert {"first", "second"} == set(asked)
    clock.remove(first)
    clock.remove(second)
    count = len(asked)
    await asyncio.sleep(2.2 * TICK)
    assert (len(clock), len(asked), clock._next) == (0, count, None)
    clock.add(first)
    await asyncio.sleep(1.5 * TICK)
    assert len(asked) > count
    clock.remove(first)


# The connection that runs one


class Log:
    """In place of the log of requests. lines: the status of each, and whether its answer was whole."""

    def __init__(self) -> None:
        self.lines: list[tuple[int | None, bool]] = []

    def ended(self, *, status: int | None, whole: bool, **_others: object) -> None:
        self.lines.append((status, whole))


class Unremoved(Clock):
    def remove(self, request: object) -> None:
        raise ZeroDivisionError


async def run(serve: Callable[[Exchange], Awaitable[None]], clock: Clock) -> tuple[bytes, Log]:
    """What a client gets, and the log."""
    log = Log()

    class App:
        sealed = SealedRoute(serve, log, clock)  # type: ignore[arg-type]

    asyncio.get_running_loop().set_exception_handler(lambda _loop, _context: None)
    connection = Connection(make_server(App(), Listen(port=0)).connection(), "192.0.2.1")
    await connection.say(b"POST /v1/sealed HTTP/1.1\r\nhost: x\r\n\r\n")
    await until(lambda: bool(log.lines))
    return b"" if connection.news.empty() else connection.news.get_nowait(), log


async def test_a_refusal_that_cannot_be_made_becomes_an_answer() -> None:
    async def serve(one: Exchange) -> None:
        one.limits = [(b"a", b"b\nc")]
        await one.refuse(Refusal(problems.FORBIDDEN))

    answer, log = await run(serve, Clock())
    assert answer.startswith(b"HTTP/1.1 500 ") and log.lines == [(500, True)]


async def test_whatever_fails_a_request_has_its_line() -> None:
    async def serve(one: Exchange) -> None:
        await one.refuse(Refusal(problems.FORBIDDEN))

    answer, log = await run(serve, Unremoved())
    assert answer.startswith(b"HTTP/1.1 403 ") and log.lines == [(403, True)]
