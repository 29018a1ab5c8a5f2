"""Connections of clients to what runs in the test's own loop."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Iterable, Iterator
from typing import Any

import httpx2


class SyncWire(httpx2.BaseTransport):
    """A sync client's connection: everything is done on the event loop, which runs in another thread."""

    def __init__(self, wire: httpx2.AsyncBaseTransport, loop: asyncio.AbstractEventLoop) -> None:
        self._wire = wire
        self._loop = loop

    def handle_request(self, request: httpx2.Request) -> httpx2.Response:
        request.read()
        response = self._wait(self._wire.handle_async_request(request))
        assert isinstance(response.stream, httpx2.AsyncByteStream)
        return httpx2.Response(response.status_code, headers=response.headers, stream=_Pulled(response.stream, self._wait))

    def _wait(self, doing: Any) -> Any:
        return asyncio.run_coroutine_threadsafe(doing, self._loop).result(20)


class _Pulled(httpx2.SyncByteStream):
    def __init__(self, stream: httpx2.AsyncByteStream, wait: Callable[[Any], Any]) -> None:
        self._stream = stream
        self._pieces = aiter(stream)
        self._wait = wait

    def __iter__(self) -> Iterator[bytes]:
        while (piece := self._wait(self._next())) is not None:
            yield piece

    async def _next(self) -> bytes | None:
        return await anext(self._pieces, None)

    def close(self) -> None:
        self._wait(self._stream.aclose())


class Pieces(httpx2.AsyncByteStream):
    """A body as it arrives. `pulled` counts the bytes that somebody asked for."""

    def __init__(self, pieces: AsyncIterator[bytes] | Iterable[bytes]) -> None:
        self._pieces = pieces
        self.pulled = 0

    async def __aiter__(self) -> AsyncIterator[bytes]:
        if isinstance(self._pieces, AsyncIterator):
            async for piece in self._pieces:
                self.pulled += len(piece)
                yield piece
        else:
            for piece in self._pieces:
                self.pulled += len(piece)
                yield piece

    async def aclose(self) -> None:
        if isinstance(self._pieces, AsyncIterator) and hasattr(self._pieces, "aclose"):
            await self._pieces.aclose()
