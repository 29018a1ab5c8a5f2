"""How a chat template takes tools and calls, learned from what it renders of a sample.

Rules:
- A format is known by a whole call that the template writes. A template that only mentions a mark shows nothing.
- The template takes calls if it shows the call and its result. One that lists no tools gets them in the system message.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

from lacre_backend.api.template.texts import Message, Tools
from lacre_backend.api.tools.format import CallFormat
from lacre_backend.api.tools.known import shown

_NAME, _ARGUMENTS, _RESULT = "get_tide", {"port": "Porto"}, "It rises."
TOOL: Final[Mapping[str, Any]] = {
    "type": "function",
    "function": {
        "name": _NAME,
        "description": "The tide now",
        "parameters": {"type": "object", "properties": {"port": {"type": "string"}}},
    },
}
UNDESCRIBED: Final[Mapping[str, Any]] = {
    "type": "function",
    "function": {name: value for name, value in TOOL["function"].items() if name != "description"},
}
_CALL: Final = {"id": "call00001", "type": "function", "function": {"name": _NAME, "arguments": _ARGUMENTS}}
USED: Final[tuple[Message, ...]] = (
    {"role": "user", "content": "Hello"},
    {"role": "assistant", "content": "", "tool_calls": [_CALL]},
    {"role": "tool", "content": _RESULT, "tool_call_id": "call00001", "name": _NAME},
)


@dataclass(frozen=True, slots=True)
class Manner:
    """How a template takes calls.

    as_text: arguments as JSON text, and not as an object. silent: null for the missing text beside calls. listed: whether the
    template lists the tools.
    """

    as_text: bool = False
    silent: bool = False
    listed: bool = True

    def applied(self, messages: Sequence[Message]) -> Sequence[Message]:
        return [self._applied(message) if message.get("tool_calls") else message for message in messages]

    def _applied(self, message: Message) -> Message:
        written = dict(message)
        if self.silent and not message.get("content"):
            written["content"] = None
        if self.as_text:
            written["tool_calls"] = [_with_text(call) for call in message["tool_calls"]]
        return written


def _with_text(call: Mapping[str, Any]) -> Mapping[str, Any]:
    arguments = call["function"]["arguments"]
    if isinstance(arguments, str):
        return call
    return {**call, "function": {**call["function"], "arguments": json.dumps(arguments, ensure_ascii=False)}}


USUAL: Final = Manner()
_MANNERS: Final = [Manner(as_text, silent) for as_text in (False, True) for silent in (False, True)]


def learned(outcome: Callable[[Sequence[Message], Tools], str]) -> tuple[CallFormat, Manner] | None:
    """The format in which a template writes calls, and how it takes them. outcome: renders a sample, or says why not."""
    told = outcome(USED[:1], (TOOL,))
    listed = _NAME in told
    for manner in _MANNERS:
        used = outcome(manner.applied(USED), (TOOL,) if listed else None)
        form = shown(_NAME, _ARGUMENTS, used)
        if form is not None and _RESULT in used and (listed or teachable(form)):
            return form, Manner(manner.as_text, manner.silent, listed)
    return None


def teachable(form: CallFormat) -> bool:
    """Whether instructions can show it in one line."""
    return type(form) is CallFormat and not form.lead


def described(tool: Mapping[str, Any]) -> dict[str, Any]:
    """With a description, at least an empty one. It stands behind the name, as templates write the members in order."""
    function = tool["function"]
    return {**tool, "function": {"name": function["name"], "description": "", **function}}
