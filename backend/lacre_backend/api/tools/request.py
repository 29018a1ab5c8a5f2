"""The functions that a request offers, which of them the model may call, and the calls of earlier turns.

Rules:
- A tool is a function. OpenAI's other kinds of tools are refused by name.
- Each message of role `tool` answers a call in the assistant's message before it, and each call has its answer.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Final, Literal

import pydantic_core
from pydantic import Field

from lacre_backend.api.errors import RequestRefused
from lacre_backend.api.parsed import Echoed, Parsed, has_infinite, validated

MAX_TOOLS: Final = 128  # OpenAI's
MAX_CALLS: Final = 64  # in one message
MAX_ID: Final = 256

MAX_NAME: Final = 128
ToolName = Annotated[str, Field(pattern=rf"^[a-zA-Z0-9_-]{{1,{MAX_NAME}}}$")]
# Members that clients add to a function or a call. No prompt depends on them.
_BOOKKEEPING: Final = frozenset(
    {"index", "parsed_arguments", "provider_specific_fields", "extra_content", "thought_signature", "cache_control"}
)
_NO_PARAMETERS: Final = {"type": "object", "properties": {}, "additionalProperties": False}


class Function(Echoed):
    """A function that the request offers.

    parameters: the JSON schema of the arguments; default: no arguments. strict: refuse a schema that cannot be enforced.
    """

    name: ToolName
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None

    def arguments(self) -> dict[str, Any]:
        return _NO_PARAMETERS if self.parameters is None else self.parameters


class Tool(Echoed):
    ignored = _BOOKKEEPING

    type: Literal["function"]
    function: Function

    def for_template(self) -> dict[str, Any]:
        """The form for templates. Empty members are omitted."""
        function = self.function
        described = {} if function.description is None else {"description": function.description}
        return {"type": "function", "function": {"name": function.name, **described, "parameters": function.arguments()}}


class FunctionCall(Echoed):
    """A function's name and arguments in a call. arguments: JSON, or what the model wrote instead."""

    ignored = _BOOKKEEPING

    name: ToolName
    arguments: str


class MessageToolCall(Echoed):
    """A call in an earlier message. type: there is only one, which some clients lose when they join a stream's pieces."""

    ignored = _BOOKKEEPING

    id: Annotated[str, Field(min_length=1, max_length=MAX_ID)]
    type: Literal["function"] = "function"
    function: FunctionCall

    def for_template(self) -> dict[str, Any]:
        """Templates write arguments as JSON themselves, so they get the object if it is one.

        Deep nesting, lone surrogates and infinite numbers are not accepted, as in a body; the arguments then stay text. An
        empty text, which some servers use for a call without arguments, is an empty object.
        """
        text = self.function.arguments
        try:
            arguments = pydantic_core.from_json(text if text.strip() else "{}", allow_inf_nan=False)
        except ValueError:
            arguments = text
        if has_infinite(arguments):
            arguments = text
        return {"id": self.id, "type": "function", "function": {"name": self.function.name, "arguments": arguments}}


class _Named(Parsed):
    name: ToolName


class _NamedTool(Parsed):
    type: Literal["function"]
    function: _Named


class _Allowed(Parsed):
    mode: Literal["auto", "required"]
    tools: Annotated[list[_NamedTool], Field(min_length=1, max_length=MAX_TOOLS)]


class _AllowedTools(Parsed):
    type: Literal["allowed_tools"]
    allowed_tools: _Allowed


@dataclass(frozen=True, slots=True)
class Calling:
    """What the model may do. tools: those that it is told about. callable: those that it may call, with their places in the
    request.

    required: whether it must call instead of writing text. many: whether an answer may have several calls; never if the request
    names the function.
    """

    tools: tuple[Tool, ...]
    callable: tuple[tuple[int, Function], ...]
    required: bool
    many: bool


def calling(tools: Sequence[Tool], choice: Any, *, many: bool) -> Calling | None:
    """choice: OpenAI's `tool_choice`, or None. Returns None if the model is told about no tool. Raises `RequestRefused`."""
    _check_choice_alone(tools, choice)
    names = [tool.function.name for tool in tools]
    for i, name in enumerate(names):
        if name in names[:i]:
            raise RequestRefused(f"Two tools are named '{name}'.", code="invalid_value", param=f"tools[{i}].function.name")
    if not tools or choice == "none":
        return None
    offered = tuple(enumerate(tool.function for tool in tools))
    if choice in (None, "auto", "required"):
        return Calling(tuple(tools), offered, choice == "required", many)
    allowed, required = _named(choice, names)
    once = isinstance(choice, dict) and choice.get("type") == "function"
    callable = tuple((i, each) for i, each in offered if each.name in allowed)
    return Calling(tuple(tools), callable, required, many and not once)


def _check_choice_alone(tools: Sequence[Tool], choice: Any) -> None:
    if not tools and choice not in (None, "none", "auto"):
        raise RequestRefused("'tool_choice' is only allowed when 'tools' are specified.", param="tool_choice")


def _named(choice: Any, names: Sequence[str]) -> tuple[list[str], bool]:
    """The names that a choice lists, and whether one must be called."""
    if isinstance(choice, str) or not isinstance(choice, dict):
        said = "Invalid 'tool_choice': value is not supported. Expected 'none', 'auto', 'required' or an object."
        raise RequestRefused(said, code="invalid_value", param="tool_choice")
    if choice.get("type") == "allowed_tools":
        allowed = validated(_AllowedTools, choice, at="tool_choice").allowed_tools
        listed, required = [tool.function.name for tool in allowed.tools], allowed.mode == "required"
    else:
        listed, required = [validated(_NamedTool, choice, at="tool_choice").function.name], True
    for name in listed:
        if name not in names:
            said = f"'tool_choice' names '{name}', which is not in 'tools'."
            raise RequestRefused(said, code="invalid_value", param="tool_choice")
    return listed, required
