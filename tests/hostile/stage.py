"""The honest side of every attack: keys, a manifest, workers and clients. All of them are the real ones.

The fabric and, for some attacks, the gateway belong to somebody else: see `adversary`.
"""

from __future__ import annotations

import asyncio
import secrets
import time
from collections.abc import AsyncIterator, Callable, Collection, Iterable, Iterator, Mapping
from contextlib import AsyncExitStack
from dataclasses import dataclass, field
from typing import Any

import httpx2
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

import lacre
from lacre import asgi
from lacre.jose.jws import raw_public_key
from lacre.trust.chain import ConnectionString
from lacre.trust.manifest import Document, Manifest, Pool, PoolKey, RootStatement
from lacre.trust.signing import sign_manifest, sign_statement
from lacre.wire.header import Kem
from lacre.wire.opening import PrivateKey
from lacre_backend.api.app import create_app
from lacre_backend.engine.echo import EchoEngine
from lacre_backend.node.node import Identity, Node
from lacre_fabric.nats.manifest_feed import ManifestFeed
from parts.memory_fabric import MemoryFabric

MODEL = "smollm2-135m"
OTHER_MODEL = "smollm2-360m"
POOL = "default"
OTHER_POOL = "other"


@dataclass(frozen=True)
class Keys:
    """Who holds which: `root` and `signer` nobody here, `gateway` the gateway, the rest the workers."""

    root: Ed25519PrivateKey = field(default_factory=Ed25519PrivateKey.generate)
    signer: Ed25519PrivateKey = field(default_factory=Ed25519PrivateKey.generate)
    gateway: Ed25519PrivateKey = field(default_factory=Ed25519PrivateKey.generate)
    receipts: Ed25519PrivateKey = field(default_factory=Ed25519PrivateKey.generate)
    pool: PrivateKey = field(default_factory=lambda: PrivateKey.generate(1))
    classic: PrivateKey = field(default_factory=lambda: PrivateKey.generate(2, Kem.X25519))
    other: PrivateKey = field(default_factory=lambda: PrivateKey.generate(1))  # of the other pool, under the same id

    @property
    def of_workers(self) -> Mapping[int, PrivateKey]:
        return {key.config.key_id: key for key in (self.pool, self.classic)}


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
    running: asyncio.Task[None]

    @property
    def calls(self) -> int:
        return self.app.calls

    async def stop(self) -> None:
        self.running.cancel()
        await asyncio.gather(self.running, return_exceptions=True)
        await self.node.drain(1)


