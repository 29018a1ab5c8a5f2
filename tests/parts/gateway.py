"""A gateway with everything real but the network between it and its workers: real keys, tokens, manifest and policies, the
fabric in memory, and workers that really open and seal."""

from __future__ import annotations

import asyncio
import contextlib
import io
import json
import shutil
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import jwt
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from fastapi import FastAPI
from jwt.algorithms import ECAlgorithm, OKPAlgorithm, RSAAlgorithm

from lacre import problems
from lacre.errors import ProtocolError, VerificationError
from lacre.evidence.receipts import Receipt
from lacre.jose.jws import b64u, raw_public_key
from lacre.trust.manifest import Document, Manifest, Pool, PoolKey, RootStatement
from lacre.trust.signing import sign_manifest, sign_statement
from lacre.wire.bhttp import Request, encode_request
from lacre.wire.header import MEDIA_TYPE_REQUEST, Kem, SealedHeader
from lacre.wire.ohttp import ResponseOpener, seal_request
from lacre.wire.opening import PrivateKey, ResponseSealer, open_request
from lacre_fabric.logs import make_log
from lacre_fabric.nats.kv import MemoryBucket
from lacre_fabric.work.frames import Kind
from lacre_fabric.work.grants import Grant
from lacre_gateway.admin.api import create_admin
from lacre_gateway.app import create_app
from lacre_gateway.audit.reader import LogReader
from lacre_gateway.budget.plans import PLANS_FILE
from lacre_gateway.gateway import Gateway, build
from lacre_gateway.policy.rules import shipped
from lacre_gateway.settings import parse
from parts.memory_fabric import MemoryDelivery, MemoryFabric

ISSUER = "https://issuer.example"
AUDIENCE = "lacre-test"
MODEL = "smollm2-135m"
PIECES = (b"Baltic", b", Ionian", b", Coral.")


class Issuer:
    """Signs access tokens with any algorithm; publishes what verifies the honest ones."""

    def __init__(self) -> None:
        self.ed = Ed25519PrivateKey.generate()
        self.ec = ec.generate_private_key(ec.SECP256R1())
        self.rsa = rsa.generate_private_key(public_exponent=65537, key_size=2048)
        self.keys: dict[str, tuple[Any, str]] = {
            "ed": (self.ed, "EdDSA"),
            "ec": (self.ec, "ES256"),
            "rsa": (self.rsa, "RS256"),
        }

    def jwks(self) -> dict[str, Any]:
        members = [
            {**OKPAlgorithm.to_jwk(self.ed.public_key(), as_dict=True), "kid": "ed"},
            {**ECAlgorithm.to_jwk(self.ec.public_key(), as_dict=True), "kid": "ec"},
            {**RSAAlgorithm.to_jwk(self.rsa.public_key(), as_dict=True), "kid": "rsa", "use": "sig", "alg": "RS256"},
        ]
        return {"keys": members}

    def token(self, *, kid: str = "ed", headers: Mapping[str, Any] | None = None, drop: str = "", **claims: Any) -> str:
        key, algorithm = self.keys[kid]
        return jwt.encode(self.claims(drop=drop, **claims), key, algorithm=algorithm, headers={"kid": kid, **(headers or {})})

    def claims(self, *, drop: str = "", **claims: Any) -> dict[str, Any]:
        now = int(time.time())
        standard = {"iss": ISSUER, "aud": AUDIENCE, "sub": "alice", "iat": now - 5, "exp": now + 600, "tenant": "acme"}
        return {name: value for name, value in {**standard, **claims}.items() if name != drop}


@dataclass
class Script:
    """What the fake worker does with a request. ending: usage, error:<problem type>, or silence."""

    pieces: tuple[bytes, ...] = PIECES
    ending: str = "usage"
    final_chunk: bool = True
    before: Callable[[], Awaitable[None]] | None = None
    between: Callable[[], Awaitable[None]] | None = None
    usage: dict[str, Any] = field(default_factory=dict)  # members of the receipt that differ from the honest ones
    receipt_key: Ed25519PrivateKey | None = None
    parting: dict[str, Any] | None = None  # of its last receipt, where the work is withdrawn; None: it says nothing
    beats: tuple[dict[str, Any] | bytes, ...] = ()  # beats after the pieces: members of their receipts, or the bytes themselves


class FakeWorker:
    """Opens requests with the pool's keys and seals answers; counts how often it was asked."""

    def __init__(self, world: World, slots: int = 4) -> None:
        self.world = world
        self.script = Script()
        self.fabric = world.hub.worker("default", [MODEL], slots=slots)
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
        grant = Grant.verify(delivery.work.grant, raw_public_key(self.world.grant_key), time.time())
        self.grants.append(grant)
        try:
            plaintext, header, sealer = open_request(self.world.private_keys, delivery.work.sealed)
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
            await delivery.send(Kind.DATA, sealer.seal(piece))
        for beat in script.beats:
            payload = beat if isinstance(beat, bytes) else self._receipt(header, script, beat, final=False)
            await delivery.send(Kind.BEAT, payload)
        if script.ending == "usage":
            await delivery.send(Kind.DATA, sealer.finish())
            await delivery.send(Kind.USAGE, self._receipt(header, script, script.usage, final=True))
        elif script.ending.startswith("error:"):
            await delivery.send(Kind.ERROR, script.ending.removeprefix("error:").encode())
        else:
            await asyncio.Event().wait()

    def _receipt(self, header: SealedHeader, script: Script, members: dict[str, Any], *, final: bool) -> bytes:
        honest: dict[str, Any] = {
            "enc": b64u(header.digest), "model": "sha256:00", "prompt_tokens": 12, "cached_tokens": 2, "completion_tokens": 7,
            "start": time.time(), "end": time.time(), "final": final,
        }  # fmt: skip
        receipt = Receipt(**{**honest, **members})
        return receipt.sign(script.receipt_key or self.world.receipt_key).encode()


