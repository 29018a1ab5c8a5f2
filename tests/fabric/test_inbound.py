"""Frames as they reach a gateway, in whatever order a network, a second attempt or a worker out of hand makes of them."""

from __future__ import annotations

import asyncio
import time

import pytest
import uvloop
from hypothesis import given
from hypothesis import strategies as st

from lacre_fabric.work import gateway_stream
from lacre_fabric.work.contract import CREDIT, Cancelled, FabricError, FrameGap, QueueTimeout, WorkerLost
from lacre_fabric.work.frames import Frame, FrameKind
from lacre_fabric.work.gateway_stream import CATCH_UP, MAX_PENDING_FRAMES, MAX_RECEIPT, STOOD_STILL, Inbound
from lacre_fabric.work.worker_stream import Outbound
from parts.frames import frames_in

ONE, OTHER = "1" * 32, "2" * 32


def received(*frames: Frame, limit: float = 5.0) -> tuple[list[Frame], FabricError | None]:
    """What a reader gets of `frames`, where nothing more comes; and the error that it ends with."""

    async def read() -> tuple[list[Frame], FabricError | None]:
        inbound = Inbound(limit)
        for frame in frames:
            inbound.put(frame)
        inbound.fail(WorkerLost("nothing more comes"))
        got: list[Frame] = []
        try:
            async for frame in frames_in(inbound):
                got.append(frame)
        except FabricError as exc:
            return got, exc
        return got, None

    return asyncio.run(read())


def data(attempt: str, *numbers: int) -> list[Frame]:
    return [Frame(attempt, number, FrameKind.DATA, f"{attempt[0]}:{number}".encode()) for number in numbers]


def many(count: int, size: int, kind: FrameKind = FrameKind.DATA, first: int = 0) -> list[Frame]:
    return [Frame(ONE, first + number, kind, bytes(size)) for number in range(count)]


@pytest.mark.parametrize("numbers", [(1,), (0, 2), (0, 0), (0, 1, 0), (0, 1, 1), (0, 2, 1)])
def test_a_gap_is_an_error(numbers: tuple[int, ...]) -> None:
    got, error = received(*data(ONE, *numbers))
    assert isinstance(error, FrameGap)
    assert [frame.sequence for frame in got] == list(range(len(got)))


async def test_beats_count_and_are_not_read() -> None:
    inbound = Inbound(1.0)
    for frame in (Frame(ONE, 0, FrameKind.BEAT, b"so far"), *data(ONE, 1), Frame(ONE, 2, FrameKind.BEAT, b"")):
        inbound.put(frame)
    assert inbound.started
    assert inbound.receipt == b"so far"
    inbound.put(Frame(ONE, 3, FrameKind.USAGE, b"final"))
    assert [frame.kind async for frame in frames_in(inbound)] == [FrameKind.DATA, FrameKind.USAGE]
    assert inbound.receipt == b"final"


async def test_the_last_receipts_are_kept_and_no_large_ones() -> None:
    inbound = Inbound(1.0)
    for number, payload in enumerate([*(b"%d" % number for number in range(9)), b"x" * (MAX_RECEIPT + 1)]):
        inbound.put(Frame(ONE, number, FrameKind.BEAT, payload))
    assert [frame.payload for frame in inbound.receipts] == [b"5", b"6", b"7", b"8"]
    assert inbound.receipt == b"8"
    inbound.drop()


@pytest.mark.parametrize("ends_first", [True, False])
@pytest.mark.parametrize("last", [FrameKind.USAGE, FrameKind.ERROR, FrameKind.STOPPED])
async def test_a_parting_ends_with_the_worker_s_last_word(
    last: FrameKind, ends_first: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gateway_stream, "PARTING", 600.0)
    inbound = Inbound(600.0)
    await inbound.parting()  # no worker has begun
    inbound.put(*data(ONE, 0))
    if ends_first:
        inbound.put(Frame(ONE, 1, last, b""))
    parting = asyncio.create_task(inbound.parting())
    await asyncio.sleep(0)
    assert not parting.done() or ends_first
    if not ends_first:
        inbound.put(Frame(ONE, 1, last, b""))
    async with asyncio.timeout(60):
        await parting
    inbound.drop()


