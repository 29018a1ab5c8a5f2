"""OpenAI's objects as dicts for JSON. Values in, shapes out: nothing is decided here."""

from __future__ import annotations

import math
import secrets
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final

from lacre.asgi import Usage
from lacre_backend.engine.protocol import LayerView, ModelInfo

LEAST_LOGPROB: Final = -9999.0  # OpenAI's value for "never"; JSON has no minus infinity


@dataclass(frozen=True, slots=True)
class AnswerName:
    """What the ids of an answer and of its parts are made of: the same on each worker that continues it.

    id: 24 hex digits, random. created: Unix time.
    """

    id: str
    created: int

    @classmethod
    def new(cls) -> AnswerName:
        return cls(secrets.token_hex(12), int(time.time()))

    @classmethod
    def parse(cls, text: str) -> AnswerName:
        """text: what `str` gave."""
        name, _, created = text.partition(".")
        return cls(name, int(created))

    def __str__(self) -> str:
        return f"{self.id}.{self.created}"


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
        **({"completion_tokens_details": {"reasoning_tokens": spent.reasoning_tokens}} if spent.reasoning_tokens else {}),
    }


@dataclass(frozen=True, slots=True)
class PartScore:
    """drop: nats by which the answer's log-probability falls without the part."""

    id: str
    drop: float


@dataclass(frozen=True, slots=True)
class TokenViews:
    """What the model would have said in place of a token of the answer, by layer."""

    text: str
    layers: Sequence[LayerView]


def explanation(
    reply: ResponseInfo,
    answer: Sequence[tuple[str, float]],
    parts: Sequence[PartScore],
    lens: Sequence[TokenViews] | None,
    spent: Usage,
) -> Any:
    """answer: each token's text and log-probability in nats, given all parts. lens: None: not asked for."""
    total = sum(max(part.drop, 0.0) for part in parts)
    return {
        **reply.head("explanation"),
        "answer": "".join(text for text, _ in answer),
        "logprob": sum(logprob for _, logprob in answer),
        "parts": [{"id": part.id, "drop": part.drop, "share": max(part.drop, 0.0) / (total or 1.0)} for part in parts],
        "tokens": [{"text": text, "bits": max(0.0, -logprob / math.log(2))} for text, logprob in answer],
        **({} if lens is None else {"lens": _lens(lens)}),
        "usage": usage(spent),
    }


def _lens(seen: Sequence[TokenViews]) -> dict[str, Any]:
    """The same layers for each token."""
    return {
        "layers": [view.layer for view in seen[0].layers] if seen else [],
        "tokens": [
            {
                "text": token.text,
                "ranks": [view.rank for view in token.layers],
                "probabilities": [math.exp(min(view.logprob, 0.0)) for view in token.layers],
                "says": [view.says.decode("utf-8", "replace") for view in token.layers],
            }
            for token in seen
        ],
    }


def embeddings(info: ModelInfo, vectors: Sequence[Any], spent: Usage) -> dict[str, Any]:
    """vectors: each in its encoding."""
    data = [{"object": "embedding", "index": i, "embedding": vector} for i, vector in enumerate(vectors)]
    used = {"prompt_tokens": spent.prompt_tokens, "total_tokens": spent.prompt_tokens}
    return {"object": "list", "data": data, "model": info.name, "usage": used}
