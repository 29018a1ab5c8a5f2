"""The upstream's event stream, read and told again: each event leaves at once, in a record of its own.

Rules:
- Of an event its data alone goes on. Comments and other fields are left out.
- An event that says that the answer failed ends the stream, as does `[DONE]`, and the end of the bytes before either is a
  failure. What follows an end is not read.
- Usage that the client did not ask for is taken out.
"""

from __future__ import annotations

import json
import re
from collections.abc import AsyncIterator
from typing import Any, Final

from lacre.asgi import Call
from lacre_backend.api.http import EventStream
from lacre_backend.upstream import counts, refusals

MAX_EVENT: Final = 2**20  # bytes; a whole tool call has some thousand. The SDK takes no longer one either
_DONE: Final = b"[DONE]"
_END: Final = re.compile(rb"\r?\n\r?\n")


class Blocks:
    """Splits an event stream into the data of its events, however its bytes come."""

    def __init__(self) -> None:
        self._rest = bytearray()

    def feed(self, piece: bytes) -> list[bytes]:
        """The data of the events that are whole now. Raises RequestRefused for one that is too long."""
        at, sought = 0, max(0, len(self._rest) - 3)  # an end may have begun in the last piece: what is before has none
        self._rest += piece
        found = []
        while (end := _END.search(self._rest, sought)) is not None:
            found.append(_data(bytes(self._rest[at : end.start()]).replace(b"\r\n", b"\n")))
            at = sought = end.end()
        del self._rest[:at]
        if len(self._rest) > MAX_EVENT:
            raise refusals.unusable("sends events without end")
        return [data for data in found if data]


def _data(block: bytes) -> bytes:
    lines = (line.removeprefix(b"data:") for line in block.split(b"\n") if line.startswith(b"data:"))
    return b"\n".join(line.removeprefix(b" ") for line in lines)


async def relay(pieces: AsyncIterator[bytes], out: EventStream, call: Call, name: str, *, tell_usage: bool) -> None:
    """name: the model's, for the client. Raises RequestRefused where the stream is not whole, and counted, at its end."""
    blocks, seen, counted = Blocks(), 0, False
    async for piece in pieces:
        for data in blocks.feed(piece):
            if data == _DONE:
                if not counted:
                    raise refusals.unusable("does not say how many tokens it used")
                return await out.done()
            event = _object(data)
            if "error" in event:
                raise refusals.broken()
            if counts.says_something(event):
                seen += 1
                if not counted:
                    counts.count_event(call, seen)
            if event.get("usage") is not None:
                counts.take(call, event["usage"])
                counted = True
            if (told := _told(event, name, tell_usage=tell_usage)) is not None:
                await out.event(told)
    raise refusals.broken()


def _told(event: dict[str, Any], name: str, *, tell_usage: bool) -> dict[str, Any] | None:
    """None for an event that has nothing but usage that nobody asked for."""
    told = {**event, "model": name} if "model" in event else event
    if tell_usage or "usage" not in event:
        return told
    return {key: value for key, value in told.items() if key != "usage"} if event.get("choices") else None


def _object(data: bytes) -> dict[str, Any]:
    try:
        event = json.loads(data)
    except (ValueError, RecursionError):
        event = None
    if not isinstance(event, dict):
        raise refusals.unusable("sends events that are not JSON objects")
    return event
