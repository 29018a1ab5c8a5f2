"""What a streamed chat answer says: put together event by event, and known at any time.

`stream_async` and `stream_sync` have the classes that read it.

Rules:
- What came is never dropped: text, calls, every choice stay in the stream, whatever ended it.
- What is not known (yet, or never) is None or empty, and never an error: a program that leaves an answer, or is cancelled,
  reads what there is.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Final

import httpx2

from lacre.chat.choices import Choice, Growing, StreamEvent, ToolCall
from lacre.chat.reply import Reply, TokenUsage, api_error, checked_usage, claimed, json_object
from lacre.errors import InvalidMessage, TruncatedStream, UsageError
from lacre.evidence.audit_proof import AuditProof
from lacre.evidence.exchange_info import Facts, Part
from lacre.evidence.receipts import Receipt
from lacre.evidence.recount import Recount, Tokenizer, Written
from lacre.evidence.verification import Verification
from lacre.runtime.forks import StaysInProcess

DONE: Final = "[DONE]"  # what ends a stream of events in OpenAI's format
# Why a stream that is being read cannot be closed.
CANCEL_TASK: Final = "another task reads this answer: cancel that task instead"
LEAVE_TO_THREAD: Final = "another thread reads this answer: let it end, or let that thread close it"
_HEAD: Final = ("created", "system_fingerprint", "service_tier")  # of a chunk: what a whole answer says too


@contextmanager
def events_of(response: httpx2.Response) -> Iterator[httpx2.EventSource]:
    """Reads an answer's events. Raises InvalidMessage if it is no stream of events, or one event is above httpx2's limit."""
    # The format is UTF-8 (WHATWG HTML section 9.2.5), after a byte order mark or none. A codec that the answer names could
    # inflate it, or fail in its own way.
    response.encoding = "utf-8-sig"
    try:
        yield httpx2.EventSource(response)
    except httpx2.SSEError as exc:
        raise InvalidMessage("the worker's answer is not a stream of events, or holds one that is too large") from exc


class Deltas:
    """A stream of chat completion chunks, event by event, put together.

    facts: of the exchange, from the head of the answer on. left: whether the program gave up the rest.
    usage, receipt: of an answer that ended whole, verified; None until then.
    """

    def __init__(self) -> None:
        self._done = False
        self._told: dict[str, Any] | None = None  # the usage, as the worker says
        self._choices: dict[int, Growing] = {}
        self._head: dict[str, Any] = {}
        self.written = Written()
        self.id = self.model = ""
        self.facts: Facts | None = None
        self.left = False
        self.usage: TokenUsage | None = None
        self.receipt: Receipt | None = None

    @property
    def choices(self) -> tuple[Choice, ...]:
        """As far as they came."""
        growing = sorted(self._choices.items())
        return tuple(Choice.parse(each.whole(), index) for index, each in growing)

    @property
    def first(self) -> Choice | None:
        return Choice.parse(self._choices[0].whole(), 0) if 0 in self._choices else None

    @property
    def text(self) -> str:
        """The first choice's, so far."""
        return "" if self.first is None else self.first.text

    @property
    def finish_reason(self) -> str | None:
        return self._choices[0].finish_reason if 0 in self._choices else None

    def feed(self, data: str) -> list[StreamEvent]:
        """What one event of the stream says; sometimes nothing. Raises InvalidMessage, or ApiError for the worker's error."""
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
        """The stream has ended. Raises TruncatedStream before `[DONE]`, and InvalidReceipt where usage and receipt differ."""
        if not self._done or facts.receipt is None:
            raise TruncatedStream("the answer ended before its last event: what came so far is not the whole of it")
        self.usage = checked_usage(self._told, claimed(facts, facts.receipt))
        self.receipt = facts.receipt

    def reply(self) -> Reply:
        """The whole answer. Raises UsageError where it did not end whole, InvalidMessage where no choice came."""
        if self.usage is None or self.facts is None:
            why = "it was given up" if self.left else "it ended with an error, which was raised"
            raise UsageError(f"there is no whole answer, for {why}: the stream's `text` and `choices` hold what came")
        body = {"id": self.id, "object": "chat.completion", **self._head, "model": self.model}
        choices = [self._choices[index].whole() for index in sorted(self._choices)]
        return Reply.of({**body, "choices": choices, "usage": self._told}, self.facts)


class StreamedAnswer(StaysInProcess):
    """What a stream knows of its answer, at any time: what is not known is None, or empty.

    `usage` and `receipt` are a whole answer's, verified; None until it has ended whole. What is known of the exchange
    (`facts`, `verification`, `attempts`, `parts`, `receipts`, `audit`) is there from the first event on, and stays.
    """

    _holds = "an answer that is on its way"
    _deltas: Deltas

    def __repr__(self) -> str:
        state = "whole" if self._deltas.usage is not None else "given up" if self._deltas.left else "not whole"
        return f"<{type(self).__name__} {self.id or 'without an id'}, {state}>"

    @property
    def text(self) -> str:
        """The first choice's, so far."""
        return self._deltas.text

    @property
    def tool_calls(self) -> tuple[ToolCall, ...]:
        """The first choice's, so far: the last one's arguments may be cut short until the answer has ended."""
        return () if self._deltas.first is None else self._deltas.first.tool_calls

    @property
    def choices(self) -> tuple[Choice, ...]:
        """All choices, as far as they came."""
        return self._deltas.choices

    @property
    def message(self) -> Mapping[str, Any] | None:
        """The first choice's, to be appended to `messages` for the next turn."""
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
        """The pool's signed word on what was used, verified, and equal to `usage`; of a resumed answer, on its last request."""
        return self._deltas.receipt

    @property
    def receipts(self) -> tuple[Receipt, ...]:
        """Of every request that the answer took and that ended in order; one whose worker was lost brings none."""
        return () if self.facts is None else self.facts.receipts

    @property
    def parts(self) -> tuple[Part, ...]:
        """What the requests took that broke off: their prompt was paid for, and `usage` counts it too."""
        return () if self.facts is None else tuple(self.facts.parts)

    @property
    def facts(self) -> Facts | None:
        """What is known of the exchange: the KEM, the sizes, the attempts."""
        return self._deltas.facts

    @property
    def audit(self) -> AuditProof | None:
        """The gateway's proof, verified, that it recorded this request; worth keeping."""
        return None if self.facts is None else self.facts.audit

    @property
    def verification(self) -> Verification | None:
        """What was checked, and with what."""
        return None if self.facts is None else self.facts.verification

    @property
    def attempts(self) -> int:
        """How often the request was sealed and sent, as far as that is known; 0 before the answer begins."""
        return 0 if self.facts is None else self.facts.attempts

    def recount(self, tokenizer: Tokenizer | None = None) -> Recount | None:
        """The answer's tokens counted again, as far as that can be done here. tokenizer: how many tokens a text has.

        None unless the answer has ended whole.
        """
        return None if self.usage is None else self._deltas.written.recount(self.usage.completion, tokenizer)
