"""What a gathered transport hands on, when, and in how many pieces."""

from __future__ import annotations

import asyncio
import socket

from lacre_gateway.http.gathered import MOST, GatheredTransport


class Recorder(asyncio.Transport):
    """Takes down what it is told, and nothing after its end: uvloop raises then."""

    def __init__(self) -> None:
        super().__init__()
        self.written: list[bytes] = []
        self.ended = ""

    def write(self, data: bytes | bytearray | memoryview) -> None:
        if self.ended:
            raise RuntimeError("the handler is closed")
        self.written.append(bytes(data))

    def is_closing(self) -> bool:
        return bool(self.ended)

    def close(self) -> None:
        self.ended = "closed"

    def abort(self) -> None:
        self.ended = "aborted"


def gathered() -> tuple[Recorder, GatheredTransport]:
    recorder = Recorder()
    return recorder, GatheredTransport(recorder, asyncio.get_running_loop())


async def test_one_turn_is_one_piece_and_much_does_not_wait() -> None:
    recorder, transport = gathered()
    buffer = bytearray(b"body")
    transport.write(b"head")
    transport.write(buffer)
    buffer[:] = b"else"  # what was written is sent as it was
    assert recorder.written == []
    await asyncio.sleep(0)
    assert recorder.written == [b"headbody"]
    for each in (b"more", b"x" * MOST, b"after"):
        transport.write(each)
        await asyncio.sleep(0)
        await asyncio.sleep(0)
    assert recorder.written[1:] == [b"more", b"x" * MOST, b"after"]
    transport.write(b"x" * MOST)
    assert len(recorder.written) == 5


class Paused(asyncio.Protocol):
    """A server's side of a connection. pauses: how often its transport asked it to stop writing."""

    def __init__(self) -> None:
        self.pauses = 0
        self.writable = asyncio.Event()
        self.writable.set()

    def pause_writing(self) -> None:
        self.pauses += 1
        self.writable.clear()

    def resume_writing(self) -> None:
        self.writable.set()


async def test_a_reader_that_is_slow_pauses_the_server() -> None:
    """Over a real connection: the server holds what the system does not take, and no more; every byte arrives in order."""
    here, there = socket.socketpair()
    here.setblocking(False)
    loop, protocol = asyncio.get_running_loop(), Paused()
    inner, _ = await loop.create_connection(lambda: protocol, sock=here)
    transport, sent = GatheredTransport(inner, loop), bytearray()
    while protocol.writable.is_set():
        assert len(sent) < 100 * MOST, "nobody asked the server to stop"
        piece = len(sent).to_bytes(8, "big") * 1000
        transport.write(piece)
        sent += piece
        await asyncio.sleep(0)
    assert protocol.pauses == 1 and 0 < inner.get_write_buffer_size() <= 2 * MOST
    reading = asyncio.create_task(asyncio.to_thread(there.makefile("rb").read))
    await protocol.writable.wait()
    transport.close()
    assert await reading == sent
    there.close()


async def test_close_sends_and_abort_drops() -> None:
    recorder, transport = gathered()
    transport.write(b"last")
    transport.close()
    assert recorder.written == [b"last"] and recorder.ended == "closed"
    recorder, transport = gathered()
    transport.write(b"never")
    transport.abort()
    await asyncio.sleep(0)
    assert recorder.written == [] and recorder.ended == "aborted"


async def test_nothing_is_written_to_a_connection_that_has_ended() -> None:
    """Its transport closes by itself when the client leaves."""
    recorder, transport = gathered()
    faults: list[object] = []
    asyncio.get_running_loop().set_exception_handler(lambda _loop, context: faults.append(context["exception"]))
    transport.write(b"never")
    recorder.close()
    await asyncio.sleep(0)
    transport.write(b"x" * MOST)
    transport.write(b"never")
    transport.close()
    await asyncio.sleep(0)
    assert (recorder.written, faults) == ([], [])
