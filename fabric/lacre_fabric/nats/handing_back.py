"""Work that a worker pulled and never began returns to its queue, for another worker.

Rules:
- NATS counts deliveries. A worker refuses work that was delivered before: it may have ended the worker that had it.
- So the worker that returns work first writes a mark into the pool's claims. The mark names this message and no other.
- NATS delivers a message `MAX_DELIVER` times at most, so work returns once.
- Without a mark, work is rejected, and the client sends it again.
"""

from __future__ import annotations

import asyncio
from contextlib import suppress
from typing import Final

import nats.errors
from nats.aio.msg import Msg
from nats.js.api import Header

from lacre_fabric.nats import subjects
from lacre_fabric.nats.connection import Connection
from lacre_fabric.work.contract import MAX_DELIVER

# A replica that answers may be a moment behind the one that took the mark.
_TRIES: Final = 5
_AGAIN: Final = 0.1  # seconds

# NATS does not answer, or the message's reply subject is not JetStream's.
_INVALID: Final = (nats.errors.Error, ValueError, LookupError, ArithmeticError, OSError)


def deliveries(message: Msg) -> int:
    """How many times JetStream has delivered the message, including this time."""
    try:
        return message.metadata.num_delivered or 1
    except _INVALID:
        return 1  # it will not be delivered again


async def hand_back(connection: Connection, pool: str, digest: bytes, message: Msg) -> bool:
    """Returns the message to its queue. False: it stays here. digest: of the request."""
    if not digest or deliveries(message) >= MAX_DELIVER:
        return False
    try:
        mark, first = _name(message), {Header.EXPECTED_LAST_SUBJECT_SEQUENCE.value: "0"}
        await connection.jetstream.publish(subjects.handed_back(pool, digest.hex()), mark, headers=first)
        await message.nak()
    except _INVALID:
        return False
    return True


async def was_handed_back(connection: Connection, pool: str, digest: bytes, message: Msg) -> bool:
    """Whether the worker that had the message returned it. False also if NATS does not say."""
    subject = subjects.handed_back(pool, digest.hex())
    for _ in range(_TRIES):
        with suppress(*_INVALID):
            if await connection.newest(f"KV_{subjects.claims_bucket(pool)}", subject) == _name(message):
                return True
        await asyncio.sleep(_AGAIN)
    return False


def _name(message: Msg) -> bytes:
    """A queue that is made again counts from 1 again, so the time is part of it."""
    found = message.metadata
    return f"{found.stream} {found.sequence.stream} {found.timestamp.isoformat()}".encode()
