"""A gateway and a worker in one process, for the SDK's tests: it really opens and seals, and serves a real signed manifest.

A test bends what passes through it: `tamper` the sealed request, `bend` the sealed answer's pieces, `respond` all of it; and
what the worker says: `receipts`, and what the gateway proves: `audit`. An answer that `bend` shortens ends in order, as where a
gateway says that the worker may be lost; with `fault` its connection breaks.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import httpx2
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

import lacre
from lacre import asgi, problems
from lacre.evidence import audit_proof
from lacre.evidence.audit_proof import AuditProof
from lacre.evidence.receipts import TRAILER, Receipt
from lacre.exchange.call import Sealing
from lacre.jose.jws import b64u, raw_public_key
from lacre.runtime.forks import PerProcess
from lacre.transport.sealed_sync import SealedTransport
from lacre.trust.chain import ConnectionString
from lacre.trust.manifest import Document, Manifest, ModelEntry, Pool, PoolKey, RootStatement
from lacre.trust.routes import ModelRoute
from lacre.trust.signing import sign_manifest, sign_statement
from lacre.wire.header import MANIFEST_VERSION, MEDIA_TYPE_RESPONSE, Kem
from lacre.wire.opening import PrivateKey
from lacre.wire.padding import SHAPES, shape_named
from parts import audited

MANIFEST = "/v1/manifest"
SEALED = "/v1/sealed"
Respond = Callable[[httpx2.Request], httpx2.Response | None]


@dataclass
class Relay:
    """app: the ASGI app behind the seal. `requests` keeps every outer request, `bodies` every sealed one.

    beside: other pools of this gateway, by name; what they have of their own is the worker's. names: the version that it names
    in its answers.
    """

    app: asgi.App
    kem: Kem = Kem.XWING
    lifetime: float = 3600.0
    version: int = 1
    clock: Callable[[], float] = time.time
    model: str = "tiny"
    entry: ModelEntry = field(default_factory=ModelEntry)  # of the model
    shapes: tuple[str, ...] = SHAPES
    root: Ed25519PrivateKey = field(default_factory=Ed25519PrivateKey.generate)
    signer: Ed25519PrivateKey = field(default_factory=Ed25519PrivateKey.generate)
    receipt_key: Ed25519PrivateKey = field(default_factory=Ed25519PrivateKey.generate)
    gateway_key: Ed25519PrivateKey = field(default_factory=Ed25519PrivateKey.generate)
    requests: list[httpx2.Request] = field(default_factory=list)
    opened: list[asgi.Opened] = field(default_factory=list)
    tamper: Callable[[bytes], bytes] = bytes
    bend: Callable[[list[bytes]], list[bytes]] = list
    receipts: Callable[[Receipt], list[Receipt]] = lambda receipt: [receipt]
    audit: Callable[[AuditProof], AuditProof | None] = lambda proof: proof
    respond: Respond = lambda _request: None
    fault: httpx2.TransportError | None = None
    beside: Mapping[str, Relay] = field(default_factory=dict)
    routes: Mapping[str, ModelRoute] = field(default_factory=dict)
    names: int | None = None

    def __post_init__(self) -> None:
        self._documents: dict[int, bytes] = {}
        self._statements: dict[object, tuple[str, ...]] = {}
        self.key = PrivateKey.generate(1, self.kem)
        for each in self.beside.values():
            each.gateway_key = self.gateway_key

    @property
    def url(self) -> str:
        return str(ConnectionString("http://127.0.0.1:9", raw_public_key(self.root)))

    @property
    def sealed(self) -> list[httpx2.Request]:
        """The sealed requests among those that came."""
        return [request for request in self.requests if request.url.path == SEALED]

    @property
    def manifests(self) -> int:
        """How often the manifest was asked for."""
        return sum(request.url.path == MANIFEST for request in self.requests)

    def manifest(self) -> Manifest:
        now = self.clock()
        pools = {"default": self.pool(now), **{name: each.pool(now) for name, each in self.beside.items()}}
        return Manifest("test", self.version, now, now + self.lifetime, raw_public_key(self.gateway_key), pools, self.routes)

    def pool(self, now: float) -> Pool:
        receipt_key = raw_public_key(self.receipt_key)
        return Pool({self.model: self.entry}, (PoolKey(self.key.config, now + self.lifetime),), receipt_key, self.shapes)

    def document(self) -> bytes:
        """What `GET /v1/manifest` serves; the same bytes for as long as the version stays the same."""
        if self.version not in self._documents:
            self._documents.setdefault(self.version, self._sign())  # the first of several threads
        return self._documents[self.version]

    def _sign(self) -> bytes:
        """Under the same statement for as long as root and signer stay the same: a chain only grows."""
        if (keys := (self.root, self.signer)) not in self._statements:
            statement = RootStatement(raw_public_key(self.signer), self.clock() + 10 * self.lifetime)
            self._statements[keys] = sign_statement(statement, self.root)
        return Document((self._statements[keys],), sign_manifest(self.manifest(), self.signer)).encode()

    async def answer(self, request: httpx2.Request) -> httpx2.Response:
        if (other := self.beside.get(request.headers.get("lacre-pool", ""))) is not None:
            return await other.answer(request)
        self.requests.append(request)
        bent = self.respond(request)
        if bent is not None:
            return bent
        if request.url.path == MANIFEST:
            return served(200, self.document())
        opened = asgi.open_sealed(self.tamper(request.content), {self.key.config.key_id: self.key})
        self.opened.append(opened)
        call = asgi.Call("r1")
        shape = shape_named(opened.headers("lacre-shape")[0])
        answer = asgi.answer(self.app, opened, call, shape=shape, trailers=lambda: self._trailers(opened, call.usage))
        chunks = [chunk async for chunk in answer]
        proved = self.audit(audited.proof(audited.entry(request.headers, request.content), self.gateway_key))
        headers = {"content-type": MEDIA_TYPE_RESPONSE, **({} if proved is None else {audit_proof.HEADER: proved.header()})}
        headers |= {} if self.names is None else {MANIFEST_VERSION: str(self.names)}
        bent = self.bend(chunks)
        return httpx2.Response(200, headers=headers, stream=Stream(bent, self.fault if len(bent) < len(chunks) else None))

    def _trailers(self, opened: asgi.Opened, used: asgi.Usage) -> list[tuple[str, str]]:
        now = self.clock()
        receipt = Receipt(
            enc=b64u(opened.header.digest),
            model=used.model_digest,
            prompt_tokens=used.prompt_tokens,
            cached_tokens=used.cached_tokens,
            completion_tokens=used.completion_tokens,
            start=now,
            end=now,
            final=True,
        )
        return [(TRAILER, each.sign(self.receipt_key)) for each in self.receipts(receipt)]


class Stream(httpx2.AsyncByteStream, httpx2.SyncByteStream):
    """Bytes in the given pieces. fault: how the connection breaks after them."""

    def __init__(self, pieces: Iterable[bytes], fault: httpx2.TransportError | None = None) -> None:
        self._pieces = tuple(pieces)
        self._fault = fault

    def __iter__(self) -> Iterator[bytes]:
        yield from self._pieces
        if self._fault is not None:
            raise self._fault

    async def __aiter__(self) -> AsyncIterator[bytes]:
        for piece in self._pieces:
            yield piece
        if self._fault is not None:
            raise self._fault


def served(status: int, content: bytes = b"", headers: dict[str, str] | None = None) -> httpx2.Response:
    """A response as it comes from a network: its body still to be read."""
    return httpx2.Response(status, headers=headers, stream=Stream([content]))


def on_sealed(answer: Callable[[], httpx2.Response | None]) -> Respond:
    """For `respond`: so each sealed request is answered, and no other."""
    return lambda request: answer() if request.url.path == SEALED else None


def refusing(kind: problems.Problem, details: Mapping[str, Any] | None = None, **headers: str) -> Respond:
    """For `respond`: each sealed request is refused, as a gateway refuses it. headers: with `_` for `-`."""
    named = {name.replace("_", "-"): value for name, value in headers.items()}
    given = {"content-type": problems.MEDIA_TYPE, **named}
    return on_sealed(lambda: served(kind.status, kind.body(details or {}), given))


class AsyncWire(httpx2.AsyncBaseTransport):
    """The connection of an async client to a `Relay`."""

    def __init__(self, relay: Relay) -> None:
        self._relay = relay

    async def handle_async_request(self, request: httpx2.Request) -> httpx2.Response:
        await request.aread()
        return await self._relay.answer(request)


class Wire(httpx2.BaseTransport):
    """The connection of a sync client to a `Relay`, whose coroutine runs to its end in a loop of its own."""

    def __init__(self, relay: Relay) -> None:
        self._relay = relay

    def handle_request(self, request: httpx2.Request) -> httpx2.Response:
        request.read()
        return asyncio.run(self._relay.answer(request))


def connect(relay: Relay, **options: Any) -> lacre.Client:
    """A client of the relay. options: over those that a test need not care about."""
    return lacre.Client(relay.url, **{"token": "t", "memory": lacre.VersionMemory(), "transport": Wire(relay), **options})


def connect_async(relay: Relay, **options: Any) -> lacre.AsyncClient:
    wire = AsyncWire(relay)
    return lacre.AsyncClient(relay.url, **{"token": "t", "memory": lacre.VersionMemory(), "transport": wire, **options})


def clocked(relay: Relay, clock: Callable[[], float], transport: Any = None, **options: Any) -> httpx2.Client:
    """A client beneath `lacre.Client`, which has no clock of a test's own: its paths begin behind `/v1`."""
    sealing = Sealing(ConnectionString.parse(relay.url).root, lacre.VersionMemory(), clock=clock, **options)
    outer = PerProcess(lambda: httpx2.Client(base_url="http://127.0.0.1:9", transport=transport or Wire(relay)))
    return httpx2.Client(transport=SealedTransport(sealing, outer, "t"), base_url=lacre.BASE_URL)
