"""The outer headers of a sealed request: all that policy and budget may know of it. Parsed once, here.

Rules:
- Each must appear once: a request must have only one reading. All but `lacre-max-tokens-default` and `lacre-affinity` are
  required.
- A malformed value is refused, never repaired.
- The worker compares these values with the sealed ones; the gateway itself cannot.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import field
from enum import StrEnum
from typing import Any, Final, Self, TypeVar

from lacre import problems
from lacre.jose.jws import b64u_decode
from lacre.runtime.records import record
from lacre.wire import outer
from lacre.wire.header import MAX_SEALED_REQUEST, MEDIA_TYPE_REQUEST
from lacre_gateway.http.refusal import Refusal

_ADDRESS: Final = re.compile(r"[0-9A-Za-z.:%_-]{1,64}")  # IPv4, IPv6 with a zone, or the name of a test's client
_LENGTH: Final = re.compile(r"[0-9]{1,19}")

_REQUIRED: Final = tuple(name.encode() for name in (outer.POOL, outer.MODEL, outer.ACTION, outer.CEILING, outer.SHAPE))
_POOL, _MODEL, _ACTION, _CEILING, _SHAPE = _REQUIRED
_IS_DEFAULT: Final = outer.CEILING_IS_DEFAULT.encode()
_AFFINITY: Final = outer.AFFINITY.encode()
_READ: Final = frozenset(
    {
        *_REQUIRED, _IS_DEFAULT, _AFFINITY, b"authorization", b"dpop", b"content-type", b"content-length", b"content-encoding",
        b"traceparent",
    }
)  # fmt: skip


_T = TypeVar("_T")


def address_of(scope: Mapping[str, Any]) -> str:
    """The caller's address, from the connection or a trusted proxy; empty if there is none.

    A proxy may pass on its caller's own text. Text that cannot be an address counts as none, because it would go into logs and
    audit.
    """
    return as_address(scope["client"][0] if scope.get("client") else "")


def as_address(text: str) -> str:
    """The text; empty if it cannot be an address."""
    return text if _ADDRESS.fullmatch(text) else ""


class Action(StrEnum):
    """What the sealed request does. `explain`: which parts of a prompt an answer rests on. `lens`: also what the model would
    say after each layer. `inspect`: lists models and counts tokens; runs no model. `http`: any request to an application behind
    a worker.
    """

    CHAT = "chat"
    COMPLETE = "complete"
    EMBED = "embed"
    RERANK = "rerank"
    EXPLAIN = "explain"
    LENS = "lens"
    INSPECT = "inspect"
    HTTP = "http"


class Shape(StrEnum):
    """How the sizes and times of an answer's records are kept from revealing its text."""

    NONE = "none"
    PAD = "pad"


_ACTIONS: Final = {action.value: action for action in Action}
_SHAPES: Final = {shape.value: shape for shape in Shape}


@record(frozen=True, slots=True)
class OuterHeaders:
    """The parsed headers. max_tokens: output tokens over all choices. is_default: whether the caller named no such ceiling, so
    that a lower one may be granted. affinity: equal for requests of one conversation, if the client says so.
    """

    pool: str
    model: str
    action: Action
    max_tokens: int
    shape: Shape
    is_default: bool = False
    affinity: bytes | None = field(default=None, repr=False)


@record(frozen=True, slots=True)
class Fields:
    """The header fields of one request that the gateway reads, each at most once. All others are ignored."""

    values: dict[bytes, bytes] = field(repr=False)
    repeated: frozenset[bytes]

    @classmethod
    def collect(cls, headers: Iterable[tuple[bytes, bytes]]) -> Self:
        """headers: from ASGI, names in lower case."""
        values: dict[bytes, bytes] = {}
        repeated = set()
        for name, value in headers:
            if name in _READ:
                if name in values:
                    repeated.add(name)
                values[name] = value
        return cls(values, frozenset(repeated))

    def authorization(self) -> bytes | None:
        """None also if there are two, because then neither counts."""
        return None if b"authorization" in self.repeated else self.values.get(b"authorization")

    def proof(self) -> bytes | None:
        """The `DPoP` header; None also if there are two (RFC 9449 section 4.3, number 1)."""
        return None if b"dpop" in self.repeated else self.values.get(b"dpop")

    def traceparent(self) -> str | None:
        """The caller's trace context (W3C Trace Context), not parsed."""
        value = self.values.get(b"traceparent")
        return None if value is None or b"traceparent" in self.repeated else value.decode("latin-1")

    def for_trace(self) -> Self:
        """The trace context alone, which is read after the request's end."""
        value = self.values.get(b"traceparent")
        return type(self)({} if value is None else {b"traceparent": value}, self.repeated)

    def check_media(self) -> int | None:
        """The announced length of the body in bytes; None if it is not announced.

        Raises Refusal unless the headers announce a sealed request of an acceptable size.
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

    def outer(self) -> OuterHeaders:
        """Raises Refusal."""
        return OuterHeaders(
            self._required(_POOL, _name),
            self._required(_MODEL, _name),
            self._required(_ACTION, _ACTIONS.__getitem__),
            self._required(_CEILING, _count),
            self._required(_SHAPE, _SHAPES.__getitem__),
            _IS_DEFAULT in self.values and self._required(_IS_DEFAULT, _yes),
            self._required(_AFFINITY, _affinity) if _AFFINITY in self.values else None,
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
    if not outer.is_name(text):
        raise ValueError("not a name of a pool or model")
    return text


def _yes(text: str) -> bool:
    if text not in (outer.YES, outer.NO):
        raise ValueError(outer.CEILING_IS_DEFAULT)
    return text == outer.YES


def _affinity(text: str) -> bytes:
    if not outer.is_affinity(text):
        raise ValueError(outer.AFFINITY)
    return b64u_decode(text)


def _count(text: str) -> int:
    if (ceiling := outer.ceiling_in(text)) is None:
        raise ValueError(outer.CEILING)
    return ceiling
