"""The parameters of requests, for type checkers: `client.chat("Hello.", temprature=1)` is a type error.

Nothing is checked against these types when a program runs: the model's server refuses an unknown parameter by its name. A
parameter that is not here goes into `extra_body`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import EllipsisType
from typing import Any, Literal, TypedDict

import httpx2

Effort = Literal["none", "minimal", "low", "medium", "high", "xhigh", "max"]  # of a model's reasoning
Timeout = httpx2.Timeout | float | None | EllipsisType  # of one call; `...`: the client's own


class CallOptions(TypedDict, total=False):
    """Options of one call, as in `openai`. None is a member of the body by itself.

    timeout: in seconds. extra_headers: those that say who asks are not sealed.
    """

    timeout: Timeout
    extra_headers: Mapping[str, str] | None
    extra_query: Mapping[str, str] | None
    extra_body: Mapping[str, Any] | None


class StreamChoices(TypedDict, total=False):
    """`stream_options`. include_usage: already true by default."""

    include_usage: bool
    include_obfuscation: bool


class ChatParams(TypedDict, total=False):
    """What `chat` and `chat_stream` take beside the messages. None in `model`: the pool's first model.

    The names are OpenAI's. Those from `top_k` on are of the servers of open models. chat_template_kwargs: variables of the
    model's template. max_reasoning_tokens: of each choice. continue_final_message: the last message is the answer's beginning.
    """

    model: str | None
    max_tokens: int | None
    max_completion_tokens: int | None
    temperature: float | None
    top_p: float | None
    n: int | None
    stop: str | Sequence[str] | None
    seed: int | None
    frequency_penalty: float | None
    presence_penalty: float | None
    logit_bias: Mapping[str, float] | Mapping[int, float] | None
    logprobs: bool | None
    top_logprobs: int | None
    response_format: Mapping[str, Any] | None
    tools: Sequence[Mapping[str, Any]]
    tool_choice: Literal["none", "auto", "required"] | Mapping[str, Any] | None
    parallel_tool_calls: bool | None
    reasoning_effort: Effort | None
    verbosity: str | None
    stream_options: StreamChoices | None
    store: bool | None
    service_tier: str | None
    modalities: Sequence[str] | None
    user: str | None
    metadata: Mapping[str, str] | None
    safety_identifier: str | None
    prompt_cache_key: str | None
    prompt_cache_retention: str | None
    cache_control: Mapping[str, Any] | None
    top_k: int | None
    min_p: float | None
    repeat_penalty: float | None
    chat_template_kwargs: Mapping[str, Any] | None
    max_reasoning_tokens: int | None
    continue_final_message: bool


class ExplainParams(TypedDict, total=False):
    """What `explain` takes beside the messages."""

    model: str | None
    max_tokens: int | None
