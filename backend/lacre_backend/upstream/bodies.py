"""Prepares an OpenAI request body for the upstream: limited by the grant, with the upstream's name of the model.

Rules:
- Members are forwarded by allow-list. Servers have own members that override the standard ones (llama.cpp's `n_predict`
  overrides `max_tokens`), and an unknown member could be one of them.
- The body always contains the grant's limit, regardless of the client, in equal parts for the choices of all prompts.
- More than one choice is forwarded only if the operator says that the upstream counts them all (`n` in `members`). llama.cpp's
  server counts only one.
- Media are inside the body. The address of any is refused, because the upstream would fetch it.
- The operator's fixed members override everything.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

from lacre.asgi import Call
from lacre.exchange.request import IDENTIFYING_FIELDS, prompts_in
from lacre_backend.api.errors import RequestRefused, grant_mismatch
from lacre_backend.api.requests import OWN_IDS, check_token_ids
from lacre_backend.upstream.faces import UpstreamFace
from lacre_backend.upstream.media import check_media

_SAMPLING: Final = frozenset(
    {
        "frequency_penalty", "logit_bias", "logprobs", "max_tokens", "n", "presence_penalty", "seed", "stop", "stream",
        "stream_options", "temperature", "top_p",
    }
)  # fmt: skip
_EVERYWHERE: Final = frozenset({"model", *IDENTIFYING_FIELDS})  # the identifying fields are there only if the client insisted
_MEMBERS: Final = {
    "chat": _SAMPLING
    | {
        "max_completion_tokens", "messages", "parallel_tool_calls", "reasoning_effort", "response_format", "tool_choice",
        "tools", "top_logprobs",
    },
    "complete": _SAMPLING | {"echo", "prompt", "suffix"},
    "embed": frozenset({"dimensions", "encoding_format", "input", OWN_IDS}),
    "rerank": frozenset({"documents", "query", "return_documents", "top_n"}),
}  # fmt: skip
ACTIONS: Final = frozenset(_MEMBERS)
_GENERATE: Final = frozenset({"chat", "complete"})
_LIMITS: Final = ("max_completion_tokens", "max_tokens")


@dataclass(frozen=True, slots=True)
class UpstreamBody:
    """A prepared body. content: the body to forward. stream: whether events are requested. tell_usage: whether the client
    requested usage in them.
    """

    content: bytes = field(repr=False)
    stream: bool = False
    tell_usage: bool = False


def ready(
    content: bytes,
    call: Call,
    known_as: str,
    also: frozenset[str],
    fixed: Mapping[str, object],
    *,
    face: UpstreamFace | None = None,
) -> UpstreamBody:
    """call: with an action in `ACTIONS`. known_as: the model's name there. also: further members to forward. fixed: members
    that the operator sets. face: of a chat in another API's words.

    Raises RequestRefused.
    """
    body = _object(content)
    action = str(call.action)
    members = _MEMBERS[action] if face is None else face.members | {"stream_options"}
    for name in body.keys() - members - _EVERYWHERE - also:
        raise RequestRefused(f"Unknown parameter: '{name}'.", code="unknown_parameter", param=name)
    if not isinstance(body.get("model"), str):
        raise RequestRefused("Invalid type for 'model': expected a string.", code="invalid_type", param="model")
    if body["model"] != call.model:
        raise grant_mismatch(f"The request was granted for the model `{call.model}`, and names another.", "model")
    body["model"] = known_as
    check_media(body)
    stream = tell_usage = False
    if action == "embed":
        check_token_ids(body.get("input"), body.pop(OWN_IDS, None))
    if face is not None:
        _bound(body, call, (face.limit,), several=False)
        stream, _ = _streaming(body)
        body.pop("stream_options", None)  # usage comes unasked
        body |= face.fixed
    elif action in _GENERATE:
        _bound(body, call, _LIMITS, several="n" in also)
        stream, tell_usage = _streaming(body)
    return UpstreamBody(json.dumps({**body, **fixed}, separators=(",", ":"), allow_nan=False).encode(), stream, tell_usage)


def _object(content: bytes) -> dict[str, Any]:
    try:
        body = json.loads(content, parse_constant=_no_constant, parse_float=_finite)
    except (ValueError, RecursionError):
        body = None
    if not isinstance(body, dict):
        raise RequestRefused("The request body is not a JSON object.", code="invalid_json")
    return body


def _no_constant(name: str) -> None:
    raise ValueError(name)  # NaN and the infinities are not JSON (RFC 8259 section 6)


def _finite(text: str) -> float:
    number = float(text)
    if math.isinf(number):  # 1e999 would be written as Infinity
        raise ValueError(text)
    return number


def _bound(body: dict[str, Any], call: Call, limits: Sequence[str], *, several: bool) -> None:
    """Sets the output limit of each choice. limits: the members that say it; the last is always set. several: whether there may
    be more than one.
    """
    choices = _count(body, "n", 1) * prompts_in(body.get("prompt"))
    if choices > 1 and not several:
        raise RequestRefused(
            "This model's server makes one choice at a time. Send a request for each.",
            code="unsupported_parameter",
            param="n",
        )
    granted = call.max_tokens or 0
    asked = [_count(body, name, granted) for name in limits if body.get(name) is not None]
    each = min(asked, default=granted // choices)
    if each * choices > granted or each < 1:
        raise grant_mismatch(
            f"The request asks for {choices} x {max(each, 1)} output tokens, but was granted {granted}.", limits[-1]
        )
    body |= {name: each for name in limits if name in body or name == limits[-1]}


def _count(body: Mapping[str, Any], name: str, otherwise: int) -> int:
    value = body.get(name)
    if value is None:
        return otherwise
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise RequestRefused(f"Invalid '{name}': expected an integer >= 1.", code="invalid_value", param=name)
    return value


def _streaming(body: dict[str, Any]) -> tuple[bool, bool]:
    """Whether events are requested, and usage in them. The upstream is always asked for usage, because receipts need it."""
    stream, options = body.get("stream"), body.pop("stream_options", None)
    if not isinstance(stream, bool | None) or not isinstance(options, dict | None):
        raise RequestRefused("Invalid 'stream' or 'stream_options'.", code="invalid_type", param="stream")
    if not stream:
        return False, False
    body["stream_options"] = {"include_usage": True}
    return True, (options or {}).get("include_usage") is True
