"""An httpx2 transport that seals: every request is sealed to a pool of workers, every answer opened as it arrives.

Rules:
- Only requests for `lacre.exchange.call.ORIGIN` are accepted. Redirects are never followed, and an unsealed answer is never
  returned as success.
- The transport drives the generators of `lacre.exchange.call`; every decision is made there.
"""

from __future__ import annotations

import copy
from collections.abc import AsyncIterator
from dataclasses import replace

import httpx2

from lacre import errors
from lacre.evidence.verification import Verification
from lacre.exchange.call import Sealing
from lacre.exchange.own_usage import OwnUsage
from lacre.exchange.request import NO_OVERRIDES, Overrides
from lacre.exchange.resume import ResumableAnswer, asking
from lacre.exchange.sealed_answer import GatewayRefusal
from lacre.exchange.stream_state import StreamState
from lacre.jose.dpop import ProofKey
from lacre.runtime import arguments
from lacre.runtime.forks import PerLoop
from lacre.transport.concurrency import AsyncTurns, Slot
from lacre.transport.connection_async import AsyncLink, AsyncWire
from lacre.transport.mapped_errors import mapped_stream
from lacre.transport.oauth import AsyncToken
from lacre.transport.request_log import CallLog
from lacre.transport.sealed import BEGUN, plain_request, refusal_response, sealed_response
from lacre.trust.manifest import Manifest


class AsyncSealedTransport(httpx2.AsyncBaseTransport):
    """Seals requests and sends them through `outer`: clients whose base URL is the gateway. Closes them when closed."""

    def __init__(
        self,
        sealing: Sealing,
        outer: PerLoop[httpx2.AsyncClient],
        token: AsyncToken,
        key: ProofKey | None = None,
        at_once: int | None = None,
        *,
        overrides: Overrides = NO_OVERRIDES,
    ) -> None:
        """at_once: requests that may run at a time; None for no limit."""
        self._sealing = sealing
        self._overrides = overrides
        self._borrowed = False
        self._link = AsyncLink(outer, token, key)
        self._turns = None if at_once is None else PerLoop(lambda: AsyncTurns(at_once))

    async def handle_async_request(self, request: httpx2.Request) -> httpx2.Response:
        with arguments.of_content():
            content = await request.aread()
        plain = plain_request(request, content, self._overrides)
        begun: StreamState | None = request.extensions.get(BEGUN)
        plain = asking(plain) if self._sealing.resume or begun else plain
        sent = plain if begun is None else replace(plain, content=begun.sent, stays=begun.stays)
        slot = Slot() if self._turns is None else await self._turns.get().take()
        log = CallLog()
        try:
            wire = AsyncWire(self._link, request.extensions)
            outcome = await wire.run(self._sealing.exchange(sent))
            log.headed()
            if isinstance(outcome, GatewayRefusal):
                await wire.close()
                log.ended(outcome.facts, outcome.problem.status, "refused")
                slot.leave()
                return refusal_response(outcome, plain.path)
            answer = ResumableAnswer(self._sealing, plain, outcome, begun)
            return sealed_response(answer, AsyncSealedStream(answer, wire, slot, log))
        except BaseException as exc:
            slot.leave()
            log.failed(exc)
            raise

    @property
    def root(self) -> bytes:
        """The pinned root's public key."""
        return self._sealing.root

    @property
    def verification(self) -> Verification:
        return self._sealing.verification

    async def manifest(self) -> Manifest:
        """The verified manifest; fetched if there is none or it is old."""
        return await AsyncWire(self._link, {}).run(self._sealing.manifest())

    async def usage(self) -> OwnUsage:
        """What the caller has used of its limits, as the gateway says."""
        wire = AsyncWire(self._link, {})
        used = await wire.run(self._sealing.usage(self._overrides.retries))
        await wire.close()
        return used

    def overridden(self, overrides: Overrides) -> AsyncSealedTransport:
        """The same transport for calls with other options. Closing it closes nothing."""
        other = copy.copy(self)
        other._overrides, other._borrowed = overrides.over(self._overrides), True
        return other

    async def aclose(self) -> None:
        if not self._borrowed:
            await self._link.aclose()


class AsyncSealedStream(httpx2.AsyncByteStream):
    """The body of a sealed answer, piece by piece as its records open; resumed if it breaks off."""

    def __init__(self, answer: ResumableAnswer, wire: AsyncWire, slot: Slot, log: CallLog) -> None:
        self._answer = answer
        self._wire = wire
        self._slot = slot
        self._log = log

    async def __aiter__(self) -> AsyncIterator[bytes]:
        for piece in self._answer.take():
            yield piece
        while not self._answer.ended:
            try:
                with mapped_stream():
                    data = await self._wire.read()
                self._answer.feed(data)
            except errors.LacreError as broken:
                await self._wire.close()
                await self._wire.run(self._answer.resume(broken))
            for piece in self._answer.take():
                yield piece

    async def aclose(self) -> None:
        try:
            await self._wire.close()
        finally:
            self._slot.leave()
            answer = self._answer
            self._log.ended(answer.facts, answer.head.status, "whole" if answer.ended else "left")
