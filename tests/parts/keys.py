"""Who holds which key on a stage, and what its root signs: statements, manifests and the document that gateways serve."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from lacre.jose.jws import raw_public_key
from lacre.trust.chain import ConnectionString
from lacre.trust.manifest import Document, Manifest, ModelEntry, Pool, PoolKey, RootStatement
from lacre.trust.signing import sign_manifest, sign_statement
from lacre.wire.header import Kem
from lacre.wire.opening import PrivateKey

MODEL = "smollm2-135m"
OTHER_MODEL = "smollm2-360m"
POOL = "default"
OTHER_POOL = "other"
SHAPES = ("none", "pad")
NOW = 1_790_000_000.0


@dataclass(frozen=True)
class Keys:
    """Nobody holds `root` and `signer`, the gateway holds `gateway`, the workers hold the rest.

    past: a key whose time is over. other: the other pool's, with an id that the first pool uses too.
    """

    root: Ed25519PrivateKey = field(default_factory=Ed25519PrivateKey.generate)
    signer: Ed25519PrivateKey = field(default_factory=Ed25519PrivateKey.generate)
    gateway: Ed25519PrivateKey = field(default_factory=Ed25519PrivateKey.generate)
    receipts: Ed25519PrivateKey = field(default_factory=Ed25519PrivateKey.generate)
    pool: PrivateKey = field(default_factory=lambda: PrivateKey.generate(1))
    classic: PrivateKey = field(default_factory=lambda: PrivateKey.generate(2, Kem.X25519))
    past: PrivateKey = field(default_factory=lambda: PrivateKey.generate(9))
    other: PrivateKey = field(default_factory=lambda: PrivateKey.generate(1))


class Trusted:
    """Signs what clients, gateways and workers believe. served: models by pool; the first pool is the one that tests use.

    named: what the manifest says of a model, by its name. held: the first pool's keys by id, the newest first. now: a moment at
    which this stage stands; None for the clock.
    """

    def __init__(self, keys: Keys | None = None, served: Mapping[str, tuple[str, ...]] | None = None, now: float | None = None):
        self.keys = keys or Keys()
        self.served = served or {POOL: (MODEL,)}
        self.pool = next(iter(self.served))
        self.model = self.served[self.pool][0]
        self.held = {key.config.key_id: key for key in (self.keys.pool, self.keys.classic, self.keys.past)}
        self.named: dict[str, ModelEntry] = {}
        self.now = now
        self._statements: dict[float, tuple[str, ...]] = {}

    def clock(self) -> float:
        return time.time() if self.now is None else self.now

    @property
    def url(self) -> str:
        """What applications pin."""
        return str(ConnectionString("http://127.0.0.1:9", raw_public_key(self.keys.root)))

    def statement(self, *, lives: float = 7200.0) -> tuple[str, ...]:
        """What the root signs: its signer. One and the same in every document, but for how long it lives."""
        if lives not in self._statements:
            statement = RootStatement(raw_public_key(self.keys.signer), self.clock() + lives)
            self._statements[lives] = sign_statement(statement, self.keys.root)
        return self._statements[lives]

    def pools(self, *keys: PrivateKey, lives: float = 3600.0) -> dict[str, Pool]:
        """The pools of a manifest, with other keys in the first one."""
        now, receipts = self.clock(), raw_public_key(self.keys.receipts)
        past = self.keys.past.config

        def pool(models: tuple[str, ...], keys: tuple[PrivateKey, ...]) -> Pool:
            listed = (PoolKey(key.config, now - 1 if key.config == past else now + lives) for key in keys)
            return Pool({name: self.named.get(name, ModelEntry()) for name in models}, tuple(listed), receipts, SHAPES)

        own = keys or tuple(self.held.values())
        return {name: pool(models, own if name == self.pool else (self.keys.other,)) for name, models in self.served.items()}

    def manifest(self, version: int = 1, *, lives: float = 3600.0, **members: Any) -> Manifest:
        now = self.clock()
        standard: dict[str, Any] = {
            "issuer": "test", "version": version, "issued_at": now - 10, "expires_at": now + lives,
            "gateway_key": raw_public_key(self.keys.gateway), "pools": self.pools(),
        }  # fmt: skip
        return Manifest(**{**standard, **members})

    def document(self, version: int = 1, **members: Any) -> bytes:
        """A good manifest document, signed by those who may."""
        return Document((self.statement(),), sign_manifest(self.manifest(version, **members), self.keys.signer)).encode()
