"""The Responses and Messages APIs as a worker forwards them: which members may pass, what limits them, what their streams say.

Chat and text completions need no entry here: `bodies`, `counts` and `events` read their form, and others are brought to it.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any, ClassVar, Final

_SHARED: Final = frozenset({"stream", "temperature", "tool_choice", "tools", "top_p"})


class UpstreamFace(ABC):
    """members: those that may pass. limit: the one that limits the output. fixed: those that are always sent."""

    members: ClassVar[frozenset[str]]
    limit: ClassVar[str]
    fixed: ClassVar[Mapping[str, object]]

    @abstractmethod
    def usage(self, told: Mapping[str, Any]) -> dict[str, Any]:
        """What an answer, or an event, says of its usage; a later event's counts replace those of an earlier one."""

    @abstractmethod
    def counts(self, usage: Mapping[str, Any]) -> dict[str, Any]:
        """All of that in OpenAI's words for chats."""

    @abstractmethod
    def says_something(self, event: Mapping[str, Any]) -> bool: ...

    @abstractmethod
    def ends(self, event: Mapping[str, Any]) -> bool:
        """Whether the stream is whole with this event."""

    @abstractmethod
    def fails(self, event: Mapping[str, Any]) -> bool: ...

    @abstractmethod
    def renamed(self, event: dict[str, Any], name: str) -> dict[str, Any]:
        """With the client's name of the model."""


def _object(value: object) -> dict[str, Any]:
    return value if isinstance(value, dict) else {}


def _in_words_of_chat(usage: Mapping[str, Any], prompt: object, cached: object) -> dict[str, Any]:
    details = {"cached_tokens": cached or 0}
    return {"prompt_tokens": prompt, "completion_tokens": usage.get("output_tokens"), "prompt_tokens_details": details}


class _Responses(UpstreamFace):
    """Nothing of a sealed request is to be stored."""

    members = _SHARED | {
        "include", "input", "instructions", "max_output_tokens", "parallel_tool_calls", "reasoning", "text", "top_logprobs",
        "truncation",
    }  # fmt: skip
    limit = "max_output_tokens"
    fixed: ClassVar[Mapping[str, object]] = {"store": False}

    def usage(self, told: Mapping[str, Any]) -> dict[str, Any]:
        return _object(told.get("usage")) or _object(_object(told.get("response")).get("usage"))

    def counts(self, usage: Mapping[str, Any]) -> dict[str, Any]:
        cached = _object(usage.get("input_tokens_details")).get("cached_tokens")
        return _in_words_of_chat(usage, usage.get("input_tokens"), cached)

    def says_something(self, event: Mapping[str, Any]) -> bool:
        return str(event.get("type")).endswith(".delta")

    def ends(self, event: Mapping[str, Any]) -> bool:
        return event.get("type") in ("response.completed", "response.incomplete")

    def fails(self, event: Mapping[str, Any]) -> bool:
        return event.get("type") in ("error", "response.failed", "response.cancelled")

    def renamed(self, event: dict[str, Any], name: str) -> dict[str, Any]:
        response = event.get("response")
        return event if not isinstance(response, dict) else {**event, "response": {**response, "model": name}}


class _Messages(UpstreamFace):
    """The events tell the prompt's tokens at the beginning and the output's at the end, each time as a whole."""

    members = _SHARED | {"max_tokens", "messages", "output_config", "stop_sequences", "system", "thinking", "top_k"}
    limit = "max_tokens"
    fixed: ClassVar[Mapping[str, object]] = {}

    def usage(self, told: Mapping[str, Any]) -> dict[str, Any]:
        said = _object(told.get("usage")) or _object(_object(told.get("message")).get("usage"))
        return {name: value for name, value in said.items() if value is not None}

    def counts(self, usage: Mapping[str, Any]) -> dict[str, Any]:
        """Here the prompt's tokens are told in three parts, by what the cache did."""
        cached = usage.get("cache_read_input_tokens", 0)
        parts = (usage.get("input_tokens"), cached, usage.get("cache_creation_input_tokens", 0))
        numbers = [part for part in parts if isinstance(part, int)]
        return _in_words_of_chat(usage, sum(numbers) if len(numbers) == len(parts) else None, cached)

    def says_something(self, event: Mapping[str, Any]) -> bool:
        return event.get("type") == "content_block_delta"

    def ends(self, event: Mapping[str, Any]) -> bool:
        return event.get("type") == "message_stop"

    def fails(self, event: Mapping[str, Any]) -> bool:
        return event.get("type") == "error"

    def renamed(self, event: dict[str, Any], name: str) -> dict[str, Any]:
        message = event.get("message")
        return event if not isinstance(message, dict) else {**event, "message": {**message, "model": name}}


FACES: Final[Mapping[str, UpstreamFace]] = {"/v1/responses": _Responses(), "/v1/messages": _Messages()}
