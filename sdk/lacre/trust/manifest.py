"""The formats of trust: root statements, the manifest, and the document that carries both.

Forms only: `lacre.trust.chain` decides whether to believe one. Unknown members are ignored, missing ones refused.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

from lacre.errors import InvalidMessage, MessageTooLarge, UnsupportedSuite
from lacre.jose.claims import Members
from lacre.jose.jws import b64u
from lacre.wire.header import KeyConfig

ROOT_TYP: Final = "lacre-root+jwt"
MANIFEST_TYP: Final = "lacre-manifest+jwt"
KEY_BYTES: Final = 32  # an Ed25519 public key (RFC 8032)
MAX_DOCUMENT: Final = 2**20  # bytes of `GET /v1/manifest`; some hundred pools with X-Wing keys
MAX_CHAIN: Final = 1000  # root statements; a root that changes monthly for 80 years
DIGEST: Final = "sha256:"  # how a model's digest begins in receipts and pins
_HEX: Final = re.compile("[0-9a-f]{64}")


@dataclass(frozen=True, slots=True)
class RootStatement:
    """What a root signs: the signer of manifests, until when, and the next root, if this one hands over."""

    signer: bytes
    expires_at: float
    next_root: bytes | None = None

    def payload(self) -> bytes:
        next_root = None if self.next_root is None else b64u(self.next_root)
        members = {"typ": "lacre-root", "signer": b64u(self.signer), "exp": self.expires_at, "next_root": next_root}
        return json.dumps(members, separators=(",", ":")).encode()

    @classmethod
    def parse(cls, members: Members) -> RootStatement:
        if members.text("typ") != "lacre-root":
            raise InvalidMessage("a root statement must say typ lacre-root")
        signer = members.octets("signer", KEY_BYTES)
        return cls(signer, members.time("exp"), members.optional_octets("next_root", KEY_BYTES))


def fingerprint(config: KeyConfig) -> str:
    """Names a key; its id alone may have named an older key."""
    return b64u(hashlib.sha256(config.encode()).digest()[:12])


@dataclass(frozen=True, slots=True)
class PoolKey:
    """A public key to seal to, and the time (seconds since the epoch) after which no client should."""

    config: KeyConfig
    not_after: float


@dataclass(frozen=True, slots=True)
class ModelEntry:
    """What the publisher says of a model.

    sha256: digests of the files that may be served as this model, in hex; empty: any file. signers: ids of the keys that
    signed them (OpenSSF Model Signing's `hint`: SHA-256 of the public key in PEM), in hex.
    """

    sha256: tuple[str, ...] = ()
    signers: tuple[str, ...] = ()

    @property
    def digests(self) -> tuple[str, ...]:
        """As a receipt names them."""
        return tuple(DIGEST + each for each in self.sha256)

    def members(self) -> dict[str, Any]:
        return {"sha256": list(self.sha256), "signers": list(self.signers)}

    @classmethod
    def parse(cls, members: Members) -> ModelEntry:
        """Raises InvalidMessage."""
        found = cls(members.texts("sha256"), members.texts("signers"))
        if not all(map(_HEX.fullmatch, (*found.sha256, *found.signers))):
            raise InvalidMessage("a model's sha256 and signers must be lists of 64 hexadecimal digits in small letters")
        return found


def is_digest(text: str) -> bool:
    """Whether it names a model file as receipts do: `sha256:` and 64 hexadecimal digits in small letters."""
    return text.startswith(DIGEST) and _HEX.fullmatch(text, len(DIGEST)) is not None


@dataclass(frozen=True, slots=True)
class Pool:
    """Workers that share keys. models: by name; the first is the default. `keys`: the newest first, without those whose suite
    this version does not know.
    """

    models: Mapping[str, ModelEntry]
    keys: tuple[PoolKey, ...]
    receipt_key: bytes
    shapes: tuple[str, ...]

    def members(self) -> dict[str, Any]:
        keys = [{"config": b64u(key.config.encode()), "not_after": key.not_after} for key in self.keys]
        return {
            "models": {name: model.members() for name, model in self.models.items()},
            "default_model": next(iter(self.models), None),  # a JSON object has no order (RFC 8259 section 4)
            "keys": keys,
            "receipt_key": b64u(self.receipt_key),
            "shapes": list(self.shapes),
        }

    @classmethod
    def parse(cls, members: Members) -> Pool:
        keys = tuple(key for key in map(_parse_key, members.objects("keys")) if key is not None)
        receipt_key = members.octets("receipt_key", KEY_BYTES)
        return cls(_parse_models(members), keys, receipt_key, members.texts("shapes"))


def _parse_models(members: Members) -> dict[str, ModelEntry]:
    """The default model first."""
    models = {name: ModelEntry.parse(model) for name, model in members.named_objects("models").items()}
    default = members.optional_text("default_model")
    if default is None and not models:
        return {}
    if default not in models:
        raise InvalidMessage("a pool's default_model must be one of its models")
    return {default: models[default], **models}


def _parse_key(members: Members) -> PoolKey | None:
    encoded, not_after = members.octets("config"), members.time("not_after")
    try:
        return PoolKey(KeyConfig.parse(encoded), not_after)
    except UnsupportedSuite:
        return None  # a future suite beside ones that we know; a pool with no known key cannot be sealed to


@dataclass(frozen=True, slots=True)
class Manifest:
    """The signed description of every pool. Times are seconds since the epoch.

    gateway_key verifies grants and audit checkpoints, and certifies nothing else.
    """

    issuer: str
    version: int
    issued_at: float
    expires_at: float
    gateway_key: bytes
    pools: Mapping[str, Pool]

    def members(self) -> dict[str, Any]:
        return {
            "iss": self.issuer,
            "ver": self.version,
            "iat": self.issued_at,
            "exp": self.expires_at,
            "gateway_key": b64u(self.gateway_key),
            "pools": {name: pool.members() for name, pool in self.pools.items()},
        }

    @classmethod
    def parse(cls, members: Members) -> Manifest:
        return cls(
            issuer=members.text("iss"),
            version=members.count("ver"),
            issued_at=members.time("iat"),
            expires_at=members.time("exp"),
            gateway_key=members.octets("gateway_key", KEY_BYTES),
            pools={name: Pool.parse(pool) for name, pool in members.named_objects("pools").items()},
        )


@dataclass(frozen=True, slots=True)
class Document:
    """The content of `GET /v1/manifest`: the chain of root statements (each one JWS, or two at a change of root), and the
    manifest.
    """

    roots: tuple[tuple[str, ...], ...]
    manifest: str

    def encode(self) -> bytes:
        return json.dumps({"roots": self.roots, "manifest": self.manifest}, separators=(",", ":")).encode()

    @classmethod
    def parse(cls, data: bytes) -> Document:
        if len(data) > MAX_DOCUMENT:
            raise MessageTooLarge(f"the manifest document has over {MAX_DOCUMENT} bytes")
        members = Members.parse(data, "the manifest document")
        roots = members.text_lists("roots", at_most=MAX_CHAIN)
        if any(len(entry) not in (1, 2) for entry in roots):
            raise InvalidMessage("an entry of the chain of roots is one JWS, or two at a change")
        return cls(roots, members.text("manifest"))
