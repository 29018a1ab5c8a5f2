"""Requests about texts that generate none: their vectors, their tokens, and their order by a query.

Rules:
- An answer exists only whole, opened and paid for, like a chat's reply.
- Its vectors, scores and ids must match the texts that were sent, by number and place.
"""

from __future__ import annotations

import base64
import math
import struct
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from decimal import Decimal
from typing import Any, Final

import httpx2

from lacre.chat.reply import TokenUsage, checked_json, claimed, facts_of
from lacre.chat.request import Messages, turns_of
from lacre.errors import InvalidMessage, InvalidReceipt, UsageError
from lacre.evidence.audit_proof import AuditProof
from lacre.evidence.exchange_info import Facts, documented
from lacre.evidence.receipts import Receipt
from lacre.evidence.verification import Verification
from lacre.runtime import arguments

EMBED_PATH: Final = "/v1/embeddings"
TOKENIZE_PATH: Final = "/v1/tokenize"
RERANK_PATH: Final = "/v1/rerank"
_FLOAT: Final = 4  # bytes of a number in base64
_WRONG: Final = (LookupError, TypeError, AttributeError, ValueError, ArithmeticError, struct.error)


@dataclass(frozen=True, slots=True)
class EmbedReply:
    """The vectors of texts, in their order. attempts, receipt, audit, verification, cost: as in `Reply`."""

    model: str
    vectors: tuple[tuple[float, ...], ...] = field(repr=False)
    usage: TokenUsage
    attempts: int
    receipt: Receipt = field(repr=False)
    audit: AuditProof = field(repr=False)
    verification: Verification = field(repr=False)
    cost: Decimal | None = None

    @classmethod
    def parse(cls, response: httpx2.Response, count: int) -> EmbedReply:
        """count: of the texts that were sent. Raises what `check` raises, InvalidMessage and InvalidReceipt."""
        facts = facts_of(response)
        with documented(facts):
            body = checked_json(response)
            receipt, audit, usage = _paid(facts, body)
            try:
                by_place = {_whole(each.get("index", place)): each["embedding"] for place, each in enumerate(body["data"])}
                vectors = tuple(_vector(by_place[place]) for place in range(count))
                if len(by_place) != count or len({len(vector) for vector in vectors}) > 1:
                    raise ValueError
            except _WRONG as exc:
                raise InvalidMessage("the worker's answer does not hold one vector for each text") from exc
            model = str(body.get("model", ""))
            return cls(model, vectors, usage, facts.attempts, receipt, audit, facts.verification, facts.cost)


@dataclass(frozen=True, slots=True)
class TokenizeReply:
    """The tokens of a prompt. ids: each token's number in the model's vocabulary. limit: tokens that the model's context
    holds. verification: every check of the answer.
    """  # fmt: skip

    ids: tuple[int, ...] = field(repr=False)
    limit: int
    verification: Verification = field(repr=False)

    def __len__(self) -> int:
        return len(self.ids)

    @classmethod
    def parse(cls, response: httpx2.Response) -> TokenizeReply:
        """Raises what `check` raises, and InvalidMessage."""
        facts = facts_of(response)
        with documented(facts):
            body = checked_json(response)
            try:
                ids = tuple(_whole(each) for each in body["tokens"])
                if len(ids) != body["count"]:
                    raise ValueError
                return cls(ids, _whole(body["max_model_len"]), facts.verification)
            except _WRONG as exc:
                raise InvalidMessage("the worker's answer does not hold a prompt's tokens") from exc


@dataclass(frozen=True, slots=True)
class RankedText:
    """A document. index: its place among those that were sent. score: the model's; higher is more relevant."""

    index: int
    score: float
    text: str = field(repr=False)


