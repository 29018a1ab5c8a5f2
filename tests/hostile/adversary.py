"""The adversaries. Each really speaks the protocol, is honest until told otherwise, and keeps every byte that it sees.

`GatewayOwner` runs the gateway and the fabric: it signs grants with the gateway's own key. `HostileFabric` is the message
server alone, behind a real gateway (`honest`). A malicious client uses `GatewayOwner.submit`, whose gateway is honest then.
"""

from __future__ import annotations

import asyncio
import base64
import io
import json
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Mapping
from contextlib import aclosing
from dataclasses import dataclass, field
from email.utils import formatdate
from typing import Any

import httpx2
import structlog

from lacre import problems
from lacre.evidence import audit_proof
from lacre.wire import bhttp, varint
from lacre.wire.framing import Deframer
from lacre.wire.header import MEDIA_TYPE_RESPONSE, SealedHeader
from lacre.wire.ohttp import ResponseOpener, seal_request
from lacre.wire.opening import PrivateKey
from lacre_fabric.logs import PROCESSORS
from lacre_fabric.work.contract import Work
from lacre_fabric.work.frames import Frame, FrameKind
from parts import audited, by_hand
from parts.frames import frames_of
from parts.in_memory_http import InMemoryHttp
from parts.keys import MODEL, POOL
from parts.memory_fabric import MemoryFabric
from parts.stage import Stage
from parts.waiting import until
from parts.wires import Pieces

OUTER = ("pool", "model", "action", "max-tokens", "shape")


class Eyes:
    """Everything that an adversary came to see, the logs that its operators read among it."""

    def __init__(self) -> None:
        self.seen: list[bytes] = []
        self.log = io.StringIO()
        self.outcomes: list[tuple[str, str]] = []  # (request id, outcome) of all work that ended

    def see(self, *parts: bytes | str) -> None:
        self.seen += (part if isinstance(part, bytes) else part.encode() for part in parts)

    def watch_logs(self) -> None:
        structlog.configure(processors=[self._note_outcome, *PROCESSORS], logger_factory=structlog.PrintLoggerFactory(self.log))

    def _note_outcome(self, _logger: object, _method: str, event: Any) -> Any:
        if event["event"] == "work.done":
            self.outcomes.append((event["request_id"], event["outcome"]))
        return event

    def has_seen(self, text: str) -> bool:
        """Whether `text` is in any of it, plain or in an encoding that needs no key."""
        everything = b"\n".join([*self.seen, self.log.getvalue().encode()])
        return any(form in everything for form in _forms(text.encode()))


def _forms(text: bytes) -> Iterable[bytes]:
    yield text
    yield text.decode().encode("utf-16-le")
    yield text.hex().encode()
    for shift in range(3):  # base64 at each alignment, without the characters that the neighbours decide
        yield base64.b64encode(bytes(shift) + text)[4 if shift else 0 : -4]


class HostileFabric(MemoryFabric):
    """A message server that shows its owner all that passes, and does with it what it is told.

    deliver: what is put into the queue when `work` was published. lost: deliveries of it that came to nothing
    before. pass_on: what a gateway hears of a frame.
    """

    def __init__(self, eyes: Eyes) -> None:
        super().__init__()
        self.eyes = eyes
        self.works: list[Work] = []
        self.frames: list[tuple[str, Frame]] = []
        self.deliver: Callable[[Work], Iterable[Work]] = lambda work: [work]
        self.lost = 0
        self.pass_on: Callable[[str, Frame], Iterable[tuple[str, Frame]]] = lambda request_id, frame: [(request_id, frame)]

    async def enqueue(self, work: Work, deliveries: int) -> None:
        self.eyes.see(work.request_id, work.pool, work.model, work.grant, work.sealed, work.gateway, work.settlement)
        if deliveries == 1:
            self.works.append(work)
        for each in self.deliver(work):
            await super().enqueue(each, deliveries + self.lost)

    def receive(self, request_id: str, frame: Frame) -> None:
        self.eyes.see(frame.payload, *frame.headers().values())
        self.frames.append((request_id, frame))
        for to, passed in self.pass_on(request_id, frame):
            super().receive(to, passed)

    def forget(self) -> None:
        """Wipes what it knows of publications and claims."""
        self.published.clear()
        self.claims.clear()


class Agreeable(dict[bytes, str]):
    """In the place of a fabric's claims: every attempt is told that it has the request."""

    def setdefault(self, _key: bytes, value: str = "") -> str:
        return value


