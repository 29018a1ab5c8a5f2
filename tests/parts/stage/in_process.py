"""The path of a request inside one process, as much of it as a test asks for: all of it real but the network.

A `Stage` always has keys, a fabric and signed manifests. A test adds a gateway (`with_gateway`), workers that are real nodes
(`worker`, `node`), a worker that does as it is told (`fake_worker`), and clients of the SDK (`client`, `sync_client`). It may
also take a part by hand: the client's (`seal`), the gateway's (`grant`, `dispatch`, `ask`). `close` ends all of it.
"""

from __future__ import annotations

import asyncio
import email.utils
import io
import json
import secrets
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Mapping
from contextlib import aclosing, asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import httpx2
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from fastapi import FastAPI

import lacre
from lacre import asgi
from lacre.evidence.receipts import Receipt
from lacre.jose.jws import b64u, raw_public_key
from lacre.trust.manifest import Manifest
from lacre.wire.header import SealedHeader
from lacre.wire.opening import PrivateKey
from lacre_backend.api.app import create_app as create_api
from lacre_backend.node.node import Identity, Node
from lacre_fabric.logs import make_log
from lacre_fabric.nats.manifest_feed import ManifestFeed
from lacre_fabric.work.contract import Work
from lacre_fabric.work.grants import Grant
from lacre_gateway.admin.api import create_admin
from lacre_gateway.app import create_app
from lacre_gateway.audit.reader import LogReader
from lacre_gateway.gateway import Gateway, build
from lacre_gateway.settings import parse
from parts import by_hand
from parts.by_hand import Answer, Sealed
from parts.echo_engine import EchoEngine
from parts.fake_worker import FakeWorker
from parts.frames import frames_of
from parts.in_memory_http import InMemoryHttp
from parts.issuer import AUDIENCE, ISSUER, Issuer
from parts.keys import Keys, Trusted
from parts.memory_bucket import MemoryBucket
from parts.memory_fabric import MemoryDispatch, MemoryFabric
from parts.stage.settings import gateway_settings, issuer_table, policies_with
from parts.stage.standing import Standing, end, entries
from parts.waiting import until

SAID = b'{"said":"aloud"}'


class Counted:
    """An ASGI app that counts its calls, and keeps what it was called with."""

    def __init__(self, app: asgi.App) -> None:
        self._app = app
        self.calls = 0
        self.bodies: list[bytes] = []

    async def __call__(self, scope: asgi.Scope, receive: asgi.Receive, send: asgi.Send) -> None:
        self.calls += 1

        async def kept() -> asgi.Message:
            message = await receive()
            self.bodies.append(message.get("body", b""))
            return message

        await self._app(scope, kept, send)


@dataclass
class Worker:
    """A node that runs, and the app behind it."""

    node: Node
    app: Counted
    feed: ManifestFeed
    stop: Callable[[], Awaitable[None]]

    @property
    def calls(self) -> int:
        return self.app.calls


