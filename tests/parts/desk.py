"""A gateway's side of one node, over the fabric in memory: seals like a client, grants like a gateway, opens answers."""

from __future__ import annotations

import asyncio
import email.utils
import secrets
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Collection
from contextlib import aclosing, asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from lacre.asgi import EXTENSION, Call, Receive, Scope, Send
from lacre.evidence.receipts import Receipt
from lacre.jose.jws import b64u, raw_public_key
from lacre.trust.manifest import Manifest
from lacre.wire import bhttp
from lacre.wire.header import SealedHeader
from lacre.wire.ohttp import ResponseOpener, seal_request
from lacre.wire.opening import PrivateKey
from lacre_backend.node.node import Identity, Node
from lacre_fabric.work.contract import Work
from lacre_fabric.work.frames import Frame, Kind
from lacre_fabric.work.grants import Grant
from parts.memory_fabric import MemoryDispatch, MemoryFabric

CHAT = "/v1/chat/completions"
NOW = 1_790_000_000.0
JSON = [(b"content-type", b"application/json")]
STREAM = [(b"content-type", b"text/event-stream")]


class App:
    """Answers with what it was asked, or as it is told; keeps the calls that it got."""

    def __init__(self) -> None:
        self.calls: list[Call] = []
        self.scopes: list[Scope] = []
        self.left = asyncio.Event()
        self.answer: Callable[[Receive, Send, Call], Awaitable[None]] = self.echo

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        call: Call = scope["extensions"][EXTENSION]
        self.calls.append(call)
        self.scopes.append(scope)
        call.usage.model_digest = "sha256:" + "7" * 64
        await self.answer(receive, send, call)

    async def echo(self, receive: Receive, send: Send, call: Call) -> None:
        body = (await receive())["body"]
        call.usage.prompt_tokens, call.usage.cached_tokens, call.usage.completion_tokens = 11, 4, 3
        await send({"type": "http.response.start", "status": 200, "headers": JSON})
        await send({"type": "http.response.body", "body": body})

    async def slowly(self, receive: Receive, send: Send, call: Call) -> None:
        """Two events, and then nothing until it is told to leave."""
        await receive()
        await send({"type": "http.response.start", "status": 200, "headers": STREAM})
        for number in (1, 2):
            call.usage.completion_tokens = number
            await send({"type": "http.response.body", "body": b"data: x\n\n", "more_body": True})
        try:
            await receive()
        finally:
            self.left.set()


@dataclass
class Answer:
    """What came back: the frames, and what the client opened of them."""

    frames: list[Frame]
    opener: ResponseOpener

    @property
    def problem(self) -> str | None:
        """The type in the error frame."""
        last = self.frames[-1]
        return last.payload.decode() if last.kind is Kind.ERROR else None

    def sizes(self) -> list[int]:
        return [len(frame.payload) for frame in self.frames if frame.kind is Kind.DATA]

    def opened(self) -> tuple[bhttp.Head, bytes, dict[str, str]]:
        """Status and headers, content, trailers. Raises TruncatedStream where it is not whole."""
        decoder = bhttp.ResponseDecoder()
        events: list[bhttp.Event] = []
        for frame in self.frames:
            if frame.kind is Kind.DATA:
                events += [event for record in self.opener.feed(frame.payload) for event in decoder.feed(record)]
        events += [event for record in self.opener.close() for event in decoder.feed(record)] + decoder.close()
        [head] = [event for event in events if isinstance(event, bhttp.Head)]
        [end] = [event for event in events if isinstance(event, bhttp.End)]
        return head, b"".join(event.content for event in events if isinstance(event, bhttp.Data)), dict(end.trailers)


