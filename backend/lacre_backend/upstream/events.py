"""Reads the upstream's event stream and forwards each event at once, in its own record.

Rules:
- Only an event's data is forwarded. Comments and other fields are dropped.
- An error event ends the stream, and so does `[DONE]`. If the bytes end before either, the answer failed. Data after an end is
  not read.
- Usage that the client did not request is removed.
"""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Any

from lacre.asgi import Call
from lacre.exchange.event_blocks import DONE, MAX_EVENT, EventBlocks, data_of
from lacre.runtime.json_objects import object_in
from lacre_backend.api.http import EventStream
from lacre_backend.upstream import counts, refusals
from lacre_backend.upstream.faces import UpstreamFace


async def relay(pieces: AsyncIterator[bytes], out: EventStream, call: Call, name: str, *, tell_usage: bool) -> None:
    """name: the model's name for the client. Raises RequestRefused if the stream is not complete and counted at its end."""
    blocks, seen, counted = EventBlocks(), 0, False
    async for piece in pieces:
        for data in filter(None, map(data_of, blocks.feed(piece))):
            if data == DONE:
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
        if len(blocks.pending) > MAX_EVENT:
            raise refusals.unusable("sends an event that is too long")
    raise refusals.broken()


async def relay_face(pieces: AsyncIterator[bytes], out: EventStream, call: Call, name: str, face: UpstreamFace) -> None:
    """As `relay`, for an API whose events have names and whose last one is an event like the others."""
    blocks, seen, usage = EventBlocks(), 0, dict[str, Any]()
    async for piece in pieces:
        for data in filter(None, map(data_of, blocks.feed(piece))):
            event = _object(data)
            if face.fails(event):
                raise refusals.broken()
            if face.says_something(event):
                seen += 1
                counts.count_event(call, seen)
            usage |= face.usage(event)
            whole = face.ends(event)
            if whole:
                counts.take(call, face.counts(usage))
            await out.event(face.renamed(event, name), name=str(event.get("type")))
            if whole:
                return await out.done(b"")
        if len(blocks.pending) > MAX_EVENT:
            raise refusals.unusable("sends an event that is too long")
    raise refusals.broken()


def _told(event: dict[str, Any], name: str, *, tell_usage: bool) -> dict[str, Any] | None:
    """None for an event that only has usage that the client did not request."""
    told = {**event, "model": name} if "model" in event else event
    if tell_usage or "usage" not in event:
        return told
    return {key: value for key, value in told.items() if key != "usage"} if event.get("choices") else None


def _object(data: bytes) -> dict[str, Any]:
    event = object_in(data)
    if event is None:
        raise refusals.unusable("sends events that are not JSON objects")
    return event
