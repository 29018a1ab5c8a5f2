"""The state of a running answer, as a token: another process or device of the same user reads the answer on with it.

Rules:
- The token is encrypted with a key of the caller's, so that it may lie in a database or a cookie. Nobody else reads it.
- It is for clients with the same root, and lives for `LIFETIME` seconds: it holds the prompt and the answer so far.
- A worker that continues it checks the tokens like those of any resumed answer (`lacre.exchange.resume`).
"""

from __future__ import annotations

import json
import secrets
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

from lacre.errors import Expired, InvalidMessage, UsageError
from lacre.exchange.request import MAX_CONTENT
from lacre.exchange.resume_marks import MEMBER
from lacre.jose.jws import b64u, b64u_decode
from lacre.runtime import arguments
from lacre.runtime.json_objects import object_in

LIFETIME: Final = 900.0  # seconds: for a page that is loaded again or a server that restarts, and not for keeping
MIN_KEY: Final = 32  # bytes of the caller's key
MAX_TOKEN: Final = 4 * MAX_CONTENT  # characters of a token that is read: a request, its answer, and their encoding
_SALT: Final = 16  # bytes, random, so that each token has a key of its own
_NONCE: Final = bytes(12)  # no key encrypts twice
_LABEL: Final = b"lacre stream state 1"
_WRONG: Final = "state: not made with this key, for another gateway, or altered: ask again"


@dataclass(frozen=True, slots=True)
class StreamState:
    """content: the request's body. resume: the member of a body that makes a worker continue the answer (docs/wire.md section
    11.2). said: the answer so far, as one delta of a chat. head: members that all of its events have in common. until: seconds
    since the epoch. pool: where the answer began; empty in a token of a version that did not say.
    """

    content: bytes = field(repr=False)
    resume: Mapping[str, Any] = field(repr=False)
    said: Mapping[str, Any] = field(repr=False)
    head: Mapping[str, Any] = field(repr=False)
    until: float
    pool: str = ""

    def seal(self, key: bytes, root: bytes) -> str:
        """root: of the client, which only such clients open it for."""
        members = {
            "content": self.content.decode(), "resume": self.resume, "said": self.said, "head": self.head, "until": self.until,
            "pool": self.pool,
        }  # fmt: skip
        salt = secrets.token_bytes(_SALT)
        return b64u(salt + _cipher(key, salt).encrypt(_NONCE, json.dumps(members).encode(), root))

    @classmethod
    def open(cls, token: str, key: bytes, root: bytes, now: float) -> StreamState:
        """now: seconds since the epoch. Raises UsageError, and Expired."""
        if len(arguments.text(token, "state")) > MAX_TOKEN:
            raise UsageError(_WRONG)
        try:
            raw = b64u_decode(token)
            told = object_in(_cipher(key, raw[:_SALT]).decrypt(_NONCE, raw[_SALT:], root)) or {}
            state = cls(
                told["content"].encode(), told["resume"], told["said"], told["head"], told["until"], told.get("pool", "")
            )
        except (InvalidMessage, InvalidTag, LookupError, TypeError, ValueError, AttributeError) as exc:
            raise UsageError(_WRONG) from exc
        if now >= state.until:
            raise Expired(f"the state of a stream lives for {LIFETIME:.0f} s, and this one is older: ask again")
        return state

    @property
    def digest(self) -> str:
        """Of the model's file."""
        return str(self.resume["digest"])

    @property
    def stays(self) -> tuple[str, str] | None:
        """The answer's pool and model."""
        return (self.pool, json.loads(self.content)["model"]) if self.pool else None

    @property
    def tokens(self) -> Sequence[int]:
        """Of the answer so far."""
        tokens: Sequence[int] = self.resume["tokens"]
        return tokens

    @property
    def sent(self) -> bytes:
        """The body of the request that goes on."""
        return json.dumps(json.loads(self.content) | {MEMBER: self.resume}, separators=(",", ":"), ensure_ascii=False).encode()

    @property
    def begun(self) -> str:
        """The data of an event that says the answer so far."""
        choice = {"index": 0, "delta": self.said, "finish_reason": None}
        return json.dumps({**self.head, "choices": [choice]})


def checked_key(key: object) -> bytes:
    """Raises UsageError."""
    if not isinstance(key, bytes) or len(key) < MIN_KEY:
        raise UsageError(f"key must be at least {MIN_KEY} random bytes, such as secrets.token_bytes(32); keep it as a secret")
    return key


def _cipher(key: bytes, salt: bytes) -> AESGCM:
    return AESGCM(HKDF(SHA256(), length=32, salt=salt, info=_LABEL).derive(key))
