"""Which parts of a prompt an answer rests on, and how surprising each of its tokens was (docs/explain.md).

Rules:
- A part is a text with an id. In a message it is a content part; the worker leaves out one after the other.
- An attribution exists only whole, opened and paid for, like a chat's reply.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from decimal import Decimal
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
_ROUNDING: Final = 1e-6  # by which a sum of floats may exceed 1

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
class LensToken:
    """A token of the answer, seen through a lens. Each tuple has one member for each layer of the lens.

    ranks: the token's place among all that the model could say; 1 is the likeliest. probabilities: the token's. says: the
    likeliest token.
    """

    text: str = field(repr=False)
    ranks: tuple[int, ...]
    probabilities: tuple[float, ...]
    says: tuple[str, ...] = field(repr=False)

    @property
    def settled(self) -> int | None:
        """The index of the layer from which on this token stays the likeliest; None if the last layer prefers another."""
        unsettled = next((i for i in reversed(range(len(self.ranks))) if self.ranks[i] != 1), -1)
        return unsettled + 1 if unsettled + 1 < len(self.ranks) else None


@dataclass(frozen=True, slots=True)
class Lens:
    """What the model would say after each layer. layers: their numbers, from 0, ascending. tokens: the answer's first."""

    layers: tuple[int, ...]
    tokens: tuple[LensToken, ...]


@dataclass(frozen=True, slots=True)
class Attribution:
    """What an answer rests on. Its `repr` shows nothing of its content.

    answer: the given one, or the model's. logprob: of all of it, in nats. parts: in the order of the prompt. lens: None if it
    was not asked for. attempts, receipt, audit, verification, cost: as in `Reply`. raw: the whole JSON object.
    """

    id: str
    model: str
    answer: str = field(repr=False)
    logprob: float
    parts: tuple[ExplainedPart, ...]
    tokens: tuple[ScoredToken, ...]
    lens: Lens | None
    usage: TokenUsage
    attempts: int
    receipt: Receipt = field(repr=False)
    audit: AuditProof = field(repr=False)
    verification: Verification = field(repr=False)
    raw: Mapping[str, Any] = field(repr=False)
    cost: Decimal | None = None

    @property
    def top(self) -> ExplainedPart | None:
        """The part that the answer rests on most; None without a part whose absence makes the answer less likely."""
        best = max(self.parts, key=lambda part: part.drop, default=None)
        return best if best is not None and best.drop > 0 else None

    @classmethod
    def parse(cls, response: httpx2.Response, texts: Mapping[str, str], *, lens: bool = False) -> Attribution:
        """texts: of the parts that were sent. lens: whether it was asked for. Raises what `check` raises, InvalidMessage if the
        answer is not an explanation of these parts, and InvalidReceipt if its usage and its receipt differ.
        """
        facts = facts_of(response)
        arguments.instance(texts, Mapping, "texts")
        with documented(facts):
            return cls._of(checked_json(response), facts, texts, lens)

    @classmethod
    def _of(cls, body: Mapping[str, Any], facts: Facts, texts: Mapping[str, str], lens: bool) -> Attribution:
        if facts.receipt is None or facts.audit is None:
            raise InvalidReceipt("the answer has no receipt, or no proof that it was recorded")
        try:
            parts = tuple(
                ExplainedPart(p["id"], texts[p["id"]], _finite(p["drop"]), _probability(p["share"])) for p in body["parts"]
            )
            tokens = tuple(ScoredToken(str(token["text"]), _surprise(token["bits"])) for token in body["tokens"])
            if [part.id for part in parts] != list(texts) or "".join(token.text for token in tokens) != body["answer"]:
                raise ValueError
            return cls(
                id=str(body["id"]),
                model=str(body["model"]),
                answer=str(body["answer"]),
                logprob=_finite(body["logprob"]),
                parts=parts,
                tokens=tokens,
                lens=_lens(body["lens"]) if lens else None,
                usage=checked_usage(body["usage"], claimed(facts, facts.receipt)),
                attempts=facts.attempts,
                receipt=facts.receipt,
                audit=facts.audit,
                verification=facts.verification,
                raw=body,
                cost=facts.cost,
            )
        except (LookupError, TypeError, AttributeError, ValueError, OverflowError) as exc:
            raise InvalidMessage("the worker's answer is not an explanation of the parts that were sent") from exc


def _lens(raw: Mapping[str, Any]) -> Lens:
    """Raises LookupError, TypeError or ValueError if it is malformed."""
    lens = Lens(
        tuple(map(_whole, raw["layers"])),
        tuple(
            LensToken(
                str(token["text"]),
                tuple(map(_whole, token["ranks"])),
                tuple(map(_probability, token["probabilities"])),
                tuple(map(str, token["says"])),
            )
            for token in raw["tokens"]
        ),
    )
    depth = len(lens.layers)
    complete = all(len(each) == depth for token in lens.tokens for each in (token.ranks, token.probabilities, token.says))
    ranked = all(rank >= 1 for token in lens.tokens for rank in token.ranks)
    if not complete or not ranked or list(lens.layers) != sorted(set(lens.layers)):
        raise ValueError
    return lens


def _whole(value: object) -> int:
    """A number from 0 on. Raises TypeError or ValueError."""
    if not isinstance(value, int) or isinstance(value, bool):
        raise TypeError
    if value < 0:
        raise ValueError
    return value


def _finite(value: object) -> float:
    """Raises TypeError or ValueError."""
    if not isinstance(value, int | float) or isinstance(value, bool):
        raise TypeError
    if not math.isfinite(number := float(value)):
        raise ValueError
    return number


def _surprise(value: object) -> float:
    if (bits := _finite(value)) < 0:
        raise ValueError
    return bits


def _probability(value: object) -> float:
    share = _finite(value)
    if not 0 <= share <= 1 + _ROUNDING:
        raise ValueError
    return min(share, 1.0)


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
