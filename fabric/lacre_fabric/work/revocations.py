"""Revocations of tokens, as the fabric stores them. `lacre_fabric.nats.revocations` writes and reads them.

An entry contains only a digest of the token or subject: the NATS server learns no name.
"""

from __future__ import annotations

import hashlib
import json
import re
from dataclasses import dataclass
from typing import Final, Self

from lacre.errors import InvalidMessage
from lacre.jose.formats import Format
from lacre.jose.jws import b64u
from lacre.runtime.json_objects import parse_object

REVOCATION: Final = Format("revocation", "gateway")
STORES: Final = Format("mark of the stores", "gateway")
_KEY: Final = re.compile(r"[A-Za-z0-9_-]{43}")  # SHA-256 as base64url


def token_key(issuer: str, jti: str) -> str:
    """The key of one token, by its `jti`, which is unique per issuer (RFC 7519 section 4.1.7)."""
    return _digest("jti", issuer, jti)


def subject_key(issuer: str, subject: str) -> str:
    """The key of all tokens of a subject."""
    return _digest("sub", issuer, subject)


def _digest(*names: str) -> str:
    return b64u(hashlib.sha256(json.dumps(names).encode()).digest())


_MARK: Final = _digest("stores")


@dataclass(frozen=True, slots=True)
class StoreMark:
    """What the provisioner says of the fabric's stores, beside the revocations.

    lost: the stores that NATS lost and nobody has settled yet; gateways refuse every request while there are any. tokens_from:
    tokens issued up to this time are refused, because their revocations may be lost; 0: none.
    """

    lost: tuple[str, ...] = ()
    tokens_from: float = 0.0

    def encode(self) -> bytes:
        """A gateway of an older version reads it as a revocation of no token."""
        said = {"key": _MARK, "until": 0.0, "issued_until": 0.0, "lost": self.lost, "tokens_from": self.tokens_from}
        return json.dumps(said, separators=(",", ":")).encode()

    @classmethod
    def parse(cls, value: bytes) -> Self:
        """Raises InvalidMessage."""
        members = STORES.parse(value)
        return cls(members.texts("lost"), members.time("tokens_from"))


@dataclass(frozen=True, slots=True)
class Revocation:
    """Times are in seconds since the epoch. until: when the last token that it covers has expired.

    issued_until: the revocation covers tokens issued up to this time; None: all tokens.
    """

    key: str
    until: float
    issued_until: float | None = None

    def encode(self) -> bytes:
        said = {"key": self.key, "until": self.until, "issued_until": self.issued_until}
        return json.dumps(said, separators=(",", ":")).encode()

    @classmethod
    def parse(cls, value: bytes, key: str = "") -> Self:
        """key: for entries of older versions, which do not contain it. Raises InvalidMessage."""
        said = parse_object(value, "the revocation")
        members = REVOCATION.members(said)
        key = members.text("key") if "key" in said else key
        if not _KEY.fullmatch(key):
            raise InvalidMessage("a revocation of no token and no subject")
        always = "issued_until" in said and said["issued_until"] is None
        return cls(key, members.time("until"), None if always else members.time("issued_until"))