@pytest.mark.parametrize(
    ("frames", "most_frames", "most_bytes"),
    [(many(20, CREDIT // 2), 4, 2 * CREDIT), (many(MAX_PENDING_FRAMES + 10, 0), MAX_PENDING_FRAMES, 0)],
    ids=["bytes", "frames"],
)
def test_a_worker_out_of_hand_ends_its_request(frames: list[Frame], most_frames: int, most_bytes: int) -> None:
    got, error = received(*frames)
    assert isinstance(error, FrameGap)
    assert len(got) <= most_frames
    assert sum(len(frame.payload) for frame in got) <= most_bytes


def test_no_honest_worker_is_out_of_hand() -> None:
    """Records of one byte each, until all credit is spent, and beats beside them: nobody reads."""
    sealed = 1 + 1 + 16  # length, plaintext, tag
    count = CREDIT // sealed
    got, error = received(*many(count, sealed), *many(5, 700, FrameKind.BEAT, count))
    assert isinstance(error, WorkerLost)
    assert len(got) == count


KINDS = st.sampled_from([FrameKind.DATA, FrameKind.DATA, FrameKind.DATA, FrameKind.BEAT, FrameKind.USAGE, FrameKind.ERROR])


@st.composite
def attempts(draw: st.DrawFn) -> tuple[list[Frame], list[list[Frame]]]:
    """Two attempts' frames, some lost, some twice, some late, in any interleaving; and both attempts as they were sent."""
    sent = [
        [Frame(attempt, number, kind, f"{attempt[0]}:{number}".encode()) for number, kind in enumerate(kinds)]
        for attempt in (ONE, OTHER)
        for kinds in [draw(st.lists(KINDS, max_size=8))]
    ]
    queues = [[frame for frame in frames for _ in range(draw(st.sampled_from([1, 1, 1, 0, 2])))] for frames in sent]
    arrived = []
    while any(queues):
        queue = draw(st.sampled_from([queue for queue in queues if queue]))
        late = draw(st.sampled_from([0, 0, 0, 0, 1]))
        arrived.append(queue.pop(min(late, len(queue) - 1)))
    return arrived, sent


@given(attempts())
def test_what_is_read_is_the_beginning_of_one_attempt(given_: tuple[list[Frame], list[list[Frame]]]) -> None:
    arrived, sent = given_
    got, error = received(*arrived)
    if got:
        (whole,) = [frames for frames in sent if frames and frames[0].attempt == got[0].attempt]
        readable = [frame for frame in whole if frame.kind is not FrameKind.BEAT]
        assert got == readable[: len(got)]
        assert all(frame.kind is FrameKind.DATA for frame in got[:-1])
    # Its end is seen just where its end came.
    assert (error is None) == (bool(got) and got[-1].kind in (FrameKind.USAGE, FrameKind.ERROR))


# The other side: credit


async def until_it_waits(sending: asyncio.Task[None], sent: list[Frame]) -> None:
    before = -1
    while before != len(sent):
        before = len(sent)
        await asyncio.sleep(0.01)
    assert not sending.done()


class Sent(list[Frame]):
    """What a worker's side sends."""

    def __init__(self) -> None:
        super().__init__()
        self.outbound = Outbound(self.publish)

    async def publish(self, frame: Frame) -> None:
        self.append(frame)


async def test_a_renewal_that_is_lost_is_made_good() -> None:
    sent = Sent()
    outbound, piece = sent.outbound, bytes(CREDIT // 4)

    async def send() -> None:
        for _ in range(12):
            await outbound.send(FrameKind.DATA, piece)

    sending = asyncio.create_task(send())
    await until_it_waits(sending, sent)
    assert len(sent) == 4
    # Of four renewals only the last arrives; then an old one, late, and one that says more than was sent.
    outbound.renew(CREDIT)
    outbound.renew(CREDIT // 4)
    await until_it_waits(sending, sent)
    assert len(sent) == 8
    outbound.renew(100 * CREDIT)
    await sending
    assert len(sent) == 12
    waiting = asyncio.create_task(outbound.send(FrameKind.DATA, piece))
    await asyncio.sleep(0.01)
    assert not waiting.done(), "what was promised beyond what was sent is no credit"
    outbound.cancel()
    with pytest.raises(Cancelled):
        await waiting


async def test_a_beat_passes_data_that_waits() -> None:
    sent = Sent()
    await sent.outbound.send(FrameKind.DATA, bytes(CREDIT))
    waiting = asyncio.create_task(sent.outbound.send(FrameKind.DATA, b"x"))
    await asyncio.sleep(0.01)
    await sent.outbound.send(FrameKind.BEAT, b"")
    sent.outbound.renew(1)
    await waiting
    assert [(frame.sequence, frame.kind) for frame in sent] == [(0, FrameKind.DATA), (1, FrameKind.BEAT), (2, FrameKind.DATA)]


@given(st.lists(st.one_of(st.integers(0, CREDIT), st.integers(-(2**40), 2**40).map(lambda n: ("renew", n))), max_size=30))
def test_never_more_than_the_credit_is_unread(steps: list[int | tuple[str, int]]) -> None:
    async def run() -> None:
        frames, told = Sent(), 0
        for step in steps:
            sent = sum(len(frame.payload) for frame in frames)
            if isinstance(step, tuple):
                frames.outbound.renew(step[1])
                told = max(told, min(step[1], sent))
                continue
            sending = asyncio.ensure_future(frames.outbound.send(FrameKind.DATA, bytes(step)))
            await asyncio.sleep(0)
            await asyncio.sleep(0)
            assert sum(len(frame.payload) for frame in frames) <= told + CREDIT
            if not sending.done():
                frames.outbound.cancel()
                await asyncio.gather(sending, return_exceptions=True)
                return

    asyncio.run(run())


@pytest.mark.parametrize("limit", [0.05, 0.2])
async def test_a_reader_that_stood_still_takes_no_worker_for_lost(limit: float) -> None:
    """As after SIGSTOP and SIGCONT: the timer is due at once, and what the worker sent meanwhile has yet to be read."""
    inbound = Inbound(limit)
    time.sleep(limit + 2 * STOOD_STILL)  # noqa: ASYNC251 - that is the point
    await asyncio.sleep(0.01)
    inbound.put(Frame(ONE, 0, FrameKind.USAGE, b"receipt"))
    assert [frame.kind async for frame in frames_in(inbound)] == [FrameKind.USAGE]


async def test_and_silence_after_that_counts() -> None:
    inbound = Inbound(0.05)
    time.sleep(0.05 + 2 * STOOD_STILL)  # noqa: ASYNC251 - that is the point
    with pytest.raises(QueueTimeout):
        async with asyncio.timeout(CATCH_UP + 2):
            await anext(frames_in(inbound))


def test_uvloop_has_no_time_for_a_timer_that_is_due() -> None:
    """It makes a plain handle of it. A request that no worker takes must end there too: gateways run on uvloop."""

    async def waited() -> None:
        for number in range(20):
            with pytest.raises(QueueTimeout):
                async with asyncio.timeout(15):
                    await anext(frames_in(Inbound(number / 10_000)))

    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(waited())


@given(st.lists(st.integers(1, 40), max_size=8), st.integers(0, 100), st.booleans())
def test_more_is_what_next_would_say(sizes: list[int], most: int, whole: bool) -> None:
    """All the records that are here, up to a limit, and nothing that is none. They count as read."""

    async def read() -> None:
        inbound = Inbound(5.0)
        payloads = [bytes([number]) * size for number, size in enumerate(sizes)]
        for number, payload in enumerate(payloads):
            inbound.put(Frame(ONE, number, FrameKind.DATA, payload))
        if whole:
            inbound.put(Frame(ONE, len(sizes), FrameKind.USAGE, b"receipt"))
        found = inbound.more(most)
        assert found == payloads[: len(found)]
        assert sum(map(len, found[:-1])) < max(most, 1)
        assert len(found) == len(payloads) or sum(map(len, found)) >= most
        assert inbound._pending_bytes == sum(map(len, payloads[len(found) :])) + len(b"receipt") * whole
        if whole:
            rest = [frame async for frame in frames_in(inbound)]
            assert [frame.payload for frame in rest] == [*payloads[len(found) :], b"receipt"]
        inbound.drop()

    asyncio.run(read())