class World:
    """One gateway, its keys, its issuer, and its fabric. `settings` and `limits` are lines added to its settings file. plans: a
    whole file, in place of the one that ships.
    """

    def __init__(self, folder: Path, issuer: Issuer, *, settings: str = "", limits: str = "", plans: str = "") -> None:
        self.folder = folder
        self.issuer = issuer
        self.root, self.signer, self.grant_key, self.receipt_key = (Ed25519PrivateKey.generate() for _ in range(4))
        self.statement = sign_statement(RootStatement(raw_public_key(self.signer), time.time() + 7200), self.root)
        self.pool_keys = (PrivateKey.generate(1), PrivateKey.generate(2, Kem.X25519), PrivateKey.generate(9))
        self.private_keys = {key.config.key_id: key for key in self.pool_keys}
        self.hub = MemoryFabric()
        self.log = io.StringIO()
        (folder / "jwks.json").write_text(json.dumps(self.issuer.jwks()))
        if plans:
            shutil.copytree(shipped(), folder / "policies")
            (folder / "policies" / PLANS_FILE).write_text(plans)
            settings += '\n            policies = "policies"'
        text = self.settings_text(settings, limits)
        self.published: bytes | None = None
        self.gateway: Gateway = build(parse(text, folder / "gateway.toml"), self.grant_key, make_log(self.log), self.fetch)
        self.gateway.fabric = self.hub.gateway()
        self.gateway.budgets.bucket = self.budgets = MemoryBucket()
        self.app: FastAPI = create_app(self.gateway)
        self.admin: FastAPI = create_admin(self.gateway)

    def settings_text(self, settings: str = "", limits: str = "") -> str:
        return f"""
            gateway = "g1"
            public_url = "http://127.0.0.1:8321"
            trust = "{b64u(raw_public_key(self.root))}"
            signing_key = "grant.key"
            audit = "audit"
            {settings}
            [nats]
            url = "nats://127.0.0.1:4222"
            credentials = "gateway.creds"
            [[issuers]]
            issuer = "{ISSUER}"
            audience = "{AUDIENCE}"
            algorithms = ["EdDSA", "ES256", "RS256"]
            jwks = "jwks.json"
            [limits]
            {limits}
            [models."{MODEL}"]
            context = 2048
        """

    def document(self, version: int = 1, *, lives: float = 3600.0, **members: Any) -> bytes:
        """A manifest document. Key 9 is past its time."""
        now = time.time()
        keys = tuple(PoolKey(key.config, now - 1 if key.config.key_id == 9 else now + 3600) for key in self.pool_keys)
        pool = Pool((MODEL,), keys, raw_public_key(self.receipt_key), ("none", "pad"))
        standard: dict[str, Any] = {
            "issuer": "test", "version": version, "issued_at": now - 10, "expires_at": now + lives,
            "gateway_key": raw_public_key(self.grant_key), "pools": {"default": pool},
        }  # fmt: skip
        manifest = Manifest(**{**standard, **members})
        return Document((self.statement,), sign_manifest(manifest, self.signer)).encode()

    async def fetch(self) -> bytes | None:
        return self.published

    async def publish(self, document: bytes) -> None:
        """Puts the document where the gateway looks for it, and lets it look."""
        self.published = document
        await self.gateway.feed.refresh()
        await self.gateway.revocations.start(self.gateway.connected)

    def seal(self, key_id: int = 1, content: bytes = b'{"messages":[]}') -> tuple[bytes, ResponseOpener]:
        request = Request("POST", "https", "lacre.invalid", "/v1/chat/completions", (), content)
        body, _, opener = seal_request(self.private_keys[key_id].config, encode_request(request))
        return body, opener

    def headers(self, token: str | None = None, **changes: str | None) -> dict[str, str]:
        """The outer headers; `None` takes one away. Names with underscores for dashes."""
        headers: dict[str, str | None] = {
            "authorization": f"Bearer {token or self.issuer.token()}", "content-type": MEDIA_TYPE_REQUEST,
            "lacre-pool": "default", "lacre-model": MODEL, "lacre-action": "chat", "lacre-max-tokens": "256",
            "lacre-shape": "none",
        }  # fmt: skip
        headers.update({name.replace("_", "-"): value for name, value in changes.items()})
        return {name: value for name, value in headers.items() if value is not None}

    @contextlib.asynccontextmanager
    async def worker(self, slots: int = 4) -> AsyncIterator[FakeWorker]:
        worker = FakeWorker(self, slots)
        running = asyncio.create_task(worker.run())
        try:
            yield worker
        finally:
            running.cancel()
            await asyncio.gather(running, return_exceptions=True)
            await worker.fabric.close()

    async def trail(self, requests: int = 1) -> list[dict[str, Any]]:
        """The intents and outcomes of so many requests, read back from the audit log on the disk."""
        entries: list[dict[str, Any]] = []
        for _ in range(200):
            entries = [entry for entry in self.entries() if entry["kind"] in ("intent", "outcome")]
            if len(entries) >= 2 * requests:
                return entries
            await asyncio.sleep(0.01)
        raise AssertionError(f"fewer entries than intents and outcomes of {requests} requests: {entries}")

    def entries(self) -> list[dict[str, Any]]:
        return [json.loads(entry) for entry in LogReader(self.folder / "audit").entries()]

    def logged(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in self.log.getvalue().splitlines()]


def opened(opener: ResponseOpener, body: bytes) -> bytes:
    """The plaintext of a whole sealed answer; raises where it is not whole."""
    return b"".join([*opener.feed(body), *opener.close()])