class Stage:
    """Makes workers and clients, and signs manifests. bucket: what the fabric keeps as the manifest, as its owner likes."""

    def __init__(self, hub: MemoryFabric, keys: Keys) -> None:
        self.hub = hub
        self.keys = keys
        self.canary = f"canary-{secrets.token_hex(8)}"
        self.prompt = f"The patient's name is {self.canary}. What should we do?"
        self._statements: dict[float, tuple[str, ...]] = {}
        self.bucket = self.document()
        self._open = AsyncExitStack()

    # Trust

    def manifest(self, version: int = 1, *, lives: float = 3600.0, **members: Any) -> Manifest:
        now = time.time()
        receipts = raw_public_key(self.keys.receipts)
        pools = {
            POOL: Pool((MODEL, OTHER_MODEL), _keys(self.keys.pool, self.keys.classic), receipts, ("pad", "none")),
            OTHER_POOL: Pool((MODEL,), _keys(self.keys.other), receipts, ("pad", "none")),
        }
        standard: dict[str, Any] = {
            "issuer": "hostile", "version": version, "issued_at": now - 10, "expires_at": now + lives,
            "gateway_key": raw_public_key(self.keys.gateway), "pools": pools,
        }  # fmt: skip
        return Manifest(**{**standard, **members})

    def pools(self, *keys: PrivateKey, lives: float = 3600.0) -> dict[str, Pool]:
        """The pools of a manifest, with other keys in the first one."""
        receipts = raw_public_key(self.keys.receipts)
        return {POOL: Pool((MODEL, OTHER_MODEL), _keys(*keys, lives=lives), receipts, ("pad", "none"))}

    def statement(self, *, lives: float = 7200.0) -> tuple[str, ...]:
        """What the root signs: its signer. One and the same in every document, but for how long it lives."""
        if lives not in self._statements:
            statement = RootStatement(raw_public_key(self.keys.signer), time.time() + lives)
            self._statements[lives] = sign_statement(statement, self.keys.root)
        return self._statements[lives]

    def document(self, version: int = 1, **members: Any) -> bytes:
        """A good manifest document, signed by those who may."""
        return Document((self.statement(),), sign_manifest(self.manifest(version, **members), self.keys.signer)).encode()

    # Workers

    async def worker(
        self,
        app: asgi.App | None = None,
        *,
        pool: str = POOL,
        models: Iterable[str] = (MODEL, OTHER_MODEL),
        keys: Mapping[int, PrivateKey] | None = None,
        clock: Callable[[], float] = time.time,
        slots: int = 4,
        each: Mapping[str, int] | None = None,
        weighs: Collection[str] = (),
    ) -> Worker:
        """A worker process, as far as its fabric can tell. It trusts the root, and reads its manifest from the fabric.

        each: of the slots, how many each model may have. weighs: actions of which the app says how many sequences a request is.
        """
        counted = Counted(app or create_app([self._engine(name) for name in models]))
        feed = ManifestFeed(self.read_bucket, raw_public_key(self.keys.root))
        await feed.refresh()
        held = keys or (self.keys.of_workers if pool == POOL else {1: self.keys.other})
        identity = Identity(pool, lambda: held, self.keys.receipts, lambda: feed.manifest)
        fabric = self.hub.worker(pool, tuple(models), slots=slots, each=each)
        node = Node(fabric, counted, identity, weighs=weighs, clock=clock)
        worker = Worker(node, counted, feed, asyncio.create_task(node.run()))
        self._open.push_async_callback(worker.stop)
        return worker

    def _engine(self, name: str) -> EchoEngine:
        engine = EchoEngine(name=name)
        self._open.callback(engine.close)
        return engine

    async def read_bucket(self) -> bytes:
        """What the fabric serves as the manifest."""
        return self.bucket

    # Clients

    @property
    def url(self) -> str:
        """What applications pin."""
        return str(ConnectionString("http://127.0.0.1:9", raw_public_key(self.keys.root)))

    def client(self, wire: httpx2.AsyncBaseTransport, token: str = "t0ken", **options: Any) -> lacre.AsyncClient:
        """The SDK's client, whose connection to the gateway is `wire`."""
        settings = {"memory": lacre.VersionMemory(), "transport": wire, "retries": 0, "resume": 0, **options}
        client = lacre.AsyncClient(self.url, token=token, **settings)
        self._open.push_async_callback(client.aclose)
        return client

    def sync_client(self, wire: httpx2.AsyncBaseTransport, token: str = "t0ken", **options: Any) -> lacre.Client:
        """The sync one; use it from a thread."""
        through = SyncWire(wire, asyncio.get_running_loop())
        settings = {"memory": lacre.VersionMemory(), "transport": through, "retries": 0, "resume": 0, **options}
        client = lacre.Client(self.url, token=token, **settings)
        self._open.callback(client.close)
        return client

    async def close(self) -> None:
        await self._open.aclose()


def _keys(*keys: PrivateKey, lives: float = 3600.0) -> tuple[PoolKey, ...]:
    return tuple(PoolKey(key.config, time.time() + lives) for key in keys)


class SyncWire(httpx2.BaseTransport):
    """A sync client's connection: everything is done on the event loop, which runs in another thread."""

    def __init__(self, wire: httpx2.AsyncBaseTransport, loop: asyncio.AbstractEventLoop) -> None:
        self._wire = wire
        self._loop = loop

    def handle_request(self, request: httpx2.Request) -> httpx2.Response:
        request.read()
        response = self._wait(self._wire.handle_async_request(request))
        assert isinstance(response.stream, httpx2.AsyncByteStream)
        return httpx2.Response(response.status_code, headers=response.headers, stream=_Pulled(response.stream, self._wait))

    def _wait(self, doing: Any) -> Any:
        return asyncio.run_coroutine_threadsafe(doing, self._loop).result(20)


class _Pulled(httpx2.SyncByteStream):
    def __init__(self, stream: httpx2.AsyncByteStream, wait: Callable[[Any], Any]) -> None:
        self._stream = stream
        self._pieces = aiter(stream)
        self._wait = wait

    def __iter__(self) -> Iterator[bytes]:
        while (piece := self._wait(self._next())) is not None:
            yield piece

    async def _next(self) -> bytes | None:
        return await anext(self._pieces, None)

    def close(self) -> None:
        self._wait(self._stream.aclose())


class Pieces(httpx2.AsyncByteStream):
    """A body as it arrives. `pulled` counts the bytes that somebody asked for."""

    def __init__(self, pieces: AsyncIterator[bytes] | Iterable[bytes]) -> None:
        self._pieces = pieces
        self.pulled = 0

    async def __aiter__(self) -> AsyncIterator[bytes]:
        if isinstance(self._pieces, AsyncIterator):
            async for piece in self._pieces:
                self.pulled += len(piece)
                yield piece
        else:
            for piece in self._pieces:
                self.pulled += len(piece)
                yield piece

    async def aclose(self) -> None:
        if isinstance(self._pieces, AsyncIterator) and hasattr(self._pieces, "aclose"):
            await self._pieces.aclose()
