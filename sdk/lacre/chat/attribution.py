"""Which parts of a prompt an answer rests on, and how surprising each of its tokens was (docs/explain.md).

Rules:
- A part is a text with an id. In a message it is a content part; the worker leaves out one after the other.
- An attribution exists only whole, opened and paid for, like a chat's reply.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Final

import httpx2

from lacre.chat.reply import TokenUsage, checked_json, checked_usage, claimed, facts_of
from lacre.chat.request import Messages, turns_of
from lacre.errors import InvalidMessage, InvalidReceipt, UsageError
from lacre.evidence.audit_proof import AuditProof
from lacre.evidence.exchange_info import Facts, documented
from lacre.evidence.receipts import Receipt
from lacre.evidence.verification import Verification
from lacre.runtime import arguments

EXPLAIN_PATH: Final = "/v1/explain"
_APART: Final = "\n\n"  # after each part

Parts = Mapping[str, str] | Iterable[str]


@dataclass(frozen=True, slots=True)
class ExplainedPart:
    """A part of the prompt. drop: nats by which the answer's log-probability falls without it. share: of all drops above 0."""

    id: str
    text: str = field(repr=False)
    drop: float
    share: float


@dataclass(frozen=True, slots=True)
class ScoredToken:
    """A token of the answer. bits: its surprise; 0 for one that the model was certain of."""

    text: str = field(repr=False)
    bits: float


@dataclass(frozen=True, slots=True)
class Attribution:
    """What an answer rests on. Its `repr` shows nothing of its content.

    answer: the given one, or the model's. logprob: of all of it, in nats. parts: in the order of the prompt. attempts, receipt,
    audit, verification: as in `Reply`. raw: the whole JSON object.
    """

    id: str
    model: str
    answer: str = field(repr=False)
    logprob: float
    parts: tuple[ExplainedPart, ...]
    tokens: tuple[ScoredToken, ...]
    usage: TokenUsage
    attempts: int
    receipt: Receipt = field(repr=False)
    audit: AuditProof = field(repr=False)
    verification: Verification = field(repr=False)
    raw: Mapping[str, Any] = field(repr=False)

    @property
    def top(self) -> ExplainedPart | None:
        """The part that the answer rests on most; None without a part whose absence makes the answer less likely."""
        best = max(self.parts, key=lambda part: part.drop, default=None)
        return best if best is not None and best.drop > 0 else None

    @classmethod
    def parse(cls, response: httpx2.Response, texts: Mapping[str, str]) -> Attribution:
        """texts: of the parts that were sent. Raises what `check` raises, InvalidMessage if the answer is not an explanation of
        these parts, and InvalidReceipt if its usage and its receipt differ.
        """
        facts = facts_of(response)
        arguments.instance(texts, Mapping, "texts")
        with documented(facts):
            return cls._of(checked_json(response), facts, texts)

    @classmethod
    def _of(cls, body: Mapping[str, Any], facts: Facts, texts: Mapping[str, str]) -> Attribution:
        if facts.receipt is None or facts.audit is None:
            raise InvalidReceipt("the answer has no receipt, or no proof that it was recorded")
        try:
            parts = tuple(ExplainedPart(p["id"], texts[p["id"]], float(p["drop"]), float(p["share"])) for p in body["parts"])
            if [part.id for part in parts] != list(texts):
                raise KeyError
            return cls(
                id=str(body["id"]),
                model=str(body["model"]),
                answer=str(body["answer"]),
                logprob=float(body["logprob"]),
                parts=parts,
                tokens=tuple(ScoredToken(str(token["text"]), float(token["bits"])) for token in body["tokens"]),
                usage=checked_usage(body["usage"], claimed(facts, facts.receipt)),
                attempts=facts.attempts,
                receipt=facts.receipt,
                audit=facts.audit,
                verification=facts.verification,
                raw=body,
            )
        except (LookupError, TypeError, AttributeError, ValueError) as exc:
            raise InvalidMessage("the worker's answer is not an explanation of the parts that were sent") from exc


@dataclass(frozen=True, slots=True)
class ExplainedPrompt:
    """turns: messages to send. texts: of their parts, by id, in order."""

    turns: list[Mapping[str, Any]] = field(repr=False)
    texts: dict[str, str] = field(repr=False)

    @classmethod
    def of(cls, messages: Messages, parts: Parts) -> ExplainedPrompt:
        """parts: go before the text of the last message; a list's ids are "1", "2" and so on. Raises UsageError."""
        turns = turns_of(messages)
        named = _named(parts)
        if named:
            if not turns:
                raise UsageError("messages is empty: the parts go before the text of its last message")
            own = turns[-1].get("content")
            after = [{"type": "text", "text": own}] if isinstance(own, str) else own
            if not isinstance(after, list | tuple):
                raise UsageError("the last message has no text, and the parts go before it: pass a question as its content")
            before = [{"type": "text", "id": name, "text": text + _APART} for name, text in named.items()]
            turns = [*turns[:-1], {**turns[-1], "content": [*before, *after]}]
        return cls(turns, {**_marked(turns), **named})


def _named(parts: object) -> dict[str, str]:
    if isinstance(parts, str | bytes) or not isinstance(parts, Iterable):
        raise UsageError(f"parts must be a mapping of ids to texts, or a list of texts, not {arguments.kind_of(parts)}")
    named = dict(parts) if isinstance(parts, Mapping) else {str(place): text for place, text in enumerate(parts, 1)}
    for name, text in named.items():
        if not isinstance(name, str) or not isinstance(text, str):
            raise UsageError(f"parts[{name!r}]: ids and parts must be strings")
    return named


def _marked(turns: Iterable[Mapping[str, Any]]) -> dict[str, str]:
    """The content parts that have an id. The worker refuses those of a wrong form."""
    texts: dict[str, str] = {}
    for turn in turns:
        content = turn.get("content")
        for part in content if isinstance(content, list | tuple) else ():
            if isinstance(part, Mapping) and isinstance(part.get("id"), str):
                texts[part["id"]] = str(part.get("text"))
    return texts
