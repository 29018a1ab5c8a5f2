"""One sealed answer: what the gateway says outside, and what opens inside. Bytes in, bytes out.

Rules:
- An answer is whole only if the response's final chunk has opened and the BHTTP message in it has ended. The content of the
  final chunk is delivered only then, and after the receipt in it was verified.
- Unsealed bytes are never taken for an answer. A refusal becomes one of our own problems, in our own words.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Final

from lacre.errors import Details, InvalidMessage, RefusedError, UnsealedResponse
from lacre.evidence.exchange_info import Facts, documented
from lacre.evidence.receipts import Receipt
from lacre.exchange.steps import Outer, Read, Steps, sent_bytes
from lacre.problems import BY_TYPE, INTERNAL, NO_GATEWAY, Problem
from lacre.problems import MEDIA_TYPE as PROBLEM_MEDIA_TYPE
from lacre.wire import bhttp
from lacre.wire.header import MEDIA_TYPE_RESPONSE
from lacre.wire.ohttp import ResponseOpener

MAX_PROBLEM: Final = 64 * 1024  # bytes read of a problem document, outer or sealed; ours have some hundred
_OF_PROXIES: Final = frozenset({502, 503, 504})  # proxies send these, in their own words, if a gateway does not answer


@dataclass(frozen=True, slots=True)
class AnswerHead:
    """The inner status and headers of the sealed answer."""

    status: int
    headers: tuple[tuple[str, str], ...]

    def get(self, name: str) -> str:
        """The first value of a header, `name` in lower case; empty if there is none."""
        return next((value for key, value in self.headers if key == name), "")

    @property
    def media_type(self) -> str:
        """Without its parameters, in lower case."""
        return self.get("content-type").partition(";")[0].strip().lower()


@dataclass(frozen=True, slots=True)
class GatewayRefusal:
    """The gateway refused the request. Nobody signed this. details: what the problem document says beside its type."""

    problem: Problem
    retry_after: float | None
    facts: Facts
    details: Details = field(default_factory=dict)

    def exception(self) -> RefusedError:
        return self.problem.exception(self.retry_after, self.details)


Trailers = tuple[tuple[str, str], ...]


class Opening:
    """Opens one sealed answer as its bytes arrive: first the head, then the pieces of the body, then the trailers.

    Pieces wait here until they are taken. verify: makes the receipt from the head and the trailers, or raises; it returns None
    if none is due.
    """

    def __init__(self, opener: ResponseOpener, facts: Facts, verify: Callable[[AnswerHead, Trailers], Receipt | None]) -> None:
        self._opener = opener
        self._verify = verify
        self._decoder = bhttp.ResponseDecoder()
        self._pending: list[bytes] = []
        self._head: AnswerHead | None = None
        self.ended = False
        self.facts = facts

    def feed(self, data: bytes | None) -> None:
        """Takes the next bytes of the outer body; None at its end.

        Raises TruncatedStream if the final chunk had not opened by then or the answer in it was not whole. Raises
        InvalidReceipt or WrongModel if the answer was whole and its receipt does not hold.
        """
        with documented(self.facts):
            self._feed(data)

    def _feed(self, data: bytes | None) -> None:
        for record in self._opener.close() if data is None else self._opener.feed(data):
            self._take(self._decoder.feed(record))
        if data is None:
            self._take(self._decoder.close())
            self.facts.receipt = self._verify(self.head, self.facts.trailers)
            self.ended = True

    def _take(self, events: Sequence[bhttp.Event]) -> None:
        for event in events:
            match event:
                case bhttp.ResponseHead(informational=False):
                    self._head = _uncoded(AnswerHead(event.status, event.headers))
                case bhttp.Data():
                    self._pending.append(event.content)
                case bhttp.End():
                    self.facts.trailers = event.trailers

    @property
    def ready(self) -> bool:
        """Whether enough has arrived to act on: the head, and the whole body of a sealed problem document."""
        if self._head is None:
            return self.ended
        is_problem = self._head.get("content-type") == PROBLEM_MEDIA_TYPE
        return not is_problem or self.ended or sum(map(len, self._pending)) > MAX_PROBLEM

    @property
    def head(self) -> AnswerHead:
        if self._head is None:
            raise InvalidMessage("the sealed answer has no head")
        return self._head

    @property
    def problem_type(self) -> str | None:
        """The type of the sealed problem document, if the answer is one."""
        return Problem.type_in(b"".join(self._pending)) if self.head.get("content-type") == PROBLEM_MEDIA_TYPE else None

    def take(self) -> list[bytes]:
        """The pieces of the body that opened since the last call."""
        pieces, self._pending = self._pending, []
        return pieces


def read_all(limit: int) -> Steps[bytes]:
    """Up to `limit` bytes of the last response."""
    content = bytearray()  # grows in place: a peer may send one byte at a time
    while len(content) < limit and (data := sent_bytes((yield Read()))) is not None:
        content += data
    return bytes(content[:limit])


def _uncoded(head: AnswerHead) -> AnswerHead:
    """The head, if the answer is not compressed. No worker was asked to compress, and one compressed byte may expand without
    bound. Raises InvalidMessage.
    """
    codings = (value.strip().lower() for name, value in head.headers if name == "content-encoding")
    if any(coding not in ("", "identity") for coding in codings):  # over all fields: an HTTP library applies them all
        raise InvalidMessage(
            "the worker's answer is compressed, and no client asks for that: switch compression off in the app that it serves"
        )
    return head


def problem_of(outer: Outer, body: bytes) -> Problem:
    """The problem of our own table that the gateway named, or else one of the same status. Nobody signed the gateway's words,
    so they are never shown.
    """  # fmt: skip
    named = BY_TYPE.get(Problem.type_in(body) or "")
    if named is not None:
        return named
    if outer.status in _OF_PROXIES:
        return NO_GATEWAY
    return next((problem for problem in BY_TYPE.values() if problem.status == outer.status), INTERNAL)


def check_sealed(outer: Outer) -> None:
    if outer.content_type.partition(";")[0].strip().lower() != MEDIA_TYPE_RESPONSE:
        raise UnsealedResponse("the answer is not sealed, so none of it was read: check the gateway's address")
