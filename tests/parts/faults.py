"""A proxy on loopback that does to connections what networks do: it delays, cuts, resets, half-closes, stalls and garbles."""

from __future__ import annotations

import asyncio
import contextlib
import random
import socket
import struct
from dataclasses import dataclass, field
from typing import Final, Literal, Self
from urllib.parse import urlsplit

Kind = Literal["none", "delay", "stall", "cut", "reset", "half-close", "garbage"]
KINDS: Final[tuple[Kind, ...]] = ("none", "delay", "stall", "cut", "reset", "half-close", "garbage")
WEIGHTS: Final = (6, 3, 1, 3, 3, 3, 2)
STALL: Final = 30.0  # seconds; longer than any client here waits
REACH: Final = 9000  # bytes of a connection after which a fault may still strike


@dataclass(frozen=True)
class Fault:
    """kind: what happens. down: to what the client receives, rather than to what it sends. at: after so many bytes."""

    kind: Kind
    down: bool
    at: int


@dataclass
class FaultyNetwork:
    """Forwards to `target`, each connection with a fault of its own. struck: how often each kind happened."""

    target: str
    seed: int
    struck: dict[Kind, int] = field(default_factory=lambda: dict.fromkeys(KINDS, 0))

    async def __aenter__(self) -> Self:
        self._random = random.Random(self.seed)
        self._tasks: set[asyncio.Task[None]] = set()
        self._server = await asyncio.start_server(self._connected, "127.0.0.1", 0)
        return self

    async def __aexit__(self, *_: object) -> None:
        self._server.close()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        await self._server.wait_closed()

    @property
    def base_url(self) -> str:
        return f"http://127.0.0.1:{self._server.sockets[0].getsockname()[1]}"

    def _fault(self) -> Fault:
        [kind] = self._random.choices(KINDS, WEIGHTS)
        return Fault(kind, self._random.random() < 0.7, self._random.randrange(REACH))

    def _connected(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.create_task(self._serve(reader, writer))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        where, fault = urlsplit(self.target), self._fault()
        try:
            up_reader, up_writer = await asyncio.open_connection(where.hostname, where.port)
        except OSError:
            writer.close()
            return
        both = (writer, up_writer)
        pumps = [
            asyncio.create_task(self._pump(reader, up_writer, both, None if fault.down else fault)),
            asyncio.create_task(self._pump(up_reader, writer, both, fault if fault.down else None)),
        ]
        try:
            await asyncio.gather(*pumps)
        finally:
            for pump in pumps:
                pump.cancel()
            for each in both:
                each.close()

    async def _pump(
        self,
        reader: asyncio.StreamReader,
        writer: asyncio.StreamWriter,
        both: tuple[asyncio.StreamWriter, ...],
        fault: Fault | None,
    ) -> None:
        """Until one side ends. A fault strikes once, in the middle of whatever passes then."""
        passed = 0
        with contextlib.suppress(OSError):
            while data := await reader.read(2048):
                if fault is not None and passed + len(data) > fault.at:
                    head, data = data[: fault.at - passed], data[fault.at - passed :]
                    writer.write(head)
                    await writer.drain()
                    data = await self._strike(fault, writer, both, data)
                    fault = None
                passed += len(data)
                writer.write(data)
                await writer.drain()
            if writer.can_write_eof():
                writer.write_eof()

    async def _strike(
        self, fault: Fault, writer: asyncio.StreamWriter, both: tuple[asyncio.StreamWriter, ...], data: bytes
    ) -> bytes:
        """What passes after it."""
        self.struck[fault.kind] += 1
        match fault.kind:
            case "delay":
                await asyncio.sleep(self._random.uniform(0.05, 0.5))
            case "stall":
                await asyncio.sleep(STALL)
            case "cut":
                for each in both:
                    each.close()
            case "reset":
                for each in both:
                    linger = struct.pack("ii", 1, 0)
                    each.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
                    each.transport.abort()
            case "half-close":
                writer.write_eof()
                await asyncio.sleep(STALL)
                raise BrokenPipeError  # nothing more passes
            case "garbage":
                return self._random.randbytes(self._random.randrange(1, 40)) + data
        return data
