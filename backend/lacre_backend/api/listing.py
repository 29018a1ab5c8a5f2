"""What `/v1/models` says of a model, in the members that clients of several servers read.

OpenAI's and Anthropic's lists are one object here: each reads its own members. Beside them stand vLLM's `max_model_len`,
llama-server's `meta`, and OpenRouter's `context_length`, `architecture`, `top_provider` and `supported_parameters`.
"""

from __future__ import annotations

import datetime
from collections.abc import Sequence
from typing import Any, Final

from lacre_backend.api.registry import ServedModel
from lacre_backend.engine.protocol import TaskKind

_OUTPUTS: Final = {TaskKind.GENERATE: "text", TaskKind.EMBED: "embeddings", TaskKind.RERANK: "rerank"}
_SAMPLING: Final = (
    "frequency_penalty",
    "logit_bias",
    "logprobs",
    "max_tokens",
    "min_p",
    "presence_penalty",
    "seed",
    "stop",
    "temperature",
    "top_k",
    "top_logprobs",
    "top_p",
)
_OF_CHATS: Final = ("response_format", "structured_outputs", "tool_choice", "tools")
_OF_REASONING: Final = ("include_reasoning", "reasoning", "reasoning_effort")


def named(name: str, created: int) -> dict[str, Any]:
    """The members that OpenAI's and Anthropic's packages need. created: Unix time."""
    return {
        "id": name,
        "object": "model",
        "created": created,
        "owned_by": "lacre",
        "type": "model",
        "display_name": name,
        "created_at": datetime.datetime.fromtimestamp(created, datetime.UTC).isoformat(),
        "lifecycle": "active",
    }


def listed(models: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """One page has all models."""
    ends = {"first_id": models[0]["id"], "last_id": models[-1]["id"]} if models else {"first_id": None, "last_id": None}
    return {"object": "list", "data": list(models), "has_more": False, **ends}


def described(served: ServedModel) -> dict[str, Any]:
    info = served.engine.model
    kind = next(iter(info.kinds))
    most = info.n_ctx if kind is TaskKind.GENERATE else None
    output = _OUTPUTS[kind]
    inputs = ["text"] if info.images is None else ["text", "image"]
    numbers = {"n_ctx": info.n_ctx, "n_vocab": info.n_vocab} | ({"n_embd": info.n_embd} if kind is TaskKind.EMBED else {})
    return {
        **named(info.name, info.created),
        "root": info.name,
        "digest": info.digest,
        "max_model_len": info.n_ctx,
        "max_input_tokens": info.n_ctx,
        "max_tokens": most,
        "context_length": info.n_ctx,
        "architecture": {
            "modality": f"{'+'.join(inputs)}->{output}",
            "input_modalities": inputs,
            "output_modalities": [output],
        },
        "top_provider": {"context_length": info.n_ctx, "max_completion_tokens": most, "is_moderated": False},
        "supported_parameters": sorted(_parameters(served)),
        "meta": numbers,
    }


def _parameters(served: ServedModel) -> tuple[str, ...]:
    if TaskKind.GENERATE not in served.engine.model.kinds:
        return ()
    if served.template is None:
        return _SAMPLING
    return (*_SAMPLING, *_OF_CHATS, *(_OF_REASONING if served.template.thoughts is not None else ()))
