"""Many calls, at once and in other processes: no more than the caller said, in their order, and nothing is lost or shared."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import FrameType
from typing import Any

import httpx2
import pytest

import lacre
import lacre.legacy
from lacre import problems
from lacre.runtime.forks import Undivided
from lacre.transport.concurrency import AsyncTurns, Turns
from parts.bent import without
from parts.certificates import Ca
from parts.chat_app import ChatApp
from parts.forking import PROGRAMS
from parts.live import Gateway, beside
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
        before = sys.gettrace()  # a measure of coverage goes on afterwards
        sys.settrace(lambda frame, *_: between if frame.f_code in code else None)
        try:
            slot = turns.take()
            slot.leave()
        finally:
            sys.settrace(before)
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


# Processes that fork: each has connections, locks and salts of its own, and nobody is accused for it.

ENVIRONMENT = os.environ | {"PYTHONPATH": str(Path(__file__).parents[1])}


@pytest.fixture(scope="module")
def gateway() -> Iterator[Gateway]:
    with beside(Gateway(Relay(ChatApp()))) as gateway:
        yield gateway


@pytest.fixture(scope="module")
def secured(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Gateway, Path]]:
    """The same over TLS, and the file of the authority that it is known by."""
    folder = tmp_path_factory.mktemp("tls")
    ca = Ca(folder)
    with beside(Gateway(Relay(ChatApp())), ca.issue(folder, "gateway")) as gateway:
        yield gateway, ca.file


def seen(name: str, *arguments: str) -> set[str]:
    command = [sys.executable, "-P", "-W", "ignore::DeprecationWarning", "-m", "parts.forking", name, *arguments]
    pipe = subprocess.PIPE
    program = subprocess.Popen(command, stdout=pipe, stderr=pipe, text=True, env=ENVIRONMENT, start_new_session=True)
    try:
        told, complaints = program.communicate(timeout=60)
    except subprocess.TimeoutExpired:
        os.killpg(program.pid, signal.SIGKILL)  # and with it its children
        told, complaints = program.communicate()
        raise AssertionError(f"{name} hangs: {told} {complaints}") from None
    assert (program.returncode, complaints) == (0, "")
    return set(json.loads(told))


@pytest.mark.parametrize("name", [program.__name__ for program in PROGRAMS])
def test_in_the_clear(gateway: Gateway, tmp_path: Path, name: str) -> None:
    assert seen(name, gateway.url, *([str(tmp_path)] if name == "remembered" else [])) == {"ok"}


@pytest.mark.parametrize("name", ["plain", "threads", "leaving", "loops", "forked_in_a_task"])
def test_over_tls(secured: tuple[Gateway, Path], name: str) -> None:
    """Where the end of a connection is said aloud (`close_notify`), a child says nothing in its parent's name."""
    gateway, ca = secured
    assert seen(name, gateway.url, str(ca)) == {"ok"}


@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")  # newer Pythons warn of threads
def test_a_fork_waits_for_what_it_must_not_cut() -> None:
    """Libraries that are half loaded, or tables that are half made, would stay so in the child."""
    began, done = threading.Event(), threading.Event()

    def work() -> None:
        began.set()
        time.sleep(0.2)
        done.set()

    undivided = Undivided(work)
    thread = threading.Thread(target=undivided)
    thread.start()
    began.wait(10)
    pid = os.fork()
    if not pid:
        undivided()  # which is done here too, and not held by anyone
        os._exit(0 if done.is_set() else 1)
    assert os.waitpid(pid, 0)[1] == 0
    thread.join()


# Ten thousand calls: nothing is left behind, and memory stays where it was after the first thousand.

CALLS, CONCURRENCY = 10_000, 50


@pytest.mark.slow
@pytest.mark.timeout(400)
def test_ten_thousand_calls(record_property: Any) -> None:
    command = [sys.executable, "-m", "parts.many_calls"]
    with subprocess.Popen([*command, "serve"], stdout=subprocess.PIPE, text=True, env=ENVIRONMENT) as server:
        try:
            assert server.stdout is not None
            url = server.stdout.readline().strip()
            asking = [*command, "ask", url, str(CALLS), str(CONCURRENCY)]
            done = subprocess.run(asking, capture_output=True, text=True, env=ENVIRONMENT, timeout=360, check=False)
        finally:
            server.terminate()
    assert done.returncode == 0, done.stderr[-2000:]
    measured = json.loads(done.stdout)
    record_property("many_calls", measured)
    print(measured)
    assert measured["calls"] == CALLS
    assert (measured["tasks_left"], measured["sockets_left"]) == (0, 0)
    assert measured["growth"] <= 0.05