@dataclass(frozen=True, slots=True)
class RerankReply:
    """Documents by their relevance, the best first. attempts, receipt, audit, verification, cost: as in `Reply`."""

    results: tuple[RankedText, ...]
    usage: TokenUsage
    attempts: int
    receipt: Receipt = field(repr=False)
    audit: AuditProof = field(repr=False)
    verification: Verification = field(repr=False)
    cost: Decimal | None = None

    @classmethod
    def parse(cls, response: httpx2.Response, documents: Sequence[str], most: int | None) -> RerankReply:
        """documents: those that were sent. most: of them in the answer. Raises what `check` raises, InvalidMessage and
        InvalidReceipt.
        """
        facts = facts_of(response)
        with documented(facts):
            body = checked_json(response)
            receipt, audit, usage = _paid(facts, {})
            try:
                scores = {_whole(each["index"]): _finite(each["relevance_score"]) for each in body["results"]}
                ranked = [RankedText(index, score, documents[index]) for index, score in scores.items()]
                if len(ranked) != len(body["results"]) or len(ranked) != min(len(documents), most or len(documents)):
                    raise ValueError
            except _WRONG as exc:
                raise InvalidMessage("the worker's answer does not rank the documents that were sent") from exc
            results = tuple(sorted(ranked, key=lambda each: -each.score))
            return cls(results, usage, facts.attempts, receipt, audit, facts.verification, facts.cost)


def texts_of(given: object, name: str) -> list[str]:
    """A string stands for one text. Raises UsageError."""
    if isinstance(given, str):
        return [given]
    if not isinstance(given, Iterable) or isinstance(given, bytes | bytearray | memoryview | Mapping):
        raise UsageError(f"{name} must be a string or a list of strings, not {arguments.kind_of(given)}")
    texts = list(given)
    for place, text in enumerate(texts):
        if not isinstance(text, str):
            raise UsageError(f"{name}[{place}] must be a string, not {arguments.kind_of(text)}")
    if not texts:
        raise UsageError(f"{name} is empty: pass at least one text")
    return texts


def embed_body(texts: Sequence[str], model: str | None, dimensions: int | None) -> dict[str, Any]:
    """Raises UsageError."""
    asked = {} if dimensions is None else {"dimensions": arguments.count(dimensions, "dimensions", least=1)}
    return {"model": model, "input": texts, "encoding_format": "base64", **asked}


def tokenize_body(prompt: Messages, model: str | None) -> dict[str, Any]:
    """A string is counted as it stands; messages are counted in the form of the model's template. Raises UsageError."""
    return {"model": model, **({"prompt": prompt} if isinstance(prompt, str) else {"messages": turns_of(prompt)})}


def rerank_body(query: str, documents: Sequence[str], model: str | None, top_n: int | None) -> dict[str, Any]:
    """Raises UsageError."""
    most = {} if top_n is None else {"top_n": arguments.count(top_n, "top_n", least=1)}
    return {"model": model, "query": arguments.text(query, "query"), "documents": documents, **most}


def _paid(facts: Facts, body: Mapping[str, Any]) -> tuple[Receipt, AuditProof, TokenUsage]:
    """The receipt, the proof, and the usage that both the receipt and the answer tell. Raises InvalidReceipt."""
    if facts.receipt is None or facts.audit is None:
        raise InvalidReceipt("the answer has no receipt, or no proof that it was recorded")
    usage, told = claimed(facts, facts.receipt), body.get("usage")
    if isinstance(told, Mapping) and told.get("prompt_tokens", usage.prompt) != usage.prompt:
        raise InvalidReceipt("the answer's receipt and its usage have different counts: tell the pool's operator")
    return facts.receipt, facts.audit, usage


def _vector(told: object) -> tuple[float, ...]:
    """As numbers, or as little-endian floats of 32 bits in base64, as OpenAI writes them."""
    if isinstance(told, str):
        raw = base64.b64decode(told, validate=True)
        numbers: Iterable[Any] = struct.unpack(f"<{len(raw) // _FLOAT}f", raw)  # another length raises struct.error
    elif isinstance(told, list):
        numbers = told
    else:
        raise TypeError
    return tuple(map(_finite, numbers))


def _finite(value: object) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise TypeError
    return float(value)


def _whole(value: object) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or value < 0:
        raise TypeError
    return value
