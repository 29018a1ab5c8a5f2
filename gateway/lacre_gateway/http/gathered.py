"""A transport that collects the writes of one turn of the event loop, and passes them on in one piece.

A server writes an answer's head and each piece of its body separately. Each of these writes costs more in the kernel than many
of our decisions (docs/gateway-performance.md).

Rules:
- Nothing is held longer than the turn in which it was written, and never more than `MOST` bytes.
- Everything written before `close` is sent, in order; `abort` drops it, as it drops bytes that the system has not sent yet.
- Nothing is passed on to a transport that has begun to close: uvloop raises for one that is gone.
"""

from __future__ import annotations

import asyncio
from typing import Any, Final

MOST: Final = 64 * 1024  # bytes; as much as the transport itself takes before it asks to pause


class GatheredTransport(asyncio.Transport):
    """transport: receives the writes. Used on one event loop."""

    def __init__(self, transport: asyncio.Transport, loop: asyncio.AbstractEventLoop) -> None:
        self._transport = transport
        self._loop = loop
        self._pieces: list[bytes] = []
        self._size = 0

    def write(self, data: bytes | bytearray | memoryview) -> None:
        if not self._pieces:
            self._loop.call_soon(self._flush)
        self._pieces.append(bytes(data))
        self._size += len(data)
        if self._size >= MOST:
            self._flush()

    def _flush(self) -> None:
        pieces, self._pieces, self._size = self._pieces, [], 0
        if pieces and not self._transport.is_closing():
            self._transport.write(pieces[0] if len(pieces) == 1 else b"".join(pieces))

    def can_write_eof(self) -> bool:
        return self._transport.can_write_eof()

    def write_eof(self) -> None:
        self._flush()
        self._transport.write_eof()

    def close(self) -> None:
        self._flush()
        self._transport.close()

    def abort(self) -> None:
        self._pieces, self._size = [], 0
        self._transport.abort()

    def is_closing(self) -> bool:
        return self._transport.is_closing()

    def pause_reading(self) -> None:
        self._transport.pause_reading()

    def resume_reading(self) -> None:
        self._transport.resume_reading()

    def get_extra_info(self, name: str, default: Any = None) -> Any:
        return self._transport.get_extra_info(name, default)
