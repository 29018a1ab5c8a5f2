"""A worker of the pool that lies: it opens and seals as it should, and signs receipts and writes answers as it likes."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

from lacre.evidence.receipts import TRAILER, Receipt
from lacre.jose.jws import b64u
from lacre.runtime import tasks
from lacre.wire import bhttp
from lacre.wire.header import SealedHeader
from lacre.wire.opening import open_request
from lacre_fabric.work.frames import FrameKind
from parts.keys import MODEL, POOL
from parts.memory_fabric import MemoryDelivery
from parts.stage import Stage

TEXT = "One, two, three."
TOKENS = 16

Headers = tuple[tuple[str, str], ...]


@dataclass
class LyingWorker:
    """trailers: what it makes of the trailers that hold its honest receipt. told: members of the receipt that the gateway gets.
    usage: what the answer itself says. status, headers: of its answer.
    """  # fmt: skip

    stage: Stage
    trailers: Callable[[Headers, Receipt], Headers] = lambda honest, _receipt: honest
    told: dict[str, Any] = field(default_factory=dict)
    usage: dict[str, int] = field(default_factory=lambda: {"prompt_tokens": 9, "completion_tokens": TOKENS})
    text: str = TEXT
    status: int = 200
    headers: Headers = (("content-type", "application/json"),)
    body: bytes | None = None
    opened: list[bytes] = field(default_factory=list)

    async def __aenter__(self) -> LyingWorker:
        self._fabric = self.stage.hub.worker(POOL, [MODEL])
        self._running = tasks.spawn("lying", self._run())
        return self

    async def __aexit__(self, *_error: object) -> None:
        await tasks.end(self._running)
        await self._fabric.close()

    async def _run(self) -> None:
        while True:
            delivery = await self._fabric.pull()
            await self._answer(delivery)
            self._fabric.release()

    async def _answer(self, delivery: MemoryDelivery) -> None:
        plaintext, header, sealer = open_request(self.stage.held, delivery.work.sealed)
        self.opened.append(plaintext)
        honest = self.receipt(header)
        encoder = bhttp.ResponseEncoder()
        answer = encoder.head(self.status, self.headers) + encoder.data(self.body or self._chat())
        answer += encoder.end(self.trailers(((TRAILER, self.sign(honest)),), honest))
        await delivery.send(FrameKind.DATA, sealer.finish(answer))
        await delivery.send(FrameKind.USAGE, self.sign(self.receipt(header, **self.told)).encode())
        await delivery.drop()
        self.stage.hub.eyes.outcomes.append((delivery.work.request_id, "answered"))

    def receipt(self, header: SealedHeader, **members: Any) -> Receipt:
        now = time.time()
        return replace(Receipt(b64u(header.digest), "sha256:00", 9, 0, TOKENS, now, now, final=True), **members)

    def sign(self, receipt: Receipt) -> str:
        return receipt.sign(self.stage.keys.receipts)

    def _chat(self) -> bytes:
        choice = {"index": 0, "message": {"role": "assistant", "content": self.text}, "finish_reason": "stop"}
        return json.dumps({"id": "c1", "model": MODEL, "choices": [choice], "usage": self.usage}).encode()
