"""A worker that does as it is told: it really opens and seals, and no model answers."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from lacre import problems
from lacre.errors import ProtocolError, VerificationError
from lacre.evidence.receipts import Receipt
from lacre.jose.jws import b64u, raw_public_key
from lacre.wire.header import SealedHeader
from lacre.wire.opening import ResponseSealer, open_request
from lacre_fabric.work.frames import FrameKind
from lacre_fabric.work.grants import Grant
from parts.memory_fabric import MemoryDelivery

if TYPE_CHECKING:
    from parts.stage import Stage

PIECES = (b"Baltic", b", Ionian", b", Coral.")


@dataclass
class Script:
    """What the fake worker does with a request. ending: usage, error:<problem type>, or silence."""

    pieces: tuple[bytes, ...] = PIECES
    ending: str = "usage"
    before: Callable[[], Awaitable[None]] | None = None
    between: Callable[[], Awaitable[None]] | None = None
    usage: dict[str, Any] = field(default_factory=dict)  # members of the receipt that differ from the honest ones
    receipt_key: Ed25519PrivateKey | None = None
    parting: dict[str, Any] | None = None  # of its last receipt, where the work is withdrawn; None: it says nothing
    beats: tuple[dict[str, Any] | bytes, ...] = ()  # beats after the pieces: members of their receipts, or the bytes themselves


class FakeWorker:
    """Opens requests with the pool's keys and seals answers; counts how often it was asked."""

    def __init__(self, stage: Stage, slots: int = 4) -> None:
        self.stage = stage
        self.script = Script()
        self.fabric = stage.hub.worker(stage.pool, stage.served[stage.pool], slots=slots)
        self.opened: list[bytes] = []
        self.grants: list[Grant] = []
        self.cancelled = 0

    async def run(self) -> None:
        async with asyncio.TaskGroup() as group:
            while True:
                delivery = await self.fabric.pull()
                group.create_task(self._serve(delivery))

    async def _serve(self, delivery: MemoryDelivery) -> None:
        script = self.script
        grant = Grant.verify(delivery.work.grant, [raw_public_key(self.stage.keys.gateway)], time.time())
        self.grants.append(grant)
        try:
            plaintext, header, sealer = open_request(self.stage.held, delivery.work.sealed)
        except (ProtocolError, VerificationError):
            await delivery.reject(problems.INVALID_REQUEST.type)
            self.fabric.release()
            return
        assert grant.enc == b64u(header.digest)
        self.opened.append(plaintext)
        assert await delivery.claim()
        answering = asyncio.create_task(self._answer(delivery, script, header, sealer))
        cancelled = asyncio.create_task(delivery.cancelled.wait())
        await asyncio.wait((answering, cancelled), return_when=asyncio.FIRST_COMPLETED)
        if not answering.done():
            self.cancelled += 1
        for task in (answering, cancelled):
            task.cancel()
        await asyncio.gather(answering, cancelled, return_exceptions=True)
        if delivery.cancelled.is_set() and script.parting is not None:
            await delivery.stop(self._receipt(header, script, script.parting, final=True))
        await delivery.drop()
        self.fabric.release()

    async def _answer(self, delivery: MemoryDelivery, script: Script, header: SealedHeader, sealer: ResponseSealer) -> None:
        if script.before is not None:
            await script.before()
        for number, piece in enumerate(script.pieces):
            if number and script.between is not None:
                await script.between()
            await delivery.send(FrameKind.DATA, sealer.seal(piece))
        for beat in script.beats:
            payload = beat if isinstance(beat, bytes) else self._receipt(header, script, beat, final=False)
            await delivery.send(FrameKind.BEAT, payload)
        if script.ending == "usage":
            await delivery.send(FrameKind.DATA, sealer.finish())
            await delivery.send(FrameKind.USAGE, self._receipt(header, script, script.usage, final=True))
        elif script.ending.startswith("error:"):
            await delivery.send(FrameKind.ERROR, script.ending.removeprefix("error:").encode())
        else:
            await asyncio.Event().wait()

    def _receipt(self, header: SealedHeader, script: Script, members: dict[str, Any], *, final: bool) -> bytes:
        honest: dict[str, Any] = {
            "enc": b64u(header.digest), "model": "sha256:00", "prompt_tokens": 12, "cached_tokens": 2, "completion_tokens": 7,
            "start": time.time(), "end": time.time(), "final": final,
        }  # fmt: skip
        receipt = Receipt(**{**honest, **members})
        return receipt.sign(script.receipt_key or self.stage.keys.receipts).encode()
