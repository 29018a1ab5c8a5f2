"""OpenAI's objects as dicts for JSON. Values in, shapes out: nothing is decided here."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final

from lacre.asgi import Usage
from lacre_backend.api.tools.format import Argued, Called, Part, Speech
from lacre_backend.engine.protocol import ModelInfo, Token

LEAST_LOGPROB: Final = -9999.0  # OpenAI's value for "never"; JSON has no minus infinity


@dataclass(frozen=True, slots=True)
class ResponseInfo:
    """Fields that every object of one answer repeats. created: Unix time. usage_asked: whether a stream ends with the usage;
    all other chunks then have a null usage.
    """

    id: str
    created: int
    model: ModelInfo
    usage_asked: bool = False

    def head(self, kind: str) -> dict[str, Any]:
        return {
            "id": self.id,
            "object": kind,
            "created": self.created,
            "model": self.model.name,
            "system_fingerprint": "fp_" + self.model.digest.removeprefix("sha256:")[:12],
        }


def usage(spent: Usage) -> dict[str, Any]:
    return {
        "prompt_tokens": spent.prompt_tokens,
        "completion_tokens": spent.completion_tokens,
        "total_tokens": spent.prompt_tokens + spent.completion_tokens,
        "prompt_tokens_details": {"cached_tokens": spent.cached_tokens},
    }


@dataclass(frozen=True, slots=True)
class PartScore:
    """drop: nats by which the answer's log-probability falls without the part."""

    id: str
    drop: float


def explanation(reply: ResponseInfo, answer: Sequence[tuple[str, float]], parts: Sequence[PartScore], spent: Usage) -> Any:
    """answer: each token's text and log-probability in nats, given all parts."""
    total = sum(max(part.drop, 0.0) for part in parts)
    return {
        **reply.head("explanation"),
        "answer": "".join(text for text, _ in answer),
        "logprob": sum(logprob for _, logprob in answer),
        "parts": [{"id": part.id, "drop": part.drop, "share": max(part.drop, 0.0) / (total or 1.0)} for part in parts],
        "tokens": [{"text": text, "bits": max(-logprob / math.log(2), 0.0)} for text, logprob in answer],
        "usage": usage(spent),
    }


def embeddings(info: ModelInfo, vectors: Sequence[Any], spent: Usage) -> dict[str, Any]:
    """vectors: each in its encoding."""
    data = [{"object": "embedding", "index": i, "embedding": vector} for i, vector in enumerate(vectors)]
    used = {"prompt_tokens": spent.prompt_tokens, "total_tokens": spent.prompt_tokens}
    return {"object": "list", "data": data, "model": info.name, "usage": used}


def model(info: ModelInfo) -> dict[str, Any]:
    return {"id": info.name, "object": "model", "created": info.created, "owned_by": "lacre"}


def _logprob(raw: bytes, logprob: float) -> dict[str, Any]:
    return {"token": raw.decode("utf-8", "replace"), "logprob": max(logprob, LEAST_LOGPROB), "bytes": list(raw)}


def _spoken(parts: Sequence[Part]) -> str:
    return "".join(part.text for part in parts if isinstance(part, Speech))


def _calls(parts: Sequence[Part]) -> list[dict[str, Any]]:
    calls: list[dict[str, Any]] = []
    for part in parts:
        if isinstance(part, Called):
            calls.append({"id": part.id, "type": "function", "function": {"name": part.name, "arguments": ""}})
        elif isinstance(part, Argued):
            calls[part.index]["function"]["arguments"] += part.text
    return calls


def _delta(part: Part) -> dict[str, Any]:
    """A call begins with its name; its arguments follow piece by piece."""
    match part:
        case Speech():
            return {"content": part.text}
        case Called():
            opened = {"name": part.name, "arguments": ""}
            return {"tool_calls": [{"index": part.index, "id": part.id, "type": "function", "function": opened}]}
    return {"tool_calls": [{"index": part.index, "function": {"arguments": part.text}}]}


