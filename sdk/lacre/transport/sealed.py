"""httpx2 transports that seal: every request is sealed to a pool of workers, every answer opened as it arrives.

Rules:
- Only requests for `lacre.exchange.call.ORIGIN` are taken. Redirects are never followed, and what is not sealed is never
  returned as success.
- A refusal by the gateway (which nobody signed) becomes a 4xx or 5xx response in OpenAI's error shape, with words of our own
  and the typed error in `extensions["lacre.refusal"]`: programs that know OpenAI's errors handle it as theirs.

The sync and the async transport drive the generators of `lacre.exchange.call`; every decision is made there.
"""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Iterator
from typing import Final

import httpx2

from lacre import errors, problems
from lacre.evidence.verification import Verification
from lacre.exchange import retry
from lacre.exchange.call import ORIGIN, Sealing
from lacre.exchange.request import Plain
from lacre.exchange.resume import ResumableAnswer, asking
from lacre.exchange.sealed_answer import GatewayRefusal
from lacre.jose.dpop import ProofKey
from lacre.runtime import arguments
from lacre.runtime.forks import PerLoop, PerProcess
from lacre.transport.concurrency import AsyncTurns, Slot, Turns
from lacre.transport.connection import AsyncLink, AsyncWire, Link, Wire
from lacre.transport.mapped_errors import TimedOut, Unreachable, mapped_stream
from lacre.transport.oauth import AsyncToken, Token
from lacre.trust.manifest import Manifest

__all__ = ["FACTS", "REFUSAL", "AsyncSealedTransport", "SealedTransport", "TimedOut", "Unreachable"]

REFUSAL: Final = "lacre.refusal"
FACTS: Final = "lacre"
REQUEST_ID: Final = "x-request-id"  # where OpenAI's packages look for it; the gateway's, for a worker does not know it


class SealedTransport(httpx2.BaseTransport):
    """Seals requests and sends them through `outer`: clients whose base URL is the gateway. Closes them when closed."""

    def __init__(
        self,
        sealing: Sealing,
        outer: PerProcess[httpx2.Client],
        token: Token,
        key: ProofKey | None = None,
        at_once: int | None = None,
    ) -> None:
        """at_once: requests on their way at a time; None for no limit."""
        self._sealing = sealing
        self._link = Link(outer, token, key)
        self._turns = None if at_once is None else PerProcess(lambda: Turns(at_once))

    def handle_request(self, request: httpx2.Request) -> httpx2.Response:
        with arguments.of_content():
            content = request.read()
        plain = plain_request(request, content)
        plain = asking(plain) if self._sealing.resume else plain
        slot = Slot() if self._turns is None else self._turns.get().take()
        try:
            wire = Wire(self._link, request.extensions)
            outcome = wire.run(self._sealing.exchange(plain))
            if isinstance(outcome, GatewayRefusal):
                wire.close()
                slot.leave()
                return refusal_response(outcome)
            answer = ResumableAnswer(self._sealing, plain, outcome)
            return sealed_response(answer, SealedStream(answer, wire, slot))
        except BaseException:
            slot.leave()
            raise

    @property
    def verification(self) -> Verification:
        return self._sealing.verification

    def manifest(self) -> Manifest:
        """The verified manifest, fetched where there is none or it grows old."""
        return Wire(self._link, {}).run(self._sealing.manifest())

    def close(self) -> None:
        self._link.close()


