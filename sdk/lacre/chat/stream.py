"""The content of a streamed chat answer, joined event by event, and readable at any time.

`stream_async` and `stream_sync` have the classes that read it.

Rules:
- Nothing received is dropped: text, calls and every choice stay in the stream, however it ends.
- A value that is not known (yet, or ever) is None or empty, and never an error. So a program that leaves an answer, or is
  cancelled, can read the part so far.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from decimal import Decimal
from typing import Any, Final

import httpx2

from lacre.chat.choices import Choice, Growing, StreamEvent, ToolCall
from lacre.chat.reply import Reply, TokenUsage, api_error, checked_usage, claimed, json_object
from lacre.chat.structured import Schema
from lacre.errors import InvalidMessage, TruncatedStream, UsageError
from lacre.evidence.audit_proof import AuditProof
from lacre.evidence.exchange_info import Facts, Part
from lacre.evidence.receipts import Receipt
from lacre.evidence.recount import Recount, Tokenizer, Written
from lacre.evidence.verification import Verification
from lacre.exchange.resume import ResumableAnswer
from lacre.exchange.stream_state import checked_key
from lacre.runtime.forks import StaysInProcess

DONE: Final = "[DONE]"  # ends a stream of events in OpenAI's format
# The error's text when a program closes a stream that is being read.
CANCEL_TASK: Final = "another task reads this answer: cancel that task instead"
LEAVE_TO_THREAD: Final = "another thread reads this answer: let it end, or let that thread close it"
_HEAD: Final = ("created", "system_fingerprint", "service_tier")  # members of a chunk that a whole answer has too


@contextmanager
def events_of(response: httpx2.Response) -> Iterator[httpx2.EventSource]:
    """Reads an answer's events. Raises InvalidMessage if it is not an event stream, or one event exceeds httpx2's limit."""
    # The format is UTF-8 (WHATWG HTML section 9.2.5), with or without a byte order mark. A codec that the answer names could
    # inflate it, or fail in its own way.
    response.encoding = "utf-8-sig"
    try:
        yield httpx2.EventSource(response)
    except httpx2.SSEError as exc:
        raise InvalidMessage("the worker's answer is not a stream of events, or holds one that is too large") from exc


class Deltas:
    """A stream of chat completion chunks, joined event by event.

    facts, received: of the exchange, from the head of the answer on. left: whether the program gave up the rest. usage,
    receipt: of an answer that ended whole, verified; None until then.
    """

    def __init__(self, schema: Schema | None = None) -> None:
        """schema: the request's, if it had one."""
        self._schema = schema
        self._done = False
        self._told: dict[str, Any] | None = None  # the usage that the worker claims
        self._choices: dict[int, Growing] = {}
        self._head: dict[str, Any] = {}
        self.written = Written()
        self.id = self.model = ""
        self.facts: Facts | None = None
        self.received: ResumableAnswer | None = None
        self.left = False
        self.usage: TokenUsage | None = None
        self.receipt: Receipt | None = None

    @property
    def choices(self) -> tuple[Choice, ...]:
        """The choices so far."""
        growing = sorted(self._choices.items())
        return tuple(Choice.parse(each.whole(), index, self._schema) for index, each in growing)

    @property
    def first(self) -> Choice | None:
        return Choice.parse(self._choices[0].whole(), 0, self._schema) if 0 in self._choices else None

    @property
    def text(self) -> str:
        """The first choice's text so far."""
        return "" if self.first is None else self.first.text

    @property
    def finish_reason(self) -> str | None:
        return self._choices[0].finish_reason if 0 in self._choices else None

    def feed(self, data: str) -> list[StreamEvent]:
        """The events in one event of the stream; sometimes none. Raises InvalidMessage, or ApiError for the worker's error."""
        if self._done or data == DONE:
            self._done = True
            return []
        chunk = json_object(data.encode())
        if "error" in chunk:
            raise api_error(500, data.encode())
        try:
            events = [event for choice in chunk["choices"] for event in self._choice(choice)]
        except (LookupError, TypeError, AttributeError, ValueError, ArithmeticError) as exc:
            raise InvalidMessage("an event in the answer is not a chat completion chunk") from exc
        self.id, self.model = str(chunk.get("id") or self.id), str(chunk.get("model") or self.model)
        self._head |= {name: chunk[name] for name in _HEAD if chunk.get(name) is not None}
        self._told = chunk.get("usage") or self._told
        return events

    def _choice(self, choice: dict[str, Any]) -> list[StreamEvent]:
        index = choice.get("index", 0)
        if isinstance(index, bool) or not isinstance(index, int) or index < 0:
            raise TypeError
        events = self._choices.setdefault(index, Growing(index)).add(choice)
        self.written.add(choice, choice["delta"])
        return events

    def close(self, facts: Facts) -> None:
        """The stream has ended. Raises TruncatedStream before `[DONE]`, and InvalidReceipt if usage and receipt differ."""
        if not self._done or facts.receipt is None:
            raise TruncatedStream("the answer ended before its last event: the received part is not the whole answer")
        self.usage = checked_usage(self._told, claimed(facts, facts.receipt))
        self.receipt = facts.receipt

    def reply(self) -> Reply:
        """The whole answer. Raises UsageError if it did not end whole, InvalidMessage if it has no choice."""
        if self.usage is None or self.facts is None:
            why = "it was given up" if self.left else "it ended with an error, which was raised"
            raise UsageError(
                f"there is no whole answer, because {why}: the stream's `text` and `choices` hold the received part"
            )
        body = {"id": self.id, "object": "chat.completion", **self._head, "model": self.model}
        choices = [self._choices[index].whole() for index in sorted(self._choices)]
        return Reply.of({**body, "choices": choices, "usage": self._told}, self.facts, self._schema)


