"""The state of a running answer, as a token: another process or device of the same user reads the answer on with it.

Rules:
- The token is encrypted with a key of the caller's, so that it may lie in a database or a cookie. Nobody else reads it.
- It is for clients with the same root, and lives for `LIFETIME` seconds: it holds the prompt and the answer so far.
- A worker that continues it checks the tokens like those of any resumed answer (`lacre.exchange.resume`).
"""

from __future__ import annotations

import json
import secrets
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Final

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

from lacre.errors import Expired, InvalidMessage, UsageError
from lacre.exchange.request import MAX_CONTENT
from lacre.jose.jws import b64u, b64u_decode
from lacre.runtime import arguments
from lacre.runtime.json_objects import object_in

LIFETIME: Final = 900.0  # seconds: for a page that is loaded again or a server that restarts, and not for keeping
MIN_KEY: Final = 32  # bytes of the caller's key
MAX_TOKEN: Final = 4 * MAX_CONTENT  # characters of a token that is read: a request, its answer, and their encoding
_SALT: Final = 16  # bytes, random, so that each token has a key of its own
_NONCE: Final = bytes(12)  # no key encrypts twice
_LABEL: Final = b"lacre stream state 1"
_REASONING: Final = ("reasoning_content", "reasoning")  # two names of the same text
_TOLD: Final = frozenset({"role", "content", *_REASONING})  # members of a delta that another process can be told of
_WRONG: Final = "state: not made with this key, for another gateway, or altered: ask again"


@dataclass(slots=True)
class Begun:
    """The first choice of a chat so far, as its events told it.

    text, reasoning: its pieces. partly: whether there was more, such as calls of functions or probabilities.
    """

    text: list[str] = field(default_factory=list, repr=False)
    reasoning: list[str] = field(default_factory=list, repr=False)
    partly: bool = False

    def note(self, choices: Iterable[Mapping[str, Any]]) -> None:
        """choices: of an event up to a mark."""
        for choice in choices:
            delta = choice.get("delta")
            if choice.get("index", 0) != 0 or not isinstance(delta, dict):
                self.partly = True
                continue
            thought = next((delta[name] for name in _REASONING if isinstance(delta.get(name), str)), "")
            said = delta.get("content")
            self.text.append(said if isinstance(said, str) else "")
            self.reasoning.append(thought)
            others = [choice.get("logprobs"), *(value for name, value in delta.items() if name not in _TOLD)]
            self.partly = self.partly or any(others)


@dataclass(frozen=True, slots=True)
class StreamState:
    """content: the request's body. digest: of the model's file. tokens, text, reasoning: the answer so far. head: members that
    all of its events have in common. until: seconds since the epoch.
    """

    content: bytes = field(repr=False)
    digest: str
    tokens: tuple[int, ...] = field(repr=False)
    text: str = field(repr=False)
    reasoning: str = field(repr=False)
    head: Mapping[str, Any] = field(repr=False)
    until: float

    def seal(self, key: bytes, root: bytes) -> str:
        """root: of the client, which only such clients open it for."""
        members = {
            "content": self.content.decode(), "digest": self.digest, "tokens": self.tokens, "text": self.text,
            "reasoning": self.reasoning, "head": self.head, "until": self.until,
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
            asked, tokens = told["content"].encode(), tuple(told["tokens"])
            state = cls(asked, told["digest"], tokens, told["text"], told["reasoning"], told["head"], told["until"])
        except (InvalidMessage, InvalidTag, LookupError, TypeError, ValueError, AttributeError) as exc:
            raise UsageError(_WRONG) from exc
        if now >= state.until:
            raise Expired(f"the state of a stream lives for {LIFETIME:.0f} s, and this one is older: ask again")
        return state

    @property
    def sent(self) -> bytes:
        """The body of the request that goes on: with the answer's tokens so far (docs/wire.md section 11.2)."""
        member = {"resume": {"digest": self.digest, "tokens": self.tokens}}
        return json.dumps(json.loads(self.content) | member, separators=(",", ":"), ensure_ascii=False).encode()

    @property
    def begun(self) -> str:
        """The data of an event that says the answer so far."""
        thought = dict.fromkeys(_REASONING, self.reasoning) if self.reasoning else {}
        delta = {"role": "assistant", **thought, "content": self.text}
        choice = {"index": 0, "delta": delta, "finish_reason": None}
        return json.dumps({**self.head, "choices": [choice]})


def checked_key(key: object) -> bytes:
    """Raises UsageError."""
    if not isinstance(key, bytes) or len(key) < MIN_KEY:
        raise UsageError(f"key must be at least {MIN_KEY} random bytes, such as secrets.token_bytes(32); keep it as a secret")
    return key


def _cipher(key: bytes, salt: bytes) -> AESGCM:
    return AESGCM(HKDF(SHA256(), length=32, salt=salt, info=_LABEL).derive(key))
