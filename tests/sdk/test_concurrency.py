"""`max_concurrency`: no more requests at once than the caller said, in their order, and no slot is ever lost."""

from __future__ import annotations

import asyncio
import os
import sys
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from types import FrameType
from typing import Any

import httpx2
import pytest

import lacre
import lacre.legacy
from lacre import problems
from lacre.transport.concurrency import AsyncTurns, Turns
from parts.bent import without
from parts.chat_app import ChatApp
from parts.relay import SEALED, Relay, connect, connect_async, on_sealed, refusing, served


class Gate(Relay):
    """Counts the requests that it has at once."""

    def __init__(self) -> None:
        super().__init__(ChatApp())
        self.now = self.most = 0
        self.lock = threading.Lock()

    async def answer(self, request: httpx2.Request) -> httpx2.Response:
        if request.url.path != SEALED:
            return await super().answer(request)
        with self.lock:
            self.now += 1
            self.most = max(self.most, self.now)
        try:
            await asyncio.sleep(0.005)
            return await super().answer(request)
        finally:
            with self.lock:
                self.now -= 1


def test_threads() -> None:
    gate = Gate()
    with connect(gate, max_concurrency=3) as client, ThreadPoolExecutor(16) as pool:
        assert [reply.text for reply in pool.map(lambda _: client.chat("x"), range(30))] == ["one two three"] * 30
    assert gate.most == 3


async def test_tasks() -> None:
    gate = Gate()
    async with connect_async(gate, max_concurrency=3) as client:
        assert len(await asyncio.gather(*(client.chat("x") for _ in range(30)))) == 30
    assert gate.most == 3


def test_another_event_loop(relay: Relay) -> None:
    client = connect_async(relay, max_concurrency=1)
    for _ in range(2):
        assert asyncio.run(client.chat("x")).text


@pytest.mark.parametrize("make", [lacre.Client, lacre.AsyncClient, lacre.OpenAI, lacre.legacy.Client])
@pytest.mark.parametrize("count", [0, -1, True, 1.5, "3"])
def test_a_count_that_is_none(make: Callable[..., Any], count: object) -> None:
    with pytest.raises(lacre.UsageError, match=r"^max_concurrency must be a whole number of at least 1"):
        make(Relay(ChatApp()).url, token="t", max_concurrency=count)


def interrupt() -> None:
    raise KeyboardInterrupt


class TestASlotIsHeld:
    """By a stream until it was read to the end or left, and by nothing after it."""

    @pytest.mark.parametrize("end", [list, lacre.ChatStream.close, lacre.ChatStream.reply, lambda stream: None])
    def test_stream(self, relay: Relay, end: Callable[[lacre.ChatStream], object]) -> None:
        with connect(relay, max_concurrency=1) as client, ThreadPoolExecutor(1) as pool:
            stream = client.chat_stream("x")
            next(stream)
            waiting = pool.submit(client.chat, "y")
            with pytest.raises(TimeoutError):
                waiting.result(0.05)
            end(stream)
            del stream
            assert waiting.result(10).text == "one two three"

    async def test_async_stream(self, relay: Relay) -> None:
        async with connect_async(relay, max_concurrency=1) as client:
            async with client.chat_stream("x") as stream:
                await anext(stream)
                waiting = asyncio.create_task(client.chat("y"))
                await asyncio.sleep(0.05)
                assert not waiting.done()
            assert (await waiting).text == "one two three"

    @pytest.mark.parametrize(
        ("bent", "asked"),
        [
            ({"respond": refusing(problems.FORBIDDEN)}, {}),
            ({"respond": on_sealed(lambda: served(200, b"{}"))}, {}),
            ({"bend": without}, {}),
            ({"respond": on_sealed(interrupt)}, {}),
            ({}, {"model": "no name"}),
        ],
        ids=["refused", "unsealed", "broken", "interrupted", "mistake"],
    )
    def test_not_after_a_failure(self, bent: dict[str, Any], asked: dict[str, Any]) -> None:
        relay = Relay(ChatApp(), **bent)
        with connect(relay, max_concurrency=1, retries=0, resume=0) as client:
            for _ in range(3):
                with pytest.raises((lacre.LacreError, KeyboardInterrupt)):
                    client.chat("x", **asked)
            relay.respond, relay.bend = lambda _request: None, list
            assert client.chat("x").text == "one two three"

    async def test_not_after_a_cancellation_of_any_kind(self) -> None:
        gate = Gate()
        async with connect_async(gate, max_concurrency=2) as client:
            for pause in (0, 0.001, 0.003, 0.006):
                asked = [asyncio.create_task(client.chat("x")) for _ in range(12)]
                await asyncio.sleep(pause)
                for task in asked[::2]:
                    task.cancel()
                done = await asyncio.gather(*asked, return_exceptions=True)
                assert sum(isinstance(each, lacre.Reply) for each in done) >= 6
                assert {type(each) for each in done} <= {lacre.Reply, asyncio.CancelledError}
            await asyncio.wait_for(asyncio.gather(*(client.chat("x") for _ in range(4))), 10)
        assert gate.most == 2


class TestOrder:
    def test_threads(self) -> None:
        turns, order = Turns(1), list[int]()
        first = turns.take()

        def take(number: int) -> None:
            slot = turns.take()
            order.append(number)
            slot.leave()

        with ThreadPoolExecutor(8) as pool:
            for number in range(8):
                pool.submit(take, number)
                while len(turns._waiting) <= number:
                    pass
            first.leave()
            first.leave()  # which gives nothing a second time
        assert order == list(range(8))
        assert turns._free == 1

    @pytest.mark.timeout(30)
    @pytest.mark.parametrize("most", [1, 2])
    @pytest.mark.parametrize("step", range(1, 25))
    def test_a_slot_that_is_left_between_two_steps(self, step: int, most: int) -> None:
        """By a signal handler, or by the destructor of a stream that was dropped: they run in the thread that takes a slot."""
        turns, steps = Turns(most), 0
        other = turns.take()
        code = {method.__code__ for method in (Turns.take, Turns.give, Turns._settle, Turns._hand_on)}

        def between(frame: FrameType, event: str, _: object) -> Any:
            nonlocal steps
            steps += event == "line"
            if steps == step:
                other.leave()
            return between

        late = threading.Timer(0.05, other.leave)
        late.start()
        sys.settrace(lambda frame, *_: between if frame.f_code in code else None)
        try:
            slot = turns.take()
            slot.leave()
        finally:
            sys.settrace(None)
        late.join()
        assert (turns._free, len(turns._waiting)) == (most, 0)

    async def test_a_slot_that_came_with_the_cancellation_is_passed_on(self) -> None:
        turns = AsyncTurns(1)
        held = await turns.take()
        cancelled, waiting = asyncio.create_task(turns.take()), asyncio.create_task(turns.take())
        await asyncio.sleep(0)
        held.leave()
        cancelled.cancel()
        with pytest.raises(asyncio.CancelledError):
            await cancelled
        (await asyncio.wait_for(waiting, 15)).leave()
        assert turns._free == 1


@pytest.mark.skipif(not hasattr(os, "fork"), reason="there is no fork")
def test_a_forked_child_begins_with_all_slots(relay: Relay) -> None:
    with connect(relay, max_concurrency=1) as client:
        stream = client.chat_stream("x")
        next(stream)
        turns = client._sealed._turns
        assert turns is not None
        child = os.fork()
        if not child:
            code = 1
            try:
                turns.get().take().leave()
                code = 0
            finally:
                os._exit(code)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
        stream.close()
