"""A streamed chat answer: iterate over its text; once it has ended, it knows its usage and its receipt."""

from __future__ import annotations

from collections.abc import AsyncGenerator, AsyncIterator, Generator, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Final, Self

import httpx2

from lacre.audit import AuditProof
from lacre.errors import InvalidAudit, InvalidMessage, TruncatedStream, UsageError
from lacre.facts import Facts, Part
from lacre.receipts import Receipt
from lacre.recount import Recount, Tokenizer, Written
from lacre.reply import TokenUsage, api_error, checked_usage, claimed, json_object
from lacre.verification import Verification

DONE: Final = "[DONE]"  # what ends a stream of events in OpenAI's format


@contextmanager
def events_of(response: httpx2.Response) -> Iterator[httpx2.EventSource]:
    """Reads an answer's events. Raises InvalidMessage if it is no stream of events, or one event is above httpx2's limit."""
    # The format is UTF-8 (WHATWG HTML section 9.2.5). A codec that the answer names could inflate it, or fail in its own way.
    response.encoding = "utf-8"
    try:
        yield httpx2.EventSource(response)
    except httpx2.SSEError as exc:
        raise InvalidMessage("the worker's answer is not a stream of events, or holds one that is too large") from exc


@dataclass(frozen=True, slots=True)
class _Whole:
    """What is known of an answer once it has ended."""

    usage: TokenUsage
    receipt: Receipt
    facts: Facts


class Deltas:
    """The text in a stream of chat completion chunks, event by event, and what they say beside it."""

    def __init__(self) -> None:
        self._done = False
        self._usage: dict[str, Any] | None = None
        self._parts: list[str] = []
        self.written = Written()
        self.id = self.model = ""
        self.finish_reason: str | None = None
        self.facts: Facts | None = None  # from the head of the answer on
        self.left = False  # whether the rest was given up
        self._whole: _Whole | None = None

    @property
    def text(self) -> str:
        """The first choice's, so far."""
        return "".join(self._parts)

    def feed(self, data: str) -> str:
        """The text that one event adds to the first choice; mostly some characters, sometimes none."""
        if self._done or data == DONE:
            self._done = True
            return ""
        chunk = json_object(data.encode())
        if "error" in chunk:
            raise api_error(500, data.encode())
        try:
            added = "".join(self._choice(choice) for choice in chunk["choices"])
        except (KeyError, TypeError, AttributeError) as exc:
            raise InvalidMessage("an event in the answer is not a chat completion chunk") from exc
        self.id, self.model = str(chunk.get("id") or self.id), str(chunk.get("model") or self.model)
        self._usage = chunk.get("usage") or self._usage
        self._parts.append(added)
        return added

    def _choice(self, choice: dict[str, Any]) -> str:
        self.written.add(choice, choice["delta"])
        if choice.get("index", 0) != 0:
            return ""
        if choice.get("finish_reason"):
            self.finish_reason = str(choice["finish_reason"])
        return choice["delta"].get("content") or ""

    def close(self, facts: Facts) -> None:
        """The stream has ended. Raises TruncatedStream before `[DONE]`, and InvalidReceipt where usage and receipt differ."""
        if not self._done or facts.receipt is None:
            raise TruncatedStream("the answer ended before its last event: what came so far is not the whole of it")
        self._whole = _Whole(checked_usage(self._usage, claimed(facts, facts.receipt)), facts.receipt, facts)

    @property
    def whole(self) -> _Whole:
        if self._whole is None and self.left:
            raise UsageError("the answer was given up: only one that was read to its last piece has its usage and receipt")
        if self._whole is None:
            raise UsageError("the answer has not ended: ask for this after its last piece")
        return self._whole


class _Answer:
    """What a stream knows of its answer. `usage` and `receipt` are a whole answer's alone, and raise UsageError before its end.

    What is known of the exchange (`facts`, `verification`, `attempts`, `parts`, `receipts`) is there from the first piece on,
    and stays there when the rest is given up.
    """

    _deltas: Deltas

    @property
    def text(self) -> str:
        """What came so far."""
        return self._deltas.text

    @property
    def id(self) -> str:
        return self._deltas.id

    @property
    def model(self) -> str:
        return self._deltas.model

    @property
    def finish_reason(self) -> str | None:
        """OpenAI's `stop`, `length` and so on; None so far."""
        return self._deltas.finish_reason

    @property
    def usage(self) -> TokenUsage:
        return self._deltas.whole.usage

    @property
    def receipt(self) -> Receipt:
        """The pool's signed word on what was used, verified, and equal to `usage`; of a resumed answer, on its last request."""
        return self._deltas.whole.receipt

    @property
    def receipts(self) -> tuple[Receipt, ...]:
        """Of every request that the answer took and that ended in order; one whose worker was lost brings none."""
        return self.facts.receipts

    @property
    def parts(self) -> tuple[Part, ...]:
        """What the requests took that broke off: their prompt was paid for, and `usage` counts it too."""
        return tuple(self.facts.parts)

    @property
    def facts(self) -> Facts:
        """What is known of the exchange: the KEM, the sizes, the attempts."""
        if self._deltas.facts is None:
            raise UsageError("the answer has not begun: ask for this after its first piece")
        return self._deltas.facts

    @property
    def audit(self) -> AuditProof:
        """The gateway's proof, verified, that it recorded this request; worth keeping."""
        if self.facts.audit is None:
            raise InvalidAudit("the answer came without a proof that it was recorded")
        return self.facts.audit

    @property
    def verification(self) -> Verification:
        """What was checked, and with what."""
        return self.facts.verification

    @property
    def attempts(self) -> int:
        """How often the request was sealed and sent."""
        return self.facts.attempts

    def recount(self, tokenizer: Tokenizer | None = None) -> Recount:
        """The answer's tokens counted again, as far as that can be done here. tokenizer: how many tokens a text has."""
        return self._deltas.written.recount(self.usage.completion, tokenizer)


class ChatStream(_Answer, Iterator[str]):
    """The pieces of an answer's text. The request is sent when the first is asked for; `close` gives up the rest."""

    def __init__(self, pieces: Generator[str, None, None], deltas: Deltas) -> None:
        self._pieces = pieces
        self._deltas = deltas

    def __next__(self) -> str:
        return next(self._pieces)

    def close(self) -> None:
        self._deltas.left = True
        self._pieces.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, _type: type[BaseException] | None, _error: BaseException | None, _trace: TracebackType | None) -> None:
        self.close()


class AsyncChatStream(_Answer, AsyncIterator[str]):
    """The async twin of `ChatStream`."""

    def __init__(self, pieces: AsyncGenerator[str, None], deltas: Deltas) -> None:
        self._pieces = pieces
        self._deltas = deltas

    async def __anext__(self) -> str:
        return await anext(self._pieces)

    async def aclose(self) -> None:
        self._deltas.left = True
        await self._pieces.aclose()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, _type: type[BaseException] | None, _error: BaseException | None, _trace: TracebackType | None
    ) -> None:
        await self.aclose()
