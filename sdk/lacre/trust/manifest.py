"""The formats of trust: root statements, the manifest, and the document that carries both.

Forms only: `lacre.trust.chain` decides whether to believe one. Unknown members are ignored, missing ones refused.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from enum import StrEnum
from typing import Any, Final

from lacre.errors import InvalidMessage, MessageTooLarge, UnsupportedSuite
from lacre.jose.claims import EXACT, Members
from lacre.jose.formats import Format
from lacre.jose.jws import b64u
from lacre.runtime.json_objects import parse_object
from lacre.trust.routes import ModelRoute, routes_of
from lacre.wire.header import KeyConfig

ROOT_TYP: Final = "lacre-root+jwt"
MANIFEST_TYP: Final = "lacre-manifest+jwt"
_READER: Final = "program (SDK, gateway or worker)"
DOCUMENT: Final = Format("manifest document", _READER)
STATEMENT: Final = Format("root statement", _READER)
MANIFEST: Final = Format("manifest", _READER)
KEY_BYTES: Final = 32  # an Ed25519 public key (RFC 8032)
MAX_DOCUMENT: Final = 2**20  # bytes of `GET /v1/manifest`; some hundred pools with X-Wing keys
MAX_CHAIN: Final = 1000  # root statements; a root that changes monthly for 80 years
DIGEST: Final = "sha256:"  # how a model's digest begins in receipts and pins
MAX_OUTPUT: Final = 4096  # tokens of one choice if neither the caller nor the manifest says: a long answer, or a file's edit
DESCRIPTION: Final = (
    "kind",
    "context",
    "max_output",
    "modalities",
    "tools",
)  # members that describe a model; each may be missing
_HEX: Final = re.compile("[0-9a-f]{64}")
_MOST: Final = 2**31 - 1  # tokens: what an engine can count
_WORD: Final = re.compile(r"[a-z0-9][a-z0-9_.-]{0,31}")  # a kind, a modality, or a format of tool calls
_OTHER_KEYS: Final = 8  # of the gateway; a signature may be tried with each
_MODALITIES: Final = 8  # of one model; there are text, image, audio, video and few more


class ModelKind(StrEnum):
    """What a model does with a text. Other values of a manifest are from a later version, and count as unknown."""

    GENERATE = "generate"
    EMBED = "embed"
    RERANK = "rerank"


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
        STATEMENT.check(members)
        if members.text("typ") != "lacre-root":
            raise InvalidMessage("a root statement must say typ lacre-root")
        signer = members.octets("signer", KEY_BYTES)
        return cls(signer, members.time("exp"), members.optional_octets("next_root", KEY_BYTES))


def fingerprint(config: KeyConfig) -> str:
    """Names a key; its id alone may have named an older key."""
    return b64u(hashlib.sha256(config.encode()).digest()[:12])


@dataclass(frozen=True, slots=True)
class PoolKey:
    """A public key to seal to, and the time (seconds since the epoch) after which no client should.

    receipt_key: signs the receipts of requests sealed to it; None: the pool's. They differ while a receipt key is replaced.
    """

    config: KeyConfig
    not_after: float
    receipt_key: bytes | None = None

    def members(self) -> dict[str, Any]:
        own = {} if self.receipt_key is None else {"receipt_key": b64u(self.receipt_key)}
        return {"config": b64u(self.config.encode()), "not_after": self.not_after, **own}


@dataclass(frozen=True, slots=True)
class PastReceiptKey:
    """A key that signed receipts until a time (seconds since the epoch). Kept receipts can still be checked with it."""

    key: bytes
    until: float

    @classmethod
    def parse(cls, members: Members) -> PastReceiptKey:
        return cls(members.octets("key", KEY_BYTES), members.time("until"))


@dataclass(frozen=True, slots=True)
class ModelEntry:
    """What the publisher says of a model.

    sha256: digests of the files that may be served as this model, in hex; empty: any file. signers: ids of the keys that
    signed them (OpenSSF Model Signing's `hint`: SHA-256 of the public key in PEM), in hex.

    The rest describes the model, as far as it is known. context, max_output: in tokens; of one request, and of one choice.
    modalities: what it reads, such as `text`. tools: the format in which it calls functions.
    """

    sha256: tuple[str, ...] = ()
    signers: tuple[str, ...] = ()
    kind: ModelKind | None = None
    context: int | None = None
    max_output: int | None = None
    modalities: tuple[str, ...] = ()
    tools: str | None = None

    @property
    def digests(self) -> tuple[str, ...]:
        """As a receipt names them."""
        return tuple(DIGEST + each for each in self.sha256)

    @property
    def output(self) -> int:
        """The most tokens of one choice if the caller names no limit."""
        return self.max_output or min(self.context or MAX_OUTPUT, MAX_OUTPUT)

    @property
    def is_described(self) -> bool:
        """Whether anything is known beside its files."""
        return replace(self, sha256=(), signers=()) != ModelEntry()

    def described_as(self, other: ModelEntry) -> ModelEntry:
        """With what `other` says of the model beside its files."""
        return replace(other, sha256=self.sha256, signers=self.signers)

    def members(self) -> dict[str, Any]:
        """Without what is unknown."""
        said = {
            "kind": None if self.kind is None else self.kind.value,
            "context": self.context,
            "max_output": self.max_output,
            "modalities": list(self.modalities) or None,
            "tools": self.tools,
        }
        known = {name: value for name, value in said.items() if value is not None}
        return {"sha256": list(self.sha256), "signers": list(self.signers), **known}

    @classmethod
    def parse(cls, members: Members) -> ModelEntry:
        """Raises InvalidMessage."""
        found = cls(
            members.texts("sha256"),
            members.texts("signers"),
            kind=_kind(members.text("kind") if "kind" in members else None),
            context=_tokens(members, "context"),
            max_output=_tokens(members, "max_output"),
            modalities=members.texts("modalities") if "modalities" in members else (),
            tools=members.text("tools") if "tools" in members else None,
        )
        if not all(map(_HEX.fullmatch, (*found.sha256, *found.signers))):
            raise InvalidMessage("a model's sha256 and signers must be lists of 64 hexadecimal digits in small letters")
        words = (*found.modalities, *(() if found.tools is None else (found.tools,)))
        if len(found.modalities) > _MODALITIES or not all(map(_WORD.fullmatch, words)):
            raise InvalidMessage(f"a model's modalities ({_MODALITIES} at most) and tools must be short words in small letters")
        return found


def _kind(text: str | None) -> ModelKind | None:
    return ModelKind(text) if text in frozenset(ModelKind) else None


def _tokens(members: Members, name: str) -> int | None:
    """Raises InvalidMessage."""
    if name not in members:
        return None
    count = members.count(name)
    if not 1 <= count <= _MOST:
        raise InvalidMessage(f"a model's {name} must be a number of tokens from 1 to {_MOST}")
    return count


def is_digest(text: str) -> bool:
    """Whether it names a model file as receipts do: `sha256:` and 64 hexadecimal digits in small letters."""
    return text.startswith(DIGEST) and _HEX.fullmatch(text, len(DIGEST)) is not None


@dataclass(frozen=True, slots=True)
class Pool:
    """Workers that share keys. models: by name; the first is the default. `keys`: the newest first, without those whose suite
    this version does not know. receipt_key: signs receipts, unless the key of the request names another. past_receipts: keys
    that signed receipts before.
    """

    models: Mapping[str, ModelEntry]
    keys: tuple[PoolKey, ...]
    receipt_key: bytes
    shapes: tuple[str, ...]
    past_receipts: tuple[PastReceiptKey, ...] = ()

    def receipt_key_of(self, key_id: int) -> bytes | None:
        """The key of the receipts of requests that are sealed to the key of this id. None if no such key is listed."""
        return next((key.receipt_key or self.receipt_key for key in self.keys if key.config.key_id == key_id), None)

    def members(self) -> dict[str, Any]:
        past = [{"key": b64u(one.key), "until": one.until} for one in self.past_receipts]
        return {
            "models": {name: model.members() for name, model in self.models.items()},
            "default_model": next(iter(self.models), None),  # a JSON object has no order (RFC 8259 section 4)
            "keys": [key.members() for key in self.keys],
            "receipt_key": b64u(self.receipt_key),
            "shapes": list(self.shapes),
            **({"past_receipts": past} if past else {}),
        }

    @classmethod
    def parse(cls, members: Members) -> Pool:
        keys = tuple(key for key in map(_parse_key, members.objects("keys")) if key is not None)
        receipt_key = members.octets("receipt_key", KEY_BYTES)
        past = tuple(map(PastReceiptKey.parse, members.objects("past_receipts"))) if "past_receipts" in members else ()
        return cls(_parse_models(members), keys, receipt_key, members.texts("shapes"), past)


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
    receipt_key = members.octets("receipt_key", KEY_BYTES) if "receipt_key" in members else None
    try:
        return PoolKey(KeyConfig.parse(encoded), not_after, receipt_key)
    except UnsupportedSuite:
        return None  # a future suite beside ones that we know; a pool with no known key cannot be sealed to


@dataclass(frozen=True, slots=True)
class Manifest:
    """The signed description of every pool. Times are seconds since the epoch.

    gateway_key verifies grants and audit checkpoints, and certifies nothing else. routes: by the name that an application asks
    for; clients without routes ignore them. other_gateway_keys: also valid, while the gateway's key is replaced.
    """

    issuer: str
    version: int
    issued_at: float
    expires_at: float
    gateway_key: bytes
    pools: Mapping[str, Pool]
    routes: Mapping[str, ModelRoute] = field(default_factory=dict)
    other_gateway_keys: tuple[bytes, ...] = ()

    @property
    def gateway_keys(self) -> tuple[bytes, ...]:
        """All that verify grants and audit checkpoints; first the one that gateways sign with."""
        return (self.gateway_key, *self.other_gateway_keys)

    def members(self) -> dict[str, Any]:
        others = list(map(b64u, self.other_gateway_keys))
        routes = {name: route.members() for name, route in self.routes.items()}
        return {
            "iss": self.issuer,
            "ver": self.version,
            "iat": self.issued_at,
            "exp": self.expires_at,
            "gateway_key": b64u(self.gateway_key),
            "pools": {name: pool.members() for name, pool in self.pools.items()},
            **({"routes": routes} if routes else {}),
            **({"other_gateway_keys": others} if others else {}),
        }

    @classmethod
    def parse(cls, members: Members) -> Manifest:
        """Raises InvalidMessage or NewerFormat."""
        MANIFEST.check(members)
        return cls(
            issuer=members.text("iss"),
            version=members.count("ver", EXACT),
            issued_at=members.time("iat"),
            expires_at=members.time("exp"),
            gateway_key=members.octets("gateway_key", KEY_BYTES),
            pools={name: Pool.parse(pool) for name, pool in members.named_objects("pools").items()},
            routes=routes_of(members.named_objects("routes")) if "routes" in members else {},
            other_gateway_keys=_parse_others(members) if "other_gateway_keys" in members else (),
        )


def _parse_others(members: Members) -> tuple[bytes, ...]:
    texts = members.texts("other_gateway_keys")
    if len(texts) > _OTHER_KEYS:
        raise InvalidMessage(f"the manifest must have {_OTHER_KEYS} other_gateway_keys at most")
    return tuple(Members({"key": text}, "other_gateway_keys").octets("key", KEY_BYTES) for text in texts)


@dataclass(frozen=True, slots=True)
class Document:
    """The content of `GET /v1/manifest`: the chain of root statements (each one JWS, or two at a change of root), and the
    manifest.

    beside: the chain of a root that replaced a lost one. No statement leads to it from `roots`; it names the same signer.
    """

    roots: tuple[tuple[str, ...], ...]
    manifest: str
    beside: tuple[tuple[str, ...], ...] = ()

    def encode(self) -> bytes:
        more = {"beside": self.beside} if self.beside else {}
        return json.dumps({"roots": self.roots, "manifest": self.manifest, **more}, separators=(",", ":")).encode()

    @classmethod
    def parse(cls, data: bytes) -> Document:
        if len(data) > MAX_DOCUMENT:
            raise MessageTooLarge(f"the manifest document has over {MAX_DOCUMENT} bytes")
        said = parse_object(data, "the manifest document")
        members = DOCUMENT.members(said)
        roots = members.text_lists("roots", at_most=MAX_CHAIN)
        beside = members.text_lists("beside", at_most=MAX_CHAIN) if "beside" in said else ()
        if any(len(entry) not in (1, 2) for entry in (*roots, *beside)):
            raise InvalidMessage("an entry of the chain of roots is one JWS, or two at a change")
        return cls(roots, members.text("manifest"), beside)
