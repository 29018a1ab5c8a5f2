"""Bytes that are handled as they arrive: in order, bounded, in turns with others, and never after their connection's end."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field

import pytest
import uvloop

from lacre_fabric.nats.incoming import AHEAD, CHUNK, Incoming
from parts.waiting import until

ONE_READ = 256 * 1024  # bytes at most, of either event loop
LOOPS = pytest.mark.parametrize("loop", [asyncio.new_event_loop, uvloop.new_event_loop], ids=["asyncio", "uvloop"])


@dataclass
class Party:
    """waits_at: bytes of which a chunk makes its handler wait for `goes_on`."""

    peer: socket.socket
    waits_at: bytes = b"wait"
    heard: list[bytes] = field(default_factory=list)
    goes_on: asyncio.Event = field(default_factory=asyncio.Event)
    failure: Exception | None = None

    def receive(self, data: bytes) -> Callable[[], Awaitable[None]] | None:
        if self.failure is not None:
            raise self.failure
        self.heard.append(data)
        return self._wait if self.waits_at in data else None

    async def _wait(self) -> None:
        await self.goes_on.wait()

    async def send(self, data: bytes) -> None:
        await asyncio.get_running_loop().sock_sendall(self.peer, data)

    @property
    def whole(self) -> bytes:
        return b"".join(self.heard)


@asynccontextmanager
async def running() -> AsyncIterator[tuple[Party, Incoming, asyncio.Task[None]]]:
    ours, peer = socket.socketpair()
    peer.setblocking(False)
    reader = asyncio.StreamReader()
    loop, party = asyncio.get_running_loop(), Party(peer)
    transport, stream = await loop.create_connection(lambda: asyncio.StreamReaderProtocol(reader), sock=ours)
    incoming = Incoming(transport, stream, party.receive, over=False)
    task = asyncio.create_task(incoming.run(b"first"))
    try:
        await until(lambda: party.heard == [b"first"])
        yield party, incoming, task
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        transport.abort()
        peer.close()


def run(loop: Callable[[], asyncio.AbstractEventLoop], test: Callable[[], Awaitable[None]]) -> None:
    with asyncio.Runner(loop_factory=loop) as runner:
        runner.run(test())  # type: ignore[arg-type]  # they are coroutines


@LOOPS
def test_order_while_one_chunk_waits(loop: Callable[[], asyncio.AbstractEventLoop]) -> None:
    async def test() -> None:
        async with running() as (party, _, task):
            await party.send(b"wait")
            await until(lambda: party.heard[-1] == b"wait")
            for number in range(3):
                await party.send(b"%d" % number)
                await asyncio.sleep(0.02)
            assert party.heard == [b"first", b"wait"]
            party.goes_on.set()
            await until(lambda: party.whole == b"firstwait012")
            await party.send(b"3")
            await until(lambda: party.whole == b"firstwait0123")
            party.peer.close()
            await asyncio.wait_for(task, 5)

    run(loop, test)


@LOOPS
def test_a_sender_waits_for_a_handler_that_waits(loop: Callable[[], asyncio.AbstractEventLoop]) -> None:
    async def test() -> None:
        async with running() as (party, incoming, _):
            await party.send(b"wait")
            await until(lambda: party.heard[-1] == b"wait")
            sent = b"".join(b"%07d\n" % number for number in range(2**20))
            sending = asyncio.create_task(party.send(sent))
            await until(lambda: incoming._paused)
            await asyncio.sleep(0.1)
            assert not sending.done()
            assert incoming._size <= AHEAD + ONE_READ
            party.goes_on.set()
            await sending
            await until(lambda: len(party.whole) == len(b"firstwait") + len(sent))
            assert party.whole == b"firstwait" + sent

    run(loop, test)


@LOOPS
def test_others_have_their_turn_beside_a_flood(loop: Callable[[], asyncio.AbstractEventLoop]) -> None:
    """Between any two pieces of a large chunk."""

    async def test() -> None:
        async with running() as (party, incoming, _):
            turns = list[int]()

            def turn() -> None:
                turns.append(len(party.heard))
                asyncio.get_running_loop().call_soon(turn)

            incoming.data_received(bytes(20 * CHUNK))
            turn()
            await until(lambda: len(party.heard) == 21)
            assert set(turns) >= set(range(1, 21))
            assert max(map(len, party.heard)) == CHUNK

    run(loop, test)


@LOOPS
def test_nothing_is_handled_after_the_end(loop: Callable[[], asyncio.AbstractEventLoop]) -> None:
    """The bytes of a connection that was given up must not reach the reader of the next one."""

    async def test() -> None:
        async with running() as (party, incoming, task):
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)
            incoming.data_received(b"late")
            await party.send(b"later")
            await asyncio.sleep(0.05)
            assert party.heard == [b"first"]

    run(loop, test)


@LOOPS
def test_what_a_handler_raises_ends_it(loop: Callable[[], asyncio.AbstractEventLoop]) -> None:
    async def test() -> None:
        async with running() as (party, _, task):
            party.failure = ValueError("broken")
            await party.send(b"x")
            with pytest.raises(ValueError, match="broken"):
                await asyncio.wait_for(task, 5)

    run(loop, test)


@LOOPS
def test_a_reset_connection_ends_it(loop: Callable[[], asyncio.AbstractEventLoop]) -> None:
    async def test() -> None:
        async with running() as (_, incoming, task):
            incoming.connection_lost(ConnectionResetError())
            with pytest.raises(ConnectionResetError):
                await asyncio.wait_for(task, 5)

    run(loop, test)