@dataclass
class SealedAnswer:
    """A sealed response, cut along its framing: what can be done to it without its key."""

    nonce: bytes
    chunks: list[bytes]
    final: bytes

    @classmethod
    def parse(cls, data: bytes) -> SealedAnswer:
        deframer = Deframer()
        chunks = [bytes(chunk) for chunk in deframer.feed(data[32:])]
        return cls(data[:32], chunks, deframer.close())

    def encode(self) -> bytes:
        return self.nonce + b"".join(framed(chunk) for chunk in self.chunks) + b"\x00" + self.final


def framed(chunk: bytes) -> bytes:
    return varint.encode(len(chunk)) + chunk


@dataclass(frozen=True)
class Ran:
    """What came of work on the fabric. problem: the worker's, unsealed. receipt: the last one."""

    outcome: str
    sealed: bytes
    problem: str | None
    receipt: bytes | None


Grants = Mapping[str, Any]
Response = httpx2.Response | None
Respond = Callable[[httpx2.Request], Response | Awaitable[Response]]
Change = Callable[[SealedAnswer], SealedAnswer | bytes | Iterable[bytes] | AsyncIterator[bytes] | httpx2.Response]


class GatewayOwner(httpx2.AsyncBaseTransport):
    """Sits behind the client's connection, with the gateway's key and the fabric in its hands.

    Its attack is set up in its attributes. manifest: what it serves. grant: members of the grant that it changes. sealed: what
    it makes of the sealed request. change: what it makes of the whole sealed answer. respond: what it says instead of
    relaying. recorded: what its audit log says of a request instead of the truth; None for no proof. log_key: what signs it.
    """

    def __init__(self, stage: Stage, eyes: Eyes, fabric: HostileFabric) -> None:
        self.stage = stage
        self.eyes = eyes
        self.fabric = fabric
        self.requests: list[httpx2.Request] = []
        self.answers: list[bytes] = []
        self.manifest: Callable[[], bytes | httpx2.Response] = lambda: stage.bucket
        self.grant: Grants = {}
        self.sealed: Callable[[bytes], bytes] = bytes
        self.change: Change = lambda answer: answer
        self.respond: Respond = lambda _request: None
        self.recorded: Callable[[dict[str, Any]], dict[str, Any] | None] = lambda entry: entry
        self.log_key = stage.keys.gateway

    @property
    def posts(self) -> list[httpx2.Request]:
        """The sealed requests that reached it."""
        return [request for request in self.requests if request.url.path == "/v1/sealed"]

    async def handle_async_request(self, request: httpx2.Request) -> httpx2.Response:
        self.eyes.see(request.method, str(request.url), *(part for pair in request.headers.raw for part in pair))
        self.eyes.see(await request.aread())
        self.requests.append(request)
        if request.url.path == "/v1/manifest":
            served = self.manifest()
            return served if isinstance(served, httpx2.Response) else response(200, served)
        bent = self.respond(request)
        if isinstance(bent, Awaitable):
            bent = await bent
        return self._proved(request, bent if bent is not None else await self._relay(request))

    def _proved(self, request: httpx2.Request, answer: httpx2.Response) -> httpx2.Response:
        """Its log is its own affair: whatever it did, it can prove that it recorded what was sent."""
        token = request.headers["authorization"].removeprefix("Bearer ")
        entry = self.recorded(audited.entry(request.headers, request.content, **audit_proof.speaks_for(token)))
        if answer.status_code == 200 and entry is not None:
            answer.headers[audit_proof.HEADER] = audited.proof(entry, self.log_key).header()
        return answer

    @staticmethod
    def outer(request: httpx2.Request) -> dict[str, str]:
        return {name: request.headers[f"lacre-{name}"] for name in OUTER}

    async def _relay(self, request: httpx2.Request) -> httpx2.Response:
        ran = await self.run(self.sealed(request.content), self.outer(request), **self.grant)
        if not ran.sealed:
            problem = problems.BY_TYPE[ran.problem or problems.WORKER_LOST.type]
            return response(problem.status, problem.body(), problems.MEDIA_TYPE)
        self.answers.append(ran.sealed)
        changed = self.change(SealedAnswer.parse(ran.sealed))
        if isinstance(changed, httpx2.Response):
            return changed
        return response(200, changed.encode() if isinstance(changed, SealedAnswer) else changed, MEDIA_TYPE_RESPONSE)

    async def run(
        self, sealed: bytes, outer: Mapping[str, str] | None = None, *, token: str | None = None, **grant: Any
    ) -> Ran:
        """Has a worker do the work, under a grant of its own making (`grant`: members that differ; token: a whole one)."""
        outer = outer or dict(zip(OUTER, (POOL, MODEL, "chat", "512", "none"), strict=True))
        members = self.members(outer) | grant
        header = SealedHeader.parse(sealed)
        number = len(self.fabric.works)
        request_id = f"{number:032x}"
        token = token if token is not None else self.stage.grant(header, **members)
        work = Work(request_id, members["pool"], members["model"], header.digest, token, sealed)
        dispatch = await self.fabric.gateway().dispatch(work)
        frames: list[Frame] = []

        async def collect() -> None:
            async with aclosing(frames_of(dispatch)) as coming:
                async for frame in coming:
                    frames.append(frame)
                    await dispatch.consumed(len(frame.payload))

        collecting = asyncio.create_task(collect())
        await until(lambda: self._ended(request_id, collecting) is not None, 30)
        outcome = self._ended(request_id, collecting)
        assert outcome is not None
        collecting.cancel()
        await asyncio.gather(collecting, return_exceptions=True)
        data = b"".join(frame.payload for frame in frames if frame.kind is FrameKind.DATA)
        errors = [frame.payload.decode() for frame in frames if frame.kind is FrameKind.ERROR]
        return Ran(outcome, data, errors[0] if errors else None, dispatch.receipt)

    def _ended(self, request_id: str, collecting: asyncio.Task[None]) -> str | None:
        """How the worker ended it: by its frames or, where it says nothing, by its own log."""
        silent = ("replayed", "failed", "cancelled")
        ends = (outcome for ended, outcome in self.eyes.outcomes if ended == request_id)
        return next((outcome for outcome in ends if collecting.done() or outcome in silent), None)

    @staticmethod
    def members(outer: Mapping[str, str]) -> dict[str, Any]:
        """Of an honest gateway's grant."""
        same = {name: outer[name] for name in ("pool", "model", "action", "shape")}
        return same | {"max_tokens": int(outer["max-tokens"]), "max_prompt_tokens": 4096}

    # The malicious client

    async def submit(self, message: bytes, key: PrivateKey | None = None, **grant: Any) -> Inside:
        """A client's own BHTTP message, sealed as it stands, through an honest gateway."""
        sealed, _, opener = seal_request((key or self.stage.keys.pool).config, message)
        return opened(await self.run(sealed, **grant), opener)


