"""The outer headers of a sealed request: all that policy and budget may know of it. They are parsed once, here.

Rules:
- Every one is required, and may appear once: two readings of one request must not be possible.
- A value that is not exactly of its form is refused, never repaired.
- What is said here the worker compares with the inside; the gateway itself cannot.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any, Final, Self, TypeVar

from lacre import problems
from lacre.wire.header import MAX_SEALED_REQUEST, MEDIA_TYPE_REQUEST
from lacre_gateway.http.refusal import Refusal

MAX_TOKENS: Final = 2**31 - 1
# Names of pools and models are short; whether they exist is for the manifest to say.
_NAME: Final = re.compile(r"[\x21-\x7e]{1,128}")
_COUNT: Final = re.compile(r"[1-9][0-9]{0,9}")
_ADDRESS: Final = re.compile(r"[0-9A-Za-z.:%_-]{1,64}")  # IPv4, IPv6 with a zone, or the name of a test's client
_LENGTH: Final = re.compile(r"[0-9]{1,19}")

_POOL: Final = b"lacre-pool"
_MODEL: Final = b"lacre-model"
_ACTION: Final = b"lacre-action"
_MAX_TOKENS: Final = b"lacre-max-tokens"
_SHAPE: Final = b"lacre-shape"
_REQUIRED: Final = (_POOL, _MODEL, _ACTION, _MAX_TOKENS, _SHAPE)
_READ: Final = frozenset(
    {*_REQUIRED, b"authorization", b"dpop", b"content-type", b"content-length", b"content-encoding", b"traceparent", b"expect"}
)


_T = TypeVar("_T")


def address_of(scope: Mapping[str, Any]) -> str:
    """The caller's address, by the connection or by a trusted proxy; empty where there is none.

    What a proxy passes on may be its caller's own text. What no address could be is none: it would go into logs and audit.
    """
    address: str = scope["client"][0] if scope.get("client") else ""
    return address if _ADDRESS.fullmatch(address) else ""


class Action(StrEnum):
    """What the sealed request does. `inspect`: reads what is served and counts tokens; runs no model. `http`: whatever an
    application behind a worker answers to.
    """

    CHAT = "chat"
    COMPLETE = "complete"
    EMBED = "embed"
    RERANK = "rerank"
    INSPECT = "inspect"
    HTTP = "http"


class Shape(StrEnum):
    """How the sizes and times of the answer's records are kept from telling its text."""

    NONE = "none"
    PAD = "pad"


@dataclass(frozen=True, slots=True)
class OuterHeaders:
    """The parsed headers. max_tokens: output tokens over all choices."""

    pool: str
    model: str
    action: Action
    max_tokens: int
    shape: Shape


@dataclass(frozen=True, slots=True)
class Fields:
    """The header fields of one request that the gateway reads, each at most once. Every other one is left unread."""

    values: dict[bytes, bytes] = field(repr=False)
    repeated: frozenset[bytes]

    @classmethod
    def collect(cls, headers: Iterable[tuple[bytes, bytes]]) -> Self:
        """headers: as ASGI gives them, names in lower case."""
        values: dict[bytes, bytes] = {}
        repeated = set()
        for name, value in headers:
            if name in _READ:
                if name in values:
                    repeated.add(name)
                values[name] = value
        return cls(values, frozenset(repeated))

    def authorization(self) -> bytes | None:
        """None also where there are two: neither is the one."""
        return None if b"authorization" in self.repeated else self.values.get(b"authorization")

    def proof(self) -> bytes | None:
        """The `DPoP` header; None also where there are two (RFC 9449 section 4.3, number 1)."""
        return None if b"dpop" in self.repeated else self.values.get(b"dpop")

    def traceparent(self) -> str | None:
        """The caller's place in a trace (W3C Trace Context), unread."""
        value = self.values.get(b"traceparent")
        return None if value is None or b"traceparent" in self.repeated else value.decode("latin-1")

    def check_media(self) -> int | None:
        """The length that the body says it has, in bytes; None where it says none.

        Raises Refusal unless it says that it is a sealed request of a size that is taken.
        """
        media_type = self.values.get(b"content-type", b"").strip().lower()
        if media_type != MEDIA_TYPE_REQUEST.encode() or b"content-encoding" in self.values:
            raise Refusal(problems.UNSUPPORTED_MEDIA_TYPE)
        declared = self.values.get(b"content-length")
        if declared is None:
            return None
        text = declared.decode("latin-1")
        if not _LENGTH.fullmatch(text) or b"content-length" in self.repeated:
            raise _invalid(b"content-length")
        if int(text) > MAX_SEALED_REQUEST:
            raise Refusal(problems.TOO_LARGE)
        return int(text)

    def expects(self) -> bool:
        """Whether the client sends its body only once it is told to (RFC 9110 section 10.1.1)."""
        return b"expect" in self.values

    def outer(self) -> OuterHeaders:
        """Raises Refusal."""
        return OuterHeaders(
            self._required(_POOL, _name),
            self._required(_MODEL, _name),
            self._required(_ACTION, Action),
            self._required(_MAX_TOKENS, _count),
            self._required(_SHAPE, Shape),
        )

    def _required(self, name: bytes, form: Callable[[str], _T]) -> _T:
        """Raises Refusal, which names the field."""
        if name in self.repeated:
            raise _invalid(name)
        try:
            return form(self.values[name].decode("ascii"))
        except (KeyError, ValueError) as exc:
            raise _invalid(name) from exc


def _invalid(name: bytes) -> Refusal:
    return Refusal(problems.INVALID_HEADERS, details={"header": name.decode("ascii")})


def _name(text: str) -> str:
    if not _NAME.fullmatch(text):
        raise ValueError("a name of a pool or model")
    return text


def _count(text: str) -> int:
    if not _COUNT.fullmatch(text) or int(text) > MAX_TOKENS:
        raise ValueError("Lacre-Max-Tokens")
    return int(text)