@dataclass
class Desk:
    """A gateway's side: seals like a client, grants like a gateway, and sends it to the node through the hub."""

    app: App
    hub: MemoryFabric = field(default_factory=MemoryFabric)
    grant_key: Ed25519PrivateKey = field(default_factory=Ed25519PrivateKey.generate)
    receipt_key: Ed25519PrivateKey = field(default_factory=Ed25519PrivateKey.generate)
    keys: dict[int, PrivateKey] = field(default_factory=lambda: {1: PrivateKey.generate(1)})
    now: float = NOW
    manifest_lives: float = 3600.0
    look_for_keys: Callable[[], bool] = lambda: False

    def look(self) -> bool:
        return self.look_for_keys()

    def node(self, app: Any = None, repeatable: Collection[str] = (), **options: Any) -> Node:
        manifest = Manifest("test", 1, NOW, NOW + self.manifest_lives, raw_public_key(self.grant_key), {})
        identity = Identity("p", lambda: self.keys, self.receipt_key, lambda: manifest, self.look)
        worker = self.hub.worker("p", ["m"], slots=2)
        return Node(worker, app or self.app, identity, repeatable=repeatable, clock=lambda: self.now, **options)

    def seal(self, headers: dict[str, str | None] | None = None, key: PrivateKey | None = None, **parts: Any) -> Sealed:
        """headers: beside the usual ones, or in their place; None takes one away."""
        usual: dict[str, str | None] = {
            "content-type": "application/json", "date": email.utils.formatdate(NOW, usegmt=True),
            "lacre-pool": "p", "lacre-model": "m", "lacre-action": "chat", "lacre-max-tokens": "9", "lacre-shape": "pad",
        }  # fmt: skip
        inner = tuple((name, value) for name, value in {**usual, **(headers or {})}.items() if value is not None)
        request = bhttp.Request(
            "POST", parts.get("scheme", "https"), parts.get("authority", "lacre.invalid"), parts.get("path", CHAT), inner,
            parts.get("content", b'{"said":"aloud"}'),
        )  # fmt: skip
        body, header, opener = seal_request((key or self.keys[1]).config, bhttp.encode_request(request))
        return Sealed(body, header, opener)

    def grant(self, header: SealedHeader, key: Ed25519PrivateKey | None = None, **members: Any) -> str:
        usual: dict[str, Any] = {
            "jti": secrets.token_hex(16), "iat": self.now, "exp": self.now + 60, "pool": "p", "model": "m", "action": "chat",
            "shape": "pad", "max_tokens": 9, "max_prompt_tokens": 100, "features": (), "fair": ("A" * 22, "B" * 22),
            "enc": b64u(header.digest),
        }  # fmt: skip
        return Grant(**{**usual, **members}).sign(key or self.grant_key)

    async def dispatch(self, sealed: Sealed, grant: str | None = None, **work: Any) -> MemoryDispatch:
        usual: dict[str, Any] = {
            "request_id": secrets.token_hex(16), "pool": "p", "model": "m", "digest": sealed.header.digest,
            "grant": grant or self.grant(sealed.header), "sealed": sealed.body,
        }  # fmt: skip
        self.hub.published.clear()  # what the fabric forgets, the node must not
        return await self.hub.gateway().dispatch(Work(**{**usual, **work}), queue_limit=0.5)

    async def ask(self, sealed: Sealed | None = None, grant: str | None = None, **work: Any) -> Answer:
        sealed = sealed or self.seal()
        dispatch = await self.dispatch(sealed, grant, **work)
        answer = Answer([], sealed.opener)
        async with aclosing(dispatch.frames()) as frames:
            async for frame in frames:
                answer.frames.append(frame)
                await dispatch.consumed(len(frame.payload))
        return answer

    def receipt(self, token: str | bytes) -> Receipt:
        token = token if isinstance(token, str) else token.decode()
        return Receipt.verify(token, raw_public_key(self.receipt_key))


@dataclass(frozen=True)
class Sealed:
    body: bytes
    header: SealedHeader
    opener: ResponseOpener


@asynccontextmanager
async def running(node: Node) -> AsyncIterator[None]:
    task = asyncio.create_task(node.run())
    try:
        yield
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        await node.drain(1)


async def until(condition: Callable[[], Any], seconds: float = 3.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it did not come to pass"
        await asyncio.sleep(0.01)
