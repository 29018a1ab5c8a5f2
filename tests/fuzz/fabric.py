"""Targets of what comes to a gateway over NATS: the server's bytes, what a worker may put into them, and JetStream's words.

A script says what a stolen credential of a worker publishes. It is framed as nats-server frames it, and goes through the very
client that a gateway has, but for the socket. Whatever it is, the honest worker that speaks after it is heard.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import math
from typing import Final

from nats.aio.subscription import Subscription

from fuzz.target import Script, Target, outcome
from lacre.errors import InvalidMessage
from lacre_fabric.nats import protocol, subjects
from lacre_fabric.nats.acks import Ack
from lacre_fabric.nats.client import DirectClient
from lacre_fabric.nats.connection import Connection, Stored
from lacre_fabric.nats.pool import KEEP, PoolSide
from lacre_fabric.nats.protocol import BrokenProtocol, Event, NatsMessage, ProtocolReader
from lacre_fabric.work.contract import FabricError, FabricUnavailable
from lacre_fabric.work.frames import Frame, FrameKind
from lacre_fabric.work.presence import MAX_NODES, MAX_SLOTS
from parts.bent import cut

POOL, GATEWAY, NODE = "a", "g1", "honest"
REPLIES, PRESENCE, OTHERS = 1, 2, 3  # subscriptions; the last one is one of the library's own way
# What a worker's message is, by its first byte: to a subject of its own choice behind `reply.a.g1.`, to one that there is.
REPLY, TO_A_REQUEST, SIGN_OF_PRESENCE, TO_THE_LIBRARY = range(4)
ATTEMPT: Final = "a" * 32


# The server's bytes


def nats_stream(data: bytes) -> None:
    """Cutting it anywhere changes nothing, and no message is larger than what came."""
    script = Script(data)
    places, stream = script.cuts(), script.rest()
    whole = outcome(lambda: _events([stream]), (BrokenProtocol,))
    assert whole == outcome(lambda: _events(cut(stream, places)), (BrokenProtocol,))
    if isinstance(whole, list):
        assert sum(len(event.headers) + len(event.payload) for event in whole if isinstance(event, NatsMessage)) <= len(stream)


def _events(pieces: list[bytes]) -> list[Event]:
    reader = ProtocolReader(KEEP)
    return [event for piece in pieces for event in reader.feed(piece)]


def nats_headers(data: bytes) -> dict[str, str]:
    return protocol.fields(data[1:], status=data[:1] == b"\x01")


def headers_are_plain(data: bytes, found: dict[str, str]) -> None:
    assert all(name.isascii() and "\n" not in name for name in found)
    assert len(found) <= protocol.MAX_FIELDS + 2
    assert data[:1] == b"\x01" or protocol.STATUS not in found


# A worker


def worker_says(data: bytes) -> None:
    asyncio.run(_worker_says(data))


async def _worker_says(data: bytes) -> None:
    honest = hashlib.sha256(data).hexdigest()[:32]
    told: list[str] = []
    side = PoolSide(POOL, GATEWAY, _nobody, lambda subject, _payload: told.append(subject), _none_gone)
    client = DirectClient(KEEP)
    client._tell_at = math.inf  # a log of what cannot be used is nothing to fuzz
    client._direct.update({REPLIES: side._on_reply, PRESENCE: side._on_presence})
    client._subs[OTHERS] = Subscription(client, OTHERS, "x")
    waiting, under_attack = side.add(honest, 30.0), side.add("0" * 32, 30.0)
    script = Script(data)
    stream = b"".join(_said(script) for _ in range(64) if script)
    for event in ProtocolReader(KEEP).feed(stream + _honest(honest)):
        await client._used(event)
    assert len(side.roster.live()) <= MAX_NODES
    assert all(one.busy <= MAX_SLOTS and one.free <= MAX_SLOTS for one in side.roster.live().values())
    json.dumps({region: [at.busy, at.free] for region, at in side.roster.capacity().items()})
    assert ("lacre", NODE) in side.roster.live(), "the honest worker was not heard"
    assert waiting.inbound.ready, "the honest answer did not come"
    assert all(subjects.is_request(subject.rpartition(".")[2]) for subject in told)
    for one in (waiting, under_attack):
        one.inbound.fail(FabricUnavailable("the end"))


async def _nobody() -> Connection:
    raise FabricUnavailable("there is no server here")


async def _none_gone(_region: str, _sequences: list[int]) -> frozenset[int]:
    return frozenset()


def _said(script: Script) -> bytes:
    """One message of the script. nats-server lets neither space, tab nor the end of a line into a subject."""
    kind, chosen, headers, payload = script.number() % 4, script.text(), script.text(), script.text()
    chosen = chosen.translate(None, b" \t\n") or b"x"
    if kind == TO_A_REQUEST:
        return _framed(REPLIES, b"reply.a.g1." + b"0" * 32, headers, payload)
    if kind == SIGN_OF_PRESENCE:
        return _framed(PRESENCE, b"presence.a." + chosen, headers, payload)
    if kind == TO_THE_LIBRARY:
        return _framed(OTHERS, chosen, headers, payload)
    return _framed(REPLIES, b"reply.a.g1." + chosen, headers, payload)


def _framed(sid: int, subject: bytes, headers: bytes, payload: bytes) -> bytes:
    size = len(headers) + len(payload)
    line = b"HMSG %b %d %d %d" % (subject, sid, len(headers), size) if headers else b"MSG %b %d %d" % (subject, sid, size)
    return line + b"\r\n" + headers + payload + b"\r\n"


def block(frame: Frame) -> bytes:
    return b"NATS/1.0\r\n" + b"".join(f"{name}: {value}\r\n".encode() for name, value in frame.headers().items()) + b"\r\n"


def _honest(request: str) -> bytes:
    present = json.dumps({"models": ["m"], "busy": 1, "free": 2, "keys": []}).encode()
    frame = Frame(ATTEMPT, 0, FrameKind.DATA, b"x")
    said = _framed(PRESENCE, f"presence.a.lacre.{NODE}".encode(), b"", present)
    return said + _framed(REPLIES, subjects.reply(POOL, GATEWAY, request).encode(), block(frame), b"x")


# JetStream


def jetstream_says(data: bytes) -> object:
    """An ack by the first byte, or a message of a stream."""
    if data[:1] == b"\x01":
        return Ack(b"", data[1:]).sequence()
    try:
        said = json.loads(data[1:])
    except (ValueError, RecursionError) as exc:
        raise InvalidMessage("not JSON") from exc
    return Stored.parse(said)


TARGETS: Final = (
    Target("nats_stream", nats_stream, ()),
    Target("nats_headers", nats_headers, (InvalidMessage,), headers_are_plain),
    Target("worker_says", worker_says, (), max_length=8192, json=True),
    Target("jetstream_says", jetstream_says, (InvalidMessage, FabricError), json=True),
)