class StreamedAnswer(StaysInProcess):
    """The known part of an answer, at any time: unknown values are None, or empty.

    `usage` and `receipt` are those of a whole answer, verified; None until it has ended whole. The facts of the exchange
    (`facts`, `verification`, `attempts`, `parts`, `receipts`, `audit`) exist from the first event on, and stay.
    """

    _holds = "an unfinished answer"
    _deltas: Deltas

    def __repr__(self) -> str:
        state = "whole" if self._deltas.usage is not None else "given up" if self._deltas.left else "not whole"
        return f"<{type(self).__name__} {self.id or 'without an id'}, {state}>"

    @property
    def text(self) -> str:
        """The first choice's text so far."""
        return self._deltas.text

    @property
    def tool_calls(self) -> tuple[ToolCall, ...]:
        """The first choice's calls so far: the last one's arguments may be cut short until the answer has ended."""
        return () if self._deltas.first is None else self._deltas.first.tool_calls

    @property
    def choices(self) -> tuple[Choice, ...]:
        """All choices so far."""
        return self._deltas.choices

    @property
    def message(self) -> Mapping[str, Any] | None:
        """The first choice's message, to append to `messages` for the next turn."""
        return None if self._deltas.first is None else self._deltas.first.message

    @property
    def id(self) -> str:
        return self._deltas.id

    @property
    def model(self) -> str:
        return self._deltas.model

    @property
    def finish_reason(self) -> str | None:
        """OpenAI's `stop`, `length`, `tool_calls` and so on, of the first choice; None so far."""
        return self._deltas.finish_reason

    @property
    def usage(self) -> TokenUsage | None:
        return self._deltas.usage

    @property
    def receipt(self) -> Receipt | None:
        """The pool's signed statement of the usage, verified, and equal to `usage`; for a resumed answer, of its last
        request.
        """
        return self._deltas.receipt

    @property
    def cost(self) -> Decimal | None:
        """Of a whole answer, as in `Reply`; None until it has ended whole."""
        return None if self.facts is None or self.usage is None else self.facts.cost

    @property
    def receipts(self) -> tuple[Receipt, ...]:
        """The receipts of all requests that ended properly; a request whose worker was lost has none."""
        return () if self.facts is None else self.facts.receipts

    @property
    def parts(self) -> tuple[Part, ...]:
        """The usage of requests that broke off: their prompts were paid for, and `usage` includes them."""
        return () if self.facts is None else tuple(self.facts.parts)

    @property
    def facts(self) -> Facts | None:
        """The facts of the exchange: the KEM, the sizes, the attempts."""
        return self._deltas.facts

    @property
    def audit(self) -> AuditProof | None:
        """The gateway's verified proof that it recorded this request; worth keeping."""
        return None if self.facts is None else self.facts.audit

    @property
    def verification(self) -> Verification | None:
        """Every check of the answer, with its keys."""
        return None if self.facts is None else self.facts.verification

    @property
    def attempts(self) -> int:
        """How often the request was sealed and sent, as far as known; 0 before the answer begins."""
        return 0 if self.facts is None else self.facts.attempts

    def state(self, key: bytes) -> str:
        """A token with which another process or device of the same user continues this answer: `client.continue_stream`.

        key: at least 32 random bytes, which encrypt the token. It lives for 900 s. Raises UsageError if the answer has not
        begun, has ended, or cannot be continued: it has several choices.
        """
        secret, answer = checked_key(key), self._deltas.received
        if answer is None:
            raise UsageError("the answer has not begun: read its first piece first")
        return answer.state().seal(secret, answer.root)

    def recount(self, tokenizer: Tokenizer | None = None) -> Recount | None:
        """Counts the answer's tokens again, as far as a client can. tokenizer: returns the number of tokens of a text.

        None unless the answer has ended whole.
        """
        return None if self.usage is None else self._deltas.written.recount(self.usage.completion, tokenizer)
