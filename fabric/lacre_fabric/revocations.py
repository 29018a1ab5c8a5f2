"""What was revoked before its time, as it stands on the fabric. `nats_revocations` writes and reads it.

An entry names a token or a subject by digest: the message server learns no name.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from typing import Self

from lacre.errors import InvalidMessage
from lacre.jws import b64u
from lacre.members import Members


def token_key(issuer: str, jti: str) -> str:
    """Names one token, by its `jti` (RFC 7519 section 4.1.7): unique for its issuer alone."""
    return _digest("jti", issuer, jti)


def subject_key(issuer: str, subject: str) -> str:
    """Names whom tokens speak for."""
    return _digest("sub", issuer, subject)


def _digest(*names: str) -> str:
    return b64u(hashlib.sha256(json.dumps(names).encode()).digest())


@dataclass(frozen=True, slots=True)
class Revocation:
    """Times in seconds since the epoch. until: when no token that it is about can be valid any more.

    issued_until: tokens that were issued later are not meant; None where all are.
    """

    key: str
    until: float
    issued_until: float | None = None

    def encode(self) -> bytes:
        return json.dumps({"until": self.until, "issued_until": self.issued_until}, separators=(",", ":")).encode()

    @classmethod
    def parse(cls, key: str, value: bytes) -> Self:
        """Raises InvalidMessage."""
        try:
            said = json.loads(value)
        except (ValueError, RecursionError) as exc:
            raise InvalidMessage("a revocation that is not JSON") from exc
        members = Members(said, "the revocation")
        always = "issued_until" in said and said["issued_until"] is None
        return cls(key, members.time("until"), None if always else members.time("issued_until"))
