"""Reads an answer's token counts from the upstream's `usage`, and compares them with the grant.

Rules:
- An answer without counts is not served: its receipt would be invented.
- A count above the grant is the upstream's fault, and no one pays for it. The answer is not forwarded, and nothing is charged.
- Until a stream reports its usage, each event with content counts as one token: it has at least one.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any, Final

from lacre.asgi import Call
from lacre_backend.api.errors import RequestRefused
from lacre_backend.upstream import refusals

SLACK: Final = 64  # events that a stream may have beyond its tokens: some servers send the beginning of a tool call separately


def take(call: Call, told: object) -> None:
    """Writes the counts of OpenAI's `usage` into the call's. Raises RequestRefused."""
    if not isinstance(told, dict):
        raise refusals.unusable("does not say how many tokens it used")
    details = told.get("prompt_tokens_details")
    cached = _count(details.get("cached_tokens", 0)) if isinstance(details, dict) else 0
    # A reranker may report only the sum; it makes no tokens.
    prompt = _count(told.get("prompt_tokens", told.get("total_tokens")))
    completion = _count(told.get("completion_tokens", 0))
    if call.max_tokens is not None and completion > call.max_tokens:
        raise refusals.unusable("made more tokens than were granted")
    if call.max_prompt_tokens is not None and prompt > call.max_prompt_tokens:
        raise _too_long(prompt, call.max_prompt_tokens)
    usage = call.usage
    usage.prompt_tokens, usage.cached_tokens, usage.completion_tokens = prompt, min(cached, prompt), completion


def count_event(call: Call, seen: int) -> None:
    """seen: events with content so far. Raises RequestRefused for a stream that exceeds the grant."""
    granted = seen if call.max_tokens is None else call.max_tokens
    if seen > granted + SLACK:
        raise refusals.unusable("made more tokens than were granted")
    call.usage.completion_tokens = min(seen, granted)
    if call.usage.first_output is None and seen:
        call.usage.first_output = time.monotonic()


def says_something(event: Mapping[str, Any]) -> bool:
    """Whether any of the event's choices has content."""
    choices = event.get("choices")
    parts = [choice for choice in choices if isinstance(choice, dict)] if isinstance(choices, list) else []
    return any(choice.get("text") or _spoken(choice.get("delta")) for choice in parts)


def _spoken(delta: object) -> bool:
    return isinstance(delta, dict) and any(value for name, value in delta.items() if name != "role")


def _count(value: object) -> int:
    if value is None or not isinstance(value, int) or isinstance(value, bool) or value < 0:
        raise refusals.unusable("does not say how many tokens it used")
    return value


def _too_long(prompt: int, granted: int) -> RequestRefused:
    return RequestRefused(
        f"The prompt has {prompt} tokens, but was granted {granted}. Send a shorter one.",
        status=403,
        code="grant_mismatch",
        param="prompt",
    )