class AsyncSealedTransport(httpx2.AsyncBaseTransport):
    """The async twin of `SealedTransport`; the token may be a callable that returns an awaitable."""

    def __init__(
        self,
        sealing: Sealing,
        outer: PerLoop[httpx2.AsyncClient],
        token: AsyncToken,
        key: ProofKey | None = None,
        at_once: int | None = None,
    ) -> None:
        self._sealing = sealing
        self._link = AsyncLink(outer, token, key)
        self._turns = None if at_once is None else PerLoop(lambda: AsyncTurns(at_once))

    async def handle_async_request(self, request: httpx2.Request) -> httpx2.Response:
        with arguments.of_content():
            content = await request.aread()
        plain = plain_request(request, content)
        plain = asking(plain) if self._sealing.resume else plain
        slot = Slot() if self._turns is None else await self._turns.get().take()
        try:
            wire = AsyncWire(self._link, request.extensions)
            outcome = await wire.run(self._sealing.exchange(plain))
            if isinstance(outcome, GatewayRefusal):
                await wire.close()
                slot.leave()
                return refusal_response(outcome)
            answer = ResumableAnswer(self._sealing, plain, outcome)
            return sealed_response(answer, AsyncSealedStream(answer, wire, slot))
        except BaseException:
            slot.leave()
            raise

    @property
    def verification(self) -> Verification:
        return self._sealing.verification

    async def manifest(self) -> Manifest:
        """The verified manifest, fetched where there is none or it grows old."""
        return await AsyncWire(self._link, {}).run(self._sealing.manifest())

    async def aclose(self) -> None:
        await self._link.aclose()


class SealedStream(httpx2.SyncByteStream):
    """The body of a sealed answer, piece by piece as its records open; where it breaks off, it is resumed."""

    def __init__(self, answer: ResumableAnswer, wire: Wire, slot: Slot) -> None:
        self._answer = answer
        self._wire = wire
        self._slot = slot

    def __iter__(self) -> Iterator[bytes]:
        yield from self._answer.take()
        while not self._answer.ended:
            try:
                with mapped_stream():
                    data = self._wire.read()
                self._answer.feed(data)
            except errors.LacreError as broken:
                self._wire.close()
                self._wire.run(self._answer.resume(broken))
            yield from self._answer.take()

    def close(self) -> None:
        try:
            self._wire.close()
        finally:
            self._slot.leave()


class AsyncSealedStream(httpx2.AsyncByteStream):
    """The async twin of `SealedStream`."""

    def __init__(self, answer: ResumableAnswer, wire: AsyncWire, slot: Slot) -> None:
        self._answer = answer
        self._wire = wire
        self._slot = slot

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


def plain_request(request: httpx2.Request, content: bytes) -> Plain:
    """The application's request, if it is for us. Raises DestinationError."""
    url = request.url
    if (url.scheme, url.host, url.port) != ("https", ORIGIN.removeprefix("https://"), None):
        raise errors.DestinationError(
            "a sealed client reaches its workers only: use lacre.BASE_URL, and another client for other addresses"
        )
    headers = [(name.lower(), value) for name, value in request.headers.multi_items()]
    return Plain(request.method, url.raw_path.decode("ascii"), headers, content)


def sealed_response(answer: ResumableAnswer, stream: httpx2.SyncByteStream | httpx2.AsyncByteStream) -> httpx2.Response:
    head = answer.head
    headers = [(name.encode("ascii"), value.encode("latin-1")) for name, value in head.headers if name != REQUEST_ID]
    if answer.facts.request_id is not None:
        headers.append((REQUEST_ID.encode(), answer.facts.request_id.encode()))
    return httpx2.Response(head.status, headers=headers, stream=stream, extensions={FACTS: answer.facts})


def refusal_response(refusal: GatewayRefusal) -> httpx2.Response:
    problem, exception = refusal.problem, refusal.exception()
    refusal.facts.tell(exception)
    code = "model_not_found" if problem is problems.UNKNOWN_POOL else problem.slug
    error = {"message": f"{exception} {exception.remedy}", "type": "lacre_gateway_refusal", "param": None, "code": code}
    headers = {"content-type": "application/json"}
    if refusal.facts.request_id is not None:
        headers[REQUEST_ID] = refusal.facts.request_id
    if problem in retry.LOST:
        headers["x-should-retry"] = "false"  # OpenAI's word to its clients: this one has cost as many workers as it may
    if refusal.retry_after is not None:
        headers["retry-after"] = str(int(refusal.retry_after))
    if isinstance(methods := refusal.details.get("methods"), tuple):
        headers["allow"] = ", ".join(methods)  # RFC 9110 section 15.5.6
    return httpx2.Response(
        problem.status,
        headers=headers,
        content=json.dumps({"error": error}).encode(),
        extensions={REFUSAL: exception, FACTS: refusal.facts},
    )