class Chat:
    """`chat.completion` and its chunks."""

    prefix: Final = "chatcmpl-"

    def __init__(self, reply: ResponseInfo) -> None:
        self._whole = reply.head("chat.completion")
        self._chunk = reply.head("chat.completion.chunk") | ({"usage": None} if reply.usage_asked else {})

    def logprobs(self, tokens: Sequence[Token]) -> dict[str, Any] | None:
        content = [
            {**_logprob(token.raw, token.logprob), "top_logprobs": [_logprob(a.raw, a.logprob) for a in token.top]}
            for token in tokens
            if token.logprob is not None
        ]
        return {"content": content, "refusal": None} if content else None

    def choice(self, index: int, parts: Sequence[Part], tokens: Sequence[Token], reason: str) -> dict[str, Any]:
        message: dict[str, Any] = {"role": "assistant", "content": _spoken(parts), "refusal": None}
        if calls := _calls(parts):
            message |= {"content": message["content"] or None, "tool_calls": calls}
        return {"index": index, "message": message, "logprobs": self.logprobs(tokens), "finish_reason": reason}

    def whole(self, choices: Sequence[dict[str, Any]], spent: Usage) -> dict[str, Any]:
        return {**self._whole, "choices": list(choices), "usage": usage(spent)}

    def first(self, index: int) -> dict[str, Any] | None:
        """The chunk that begins a choice."""
        return self._delta(index, {"role": "assistant", "content": "", "refusal": None}, None, None)

    def piece(self, index: int, part: Part, tokens: Sequence[Token]) -> dict[str, Any]:
        return self._delta(index, _delta(part), self.logprobs(tokens), None)

    def last(self, index: int, reason: str) -> dict[str, Any]:
        return self._delta(index, {}, None, reason)

    def spent(self, spent: Usage) -> dict[str, Any]:
        return {**self._chunk, "choices": [], "usage": usage(spent)}

    def _delta(self, index: int, delta: dict[str, Any], logprobs: dict[str, Any] | None, reason: str | None) -> dict[str, Any]:
        choice = {"index": index, "delta": delta, "logprobs": logprobs, "finish_reason": reason}
        return {**self._chunk, "choices": [choice]}


class Completion:
    """`text_completion`; its chunks have the same form."""

    prefix: Final = "cmpl-"

    def __init__(self, reply: ResponseInfo) -> None:
        self._head = reply.head("text_completion") | ({"usage": None} if reply.usage_asked else {})
        self._offsets: dict[int, int] = {}  # choice -> characters of its tokens so far

    def logprobs(self, index: int, tokens: Sequence[Token]) -> dict[str, Any] | None:
        known = [token for token in tokens if token.logprob is not None]
        if not known:
            return None
        texts = [token.raw.decode("utf-8", "replace") for token in known]
        offsets = []
        for text in texts:
            offsets.append(self._offsets.get(index, 0))
            self._offsets[index] = offsets[-1] + len(text)
        return {
            "tokens": texts,
            "token_logprobs": [max(token.logprob or 0.0, LEAST_LOGPROB) for token in known],
            "top_logprobs": [
                {a.raw.decode("utf-8", "replace"): max(a.logprob, LEAST_LOGPROB) for a in token.top} for token in known
            ],
            "text_offset": offsets,
        }

    def choice(self, index: int, parts: Sequence[Part], tokens: Sequence[Token], reason: str | None) -> dict[str, Any]:
        return {"index": index, "text": _spoken(parts), "logprobs": self.logprobs(index, tokens), "finish_reason": reason}

    def whole(self, choices: Sequence[dict[str, Any]], spent: Usage) -> dict[str, Any]:
        return {**self._head, "choices": list(choices), "usage": usage(spent)}

    def first(self, index: int) -> dict[str, Any] | None:  # noqa: ARG002 - the same interface as Chat's
        """Text completions begin without a chunk of their own."""
        return None

    def piece(self, index: int, part: Part, tokens: Sequence[Token]) -> dict[str, Any]:
        return {**self._head, "choices": [self.choice(index, [part], tokens, None)]}

    def last(self, index: int, reason: str) -> dict[str, Any]:
        return {**self._head, "choices": [self.choice(index, (), (), reason)]}

    def spent(self, spent: Usage) -> dict[str, Any]:
        return {**self._head, "choices": [], "usage": usage(spent)}
