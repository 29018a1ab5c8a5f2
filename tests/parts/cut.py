"""A way to a server that can be cut: what was on it is gone, and nobody comes through until it is mended."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager


class Cut:
    """url: what to connect to in the server's place. flows: while it is not set, nothing moves, and nothing is lost."""

    def __init__(self, port: int) -> None:
        self._port = port
        self._whole = True
        self._pumps: set[asyncio.Task[None]] = set()
        self._comers: set[asyncio.Task[None]] = set()
        self._ends: list[asyncio.StreamWriter] = []
        self.flows = asyncio.Event()
        self.flows.set()
        self.url = ""

    def cut(self) -> None:
        """Ends every connection on it; new ones are refused."""
        self._whole = False
        for end in self._ends:
            end.transport.abort()
        self._ends.clear()

    def mend(self) -> None:
        self._whole = True

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        comer = asyncio.current_task()
        assert comer is not None
        self._comers.add(comer)
        comer.add_done_callback(self._comers.discard)
        self._ends.append(writer)
        if not self._whole:
            writer.transport.abort()
            return
        far_reader, far_writer = await asyncio.open_connection("127.0.0.1", self._port)
        if not self._whole:  # it was cut meanwhile
            far_writer.transport.abort()
            return
        self._ends.append(far_writer)
        ways = ((reader, far_writer), (far_reader, writer))
        self._pumps.update(asyncio.create_task(self._pump(*way)) for way in ways)

    async def _pump(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while data := await reader.read(65536):
            await self.flows.wait()
            writer.write(data)

    async def close(self) -> None:
        self.cut()
        await asyncio.sleep(0)  # the way of one who has just come begins
        await asyncio.gather(*self._comers, return_exceptions=True)
        for pump in self._pumps:
            pump.cancel()
        await asyncio.gather(*self._pumps, return_exceptions=True)
        await asyncio.sleep(0)  # what was aborted is closed at the loop's next turn


@asynccontextmanager
async def way_to(port: int, host: str = "127.0.0.1") -> AsyncIterator[Cut]:
    """port: of a server on this machine's loopback. host: this machine's address, for those that come by the way."""
    way = Cut(port)
    listener = await asyncio.start_server(way.serve, host, 0)
    way.url = f"nats://{host}:{listener.sockets[0].getsockname()[1]}"
    try:
        yield way
    finally:
        listener.close()
        await way.close()