@dataclass(frozen=True)
class Inside:
    """What a malicious client got. problem: unsealed, then there is nothing else."""

    outcome: str
    problem: str | None
    status: int = 0
    body: bytes = field(default=b"", repr=False)

    @property
    def code(self) -> str | None:
        """Of an error in OpenAI's shape; of a problem document, its type."""
        document = json.loads(self.body)
        return document["error"]["code"] if "error" in document else document.get("type")


def opened(ran: Ran, opener: ResponseOpener) -> Inside:
    if not ran.sealed:
        return Inside(ran.outcome, ran.problem)
    decoder = bhttp.ResponseDecoder()
    events = decoder.feed(b"".join([*opener.feed(ran.sealed), *opener.close()])) + decoder.close()
    status = next(event.status for event in events if isinstance(event, bhttp.ResponseHead))
    return Inside(ran.outcome, ran.problem, status, b"".join(e.content for e in events if isinstance(e, bhttp.Data)))


def inner(content: bytes = b"{}", *, date: float | None = None, **parts: Any) -> bhttp.Request:
    """A client's request before sealing, as the SDK would have it but for `parts`."""
    headers = (("content-type", "application/json"), ("date", formatdate(date or time.time(), usegmt=True)))
    return by_hand.request(content, **{"headers": headers, **parts})


def response(status: int, content: bytes | Iterable[bytes] | AsyncIterator[bytes], media_type: str = "") -> httpx2.Response:
    """As it comes off a network: the body still to be read."""
    pieces = [content] if isinstance(content, bytes) else content
    return httpx2.Response(status, headers={"content-type": media_type} if media_type else {}, stream=Pieces(pieces))


class HttpWire(InMemoryHttp):
    """A client's connection to a real gateway, which answers piece by piece.

    meddle: what somebody between the two makes of the request's headers.
    """

    def __init__(self, app: Any, eyes: Eyes) -> None:
        super().__init__(app, "192.0.2.1")
        self.eyes = eyes
        self.requests: list[httpx2.Request] = []
        self.meddle: Callable[[list[tuple[bytes, bytes]]], list[tuple[bytes, bytes]]] = list

    def fields(self, request: httpx2.Request) -> list[tuple[bytes, bytes]]:
        return self.meddle([(name.lower(), value) for name, value in super().fields(request)])

    async def handle_async_request(self, request: httpx2.Request) -> httpx2.Response:
        self.requests.append(request)
        body = await request.aread()
        self.eyes.see(body, str(request.url), *(part for pair in request.headers.raw for part in pair))
        return await super().handle_async_request(request)