class Stage(Standing, Trusted):
    """bucket: what the fabric keeps as the manifest, as its owner likes. look_for_keys: what a node does for a key it lacks."""

    gateway: Gateway  # this and what follows, once there is a gateway
    app: FastAPI
    admin: FastAPI
    issuer: Issuer
    folder: Path
    token: str  # of one caller
    log: io.StringIO
    budgets: MemoryBucket

    def __init__(
        self,
        hub: MemoryFabric | None = None,
        keys: Keys | None = None,
        served: Mapping[str, tuple[str, ...]] | None = None,
        now: float | None = None,
    ) -> None:
        Standing.__init__(self)
        Trusted.__init__(self, keys, served, now)
        self.hub = hub or MemoryFabric()
        self.canary = f"canary-{secrets.token_hex(8)}"
        self.prompt = f"The patient's name is {self.canary}. What should we do?"
        self.bucket: bytes | None = self.document()
        self.queue_limit = 0.5  # seconds that `dispatch` waits for a worker
        self.look_for_keys: Callable[[], bool] = lambda: False

    async def read_bucket(self) -> bytes | None:
        """What the fabric serves as the manifest."""
        return self.bucket

    # The gateway

    @classmethod
    def with_gateway(cls, folder: Path, issuer: Issuer, **parts: str) -> Self:
        """Not published yet: see `on_air`."""
        stage = cls()
        stage.build_gateway(folder, issuer, **parts)
        stage.bucket = None
        return stage

    @classmethod
    @asynccontextmanager
    async def on_air(cls, folder: Path, issuer: Issuer, **parts: str) -> AsyncIterator[Self]:
        """With a gateway that has its manifest. parts: see `build_gateway`."""
        async with cls.with_gateway(folder, issuer, **parts) as stage:
            await stage.publish(stage.document())
            yield stage

    def build_gateway(self, folder: Path, issuer: Issuer, *, settings: str = "", limits: str = "", plans: str = "") -> None:
        """settings, limits: lines added to its settings file. plans: a whole file, in place of the one that ships."""
        self.folder, self.issuer, self.log = folder, issuer, io.StringIO()
        self.token = issuer.token()
        (folder / "jwks.json").write_text(json.dumps(issuer.jwks()))
        if plans:
            policies_with(plans, folder / "policies")
            settings += '\npolicies = "policies"'
        read = parse(self.settings_text(settings, limits), folder / "gateway.toml")
        self.gateway = build(read, self.keys.gateway, make_log(self.log), self.read_bucket)
        self.stack.push_async_callback(self.gateway.close)
        self.gateway.fabric = self.hub.gateway()
        self.gateway.budgets.bucket = self.budgets = MemoryBucket()
        self.app, self.admin = create_app(self.gateway), create_admin(self.gateway)

    def settings_text(self, lines: str = "", limits: str = "") -> str:
        """lines: of the top table."""
        models = "".join(f'[models."{name}"]\ncontext = 2048\n' for name in self.served[self.pool])
        tables = f"{issuer_table(ISSUER, AUDIENCE, 'jwks.json')}\n[limits]\n{limits}\n{models}"
        url, nats, root = "http://127.0.0.1:8321", ["nats://127.0.0.1:4222"], raw_public_key(self.keys.root)
        lines = f'audit = "audit"\n{lines}'
        return gateway_settings("g1", url, root, nats, "grant.key", "gateway.creds", lines, tables)

    async def publish(self, document: bytes | None = None) -> None:
        """Puts the document where the gateway looks for it, and lets it look."""
        self.bucket = document or self.bucket
        await self.gateway.feed.refresh()
        await self.gateway.revocations.start(self.gateway.connected)

    def headers(self, token: str | None = None, **changes: str | None) -> dict[str, str]:
        return by_hand.outer_headers(token or self.issuer.token(), **changes)

    def http(self, address: str = "192.0.2.1", app: FastAPI | None = None) -> httpx2.AsyncClient:
        """Speaks to the gateway's public app, or another, from that address."""
        return httpx2.AsyncClient(transport=InMemoryHttp(app or self.app, address), base_url="http://gateway.test")

    async def post(
        self, client: httpx2.AsyncClient, token: str | None = None, *, body: bytes | None = None, **headers: str | None
    ) -> httpx2.Response:
        """A sealed request, with other outer headers where `headers` names some. body: in place of a good one."""
        sealed = self.seal()[0] if body is None else body
        return await client.post("/v1/sealed", content=sealed, headers=self.headers(token, **headers))

    def raw_entries(self) -> list[bytes]:
        """The gateway's audit log, as it is on the disk."""
        return list(LogReader(self.folder / "audit").entries())

    def entries(self, *kinds: str) -> list[dict[str, Any]]:
        return entries(self.folder / "audit", *kinds)

    async def trail(self, requests: int = 1) -> list[dict[str, Any]]:
        """The intents and outcomes of so many requests."""
        return await self._recorded(2 * requests, "intent", "outcome")

    async def outcomes(self, number: int = 1) -> list[dict[str, Any]]:
        return await self._recorded(number, "outcome")

    async def _recorded(self, number: int, *kinds: str) -> list[dict[str, Any]]:
        await until(lambda: len(self.entries(*kinds)) >= number, why=self.entries)
        return self.entries(*kinds)

    def logged(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in self.log.getvalue().splitlines()]

    # Workers

    async def worker(self, app: asgi.App | None = None, *, models: Iterable[str] = (), **options: Any) -> Worker:
        """A worker process, as far as its fabric can tell: it trusts the root, and reads its manifest from the fabric.

        models: of the echo that stands behind the API where there is no `app`. options: as of `node`.
        """
        models = tuple(models) or next(iter(self.served.values()))
        counted = Counted(app or create_api([self._engine(name) for name in models]))
        feed = ManifestFeed(self.read_bucket, raw_public_key(self.keys.root))
        await feed.refresh()
        node = self.node(counted, models=models, manifest=lambda: feed.manifest, **options)
        return Worker(node, counted, feed, self.run(node))

    def node(
        self,
        app: Any,
        *,
        pool: str = "",
        models: Iterable[str] = (),
        keys: Mapping[int, PrivateKey] | None = None,
        manifest: Callable[[], Manifest | None] | None = None,
        slots: int = 4,
        each: Mapping[str, int] | None = None,
        **options: Any,
    ) -> Node:
        """Not running yet. each: of the slots, how many each model may have. options: as of `Node`."""
        pool, fixed = pool or self.pool, self.manifest()

        def held() -> Mapping[int, PrivateKey]:
            return keys or (self.held if pool == self.pool else {1: self.keys.other})

        def look() -> bool:
            return self.look_for_keys()

        identity = Identity(pool, held, self.keys.receipts, manifest or (lambda: fixed), look)
        fabric = self.hub.worker(pool, tuple(models) or self.served[pool], slots=slots, each=each)
        return Node(fabric, app, identity, **{"clock": self.clock, **options})

    def _engine(self, name: str) -> EchoEngine:
        engine = EchoEngine(name=name)
        self.stack.callback(engine.close)
        return engine

    @asynccontextmanager
    async def fake_worker(self, slots: int = 4) -> AsyncIterator[FakeWorker]:
        worker = FakeWorker(self, slots)
        running = asyncio.create_task(worker.run())
        try:
            yield worker
        finally:
            await end(running)
            await worker.fabric.close()

    # The client's and the gateway's part, by hand

    def seal(
        self, headers: Mapping[str, str | None] | None = None, key: PrivateKey | int = 1, content: bytes = SAID, **parts: Any
    ) -> Sealed:
        """headers: beside the usual ones, or in their place; None takes one away."""
        usual = {"content-type": "application/json", "date": email.utils.formatdate(self.clock(), usegmt=True)}
        inner = tuple((name, value) for name, value in {**usual, **(headers or {})}.items() if value is not None)
        config = (self.held[key] if isinstance(key, int) else key).config
        return by_hand.seal(config, by_hand.request(content, headers=inner, **parts))

    def grant(self, header: SealedHeader, key: Ed25519PrivateKey | None = None, **members: Any) -> str:
        """What an honest gateway signs, but for `members`."""
        now = self.clock()
        usual: dict[str, Any] = {
            "jti": secrets.token_hex(16), "iat": now, "exp": now + 60, "pool": self.pool, "model": self.model,
            "action": "chat", "shape": "pad", "max_tokens": 9, "max_prompt_tokens": 100, "features": (),
            "fair": ("A" * 22, "B" * 22), "enc": b64u(header.digest),
        }  # fmt: skip
        return Grant(**{**usual, **members}).sign(key or self.keys.gateway)

    async def dispatch(self, sealed: Sealed, grant: str | None = None, **work: Any) -> MemoryDispatch:
        usual: dict[str, Any] = {
            "request_id": secrets.token_hex(16), "pool": self.pool, "model": self.model, "digest": sealed.header.digest,
            "grant": grant or self.grant(sealed.header), "sealed": sealed.body,
        }  # fmt: skip
        self.hub.published.clear()  # what the fabric forgets, the node must not
        return await self.hub.gateway().dispatch(Work(**{**usual, **work}), queue_limit=self.queue_limit)

    async def ask(self, sealed: Sealed | None = None, grant: str | None = None, **work: Any) -> Answer:
        sealed = sealed or self.seal()
        dispatch = await self.dispatch(sealed, grant, **work)
        answer = Answer([], sealed.opener)
        async with aclosing(frames_of(dispatch)) as frames:
            async for frame in frames:
                answer.frames.append(frame)
                await dispatch.consumed(len(frame.payload))
        return answer

    def receipt(self, token: str | bytes) -> Receipt:
        token = token if isinstance(token, str) else token.decode()
        return Receipt.verify(token, raw_public_key(self.keys.receipts))

    # Clients

    def client(
        self, wire: httpx2.AsyncBaseTransport | None = None, token: str | None = None, **options: Any
    ) -> lacre.AsyncClient:
        """The SDK's client, whose connection to the gateway is `wire`."""
        return self.client_of(self.url, self._own(token), wire or InMemoryHttp(self.app), **options)

    def sync_client(self, wire: httpx2.AsyncBaseTransport, token: str | None = None, **options: Any) -> lacre.Client:
        """The sync one; use it from a thread."""
        return self.sync_client_of(self.url, self._own(token), wire, **options)

    def _own(self, token: str | None) -> str:
        return getattr(self, "token", "t0ken") if token is None else token


@asynccontextmanager
async def running(node: Node) -> AsyncIterator[None]:
    async with Standing() as standing:
        standing.run(node)
        yield
