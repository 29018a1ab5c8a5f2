"""Reads a request of Anthropic's Messages API, and writes it as a chat request.

Rules:
- A member that this server does not support is refused by name, as in `lacre_backend.api.requests`.
- Results of tools come first in the user's turn that holds them: templates want them right behind the calls.
- Consecutive turns of one role become one turn, as the API says. A last turn of the assistant is the beginning of the answer.
- Reasoning comes back as text. A `signature` means nothing here, and a redacted block has no text.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Annotated, Any, ClassVar, Final, Literal

from pydantic import BeforeValidator, Field

from lacre_backend.api import media
from lacre_backend.api.errors import RequestRefused, unsupported
from lacre_backend.api.messages import MAX_MESSAGES, MAX_PARTS, MediaPart, check_turns
from lacre_backend.api.parsed import Echoed, Parsed, bare, json_object, missing, validated
from lacre_backend.api.requests import MAX_STOP, MAX_STOP_LENGTH, ChatCompletionRequest, check_beginning, check_named
from lacre_backend.api.template.wishes import SWITCHES
from lacre_backend.api.tools.request import MAX_ID, MAX_TOOLS, ToolName

# Members about the caller, its account and its bookkeeping. No answer depends on them, and they are not stored.
_IGNORED: Final[Mapping[str, type]] = {
    "metadata": dict,
    "cache_control": dict,
    "diagnostics": dict,
    "user_profile_id": str,
    "workspace_id": str,
}
# Members that have no effect here at these values (null always among them). Other values are refused.
_INERT: Final[Mapping[str, tuple[Any, ...]]] = {
    "service_tier": ("auto", "standard_only"),
    "speed": ("standard",),
    "container": (),
    "inference_geo": (),
    "mcp_servers": ([],),
    "context_management": ({"edits": []},),
}
_SAME: Final = ("model", "max_tokens", "stream", "temperature", "top_p", "top_k", "resume")
_CHOICES: Final = {"auto": "auto", "any": "required", "none": "none"}
_SWITCHED: Final = {"enabled": True, "disabled": False}
_ID = Annotated[str, Field(min_length=1, max_length=MAX_ID)]


def _as_blocks(value: Any) -> Any:
    return [{"type": "text", "text": value}] if isinstance(value, str) else value


_Blocks = Annotated[tuple[Any, ...], BeforeValidator(_as_blocks), Field(max_length=MAX_PARTS, strict=False)]


class _Cached(Echoed):
    """A value that may be marked for caching: the cache works without marks."""

    ignored: ClassVar[frozenset[str]] = frozenset({"cache_control", "citations"})


class _Text(_Cached):
    type: Literal["text"]
    text: str


class _ToolUse(_Cached):
    ignored: ClassVar[frozenset[str]] = frozenset({"cache_control", "caller", "toolset_name"})

    type: Literal["tool_use"]
    id: _ID
    name: ToolName
    input: dict[str, Any]


class _ToolResult(_Cached):
    ignored: ClassVar[frozenset[str]] = frozenset({"cache_control", "toolset_name"})

    type: Literal["tool_result"]
    tool_use_id: _ID
    content: _Blocks = ()
    is_error: bool = False


class _Thinking(_Cached):
    type: Literal["thinking"]
    thinking: str
    signature: str = ""


class _Redacted(_Cached):
    type: Literal["redacted_thinking"]
    data: str = ""


_Block = _Text | _ToolUse | _ToolResult | _Thinking | _Redacted | MediaPart
_KINDS: Final[Mapping[str, Mapping[str, type[_Text | _ToolUse | _ToolResult | _Thinking | _Redacted]]]] = {
    "system": {"text": _Text},
    "tool_result": {"text": _Text},
    "user": {"text": _Text, "tool_result": _ToolResult},
    "assistant": {"text": _Text, "tool_use": _ToolUse, "thinking": _Thinking, "redacted_thinking": _Redacted},
}
_IMAGE: Final = "image"
_KNOWN: Final = frozenset(kind for kinds in _KINDS.values() for kind in kinds)


class _Turn(Echoed):
    """One turn. content: blocks, each read by its kind."""

    ignored: ClassVar[frozenset[str]] = frozenset(
        {"id", "type", "model", "stop_reason", "stop_sequence", "stop_details", "usage", "container", "diagnostics"}
    )  # of a whole answer that is sent back

    role: Literal["user", "assistant", "system"]
    content: _Blocks


class _Thought(Echoed):
    """How much the model may think. Each is a wish: a model that does not reason spends nothing on it."""

    type: Literal["enabled", "disabled", "adaptive", "between_tools"]
    budget_tokens: Annotated[int, Field(ge=1)] | None = None
    display: Literal["summarized", "omitted"] | None = None


class _Format(Echoed):
    type: Literal["json_schema"]
    schema_: Annotated[dict[str, Any], Field(alias="schema")]


class _Output(Echoed):
    effort: Literal["low", "medium", "high", "xhigh", "max"] | None = None
    format: _Format | None = None


class _ToolChoice(Echoed):
    type: Literal["auto", "any", "tool", "none"]
    name: ToolName | None = None
    disable_parallel_tool_use: bool = False


class _Tool(Echoed):
    ignored: ClassVar[frozenset[str]] = frozenset(
        {"cache_control", "eager_input_streaming", "defer_loading", "allowed_callers"}
    )

    type: Literal["custom"] = "custom"
    name: ToolName
    description: str | None = None
    input_schema: dict[str, Any]
    input_examples: Annotated[tuple[dict[str, Any], ...], Field(max_length=MAX_PARTS, strict=False)] = ()
    strict: bool | None = None

    def as_function(self) -> dict[str, Any]:
        examples = [f"An example of its arguments: {json.dumps(each, ensure_ascii=False)}" for each in self.input_examples]
        told = "\n".join([*([self.description] if self.description else []), *examples])
        function = {"name": self.name, "description": told or None, "parameters": self.input_schema, "strict": self.strict}
        return {"type": "function", "function": function}


class _Body(Parsed):
    """What a request asks, and what it says."""

    messages: Annotated[list[Any], Field(min_length=1, max_length=MAX_MESSAGES)]
    system: _Blocks = ()
    stop_sequences: Annotated[
        tuple[Annotated[str, Field(min_length=1, max_length=MAX_STOP_LENGTH)], ...], Field(max_length=MAX_STOP, strict=False)
    ] = ()
    tools: Annotated[tuple[Any, ...], Field(max_length=MAX_TOOLS, strict=False)] = ()
    tool_choice: _ToolChoice | None = None
    thinking: _Thought | None = None
    output_config: _Output | None = None


class MessagesRequest(ChatCompletionRequest):
    """`POST /v1/messages`, as the chat request that it amounts to."""


def parse_messages(body: bytes) -> MessagesRequest:
    """Raises `RequestRefused`."""
    raw = bare(json_object(body), _IGNORED, _INERT)
    same = {name: raw.pop(name) for name in _SAME if name in raw}
    read = validated(_Body, raw)
    turns = list(_merged(_turns(read.messages)))
    _check_calls(turns)
    goes_on = turns[-1][0] == "assistant"
    request = validated(
        MessagesRequest,
        {
            **same,
            "messages": [*_system(read.system), *(message for role, blocks in turns for message in _messages(role, blocks))],
            "stop": read.stop_sequences,
            "tools": list(_tools(read.tools)),
            "continue_final_message": goes_on,
            **_calling(read.tool_choice),
            **_format(read.output_config),
            **_wishes(read.thinking, read.output_config),
        },
    )
    check_turns(request.messages)
    check_beginning(request)
    check_named(request)
    return request


def _turns(raw: Sequence[Any]) -> Iterator[tuple[str, list[_Block]]]:
    for i, each in enumerate(raw):
        turn = validated(_Turn, each, at=f"messages[{i}]")
        yield turn.role, list(_blocks(turn.role, turn.content, f"messages[{i}].content"))


def _blocks(role: str, raw: Sequence[Any], at: str) -> Iterator[_Block]:
    kinds = _KINDS[role]
    for i, block in enumerate(raw):
        path = f"{at}[{i}]"
        if not isinstance(block, dict):
            raise RequestRefused(f"Invalid type for '{path}': expected an object.", code="invalid_type", param=path)
        kind = block.get("type")
        if kind is None:
            raise missing(f"{path}.type")
        if kind == _IMAGE and role == "user":
            yield MediaPart.of(media.of_messages(block, path))
            continue
        if kind == _IMAGE:
            raise media.misplaced(path)
        if not isinstance(kind, str) or kind not in _KNOWN:
            raise media.not_read(kind, path)
        if kind not in kinds:
            raise RequestRefused(f"A block '{kind}' does not belong to the role '{role}'.", param=f"{path}.type")
        read = validated(kinds[kind], block, at=path)
        if isinstance(read, _ToolResult):
            list(_blocks("tool_result", read.content, f"{path}.content"))  # texts alone
        yield read


def _merged(turns: Iterator[tuple[str, list[_Block]]]) -> Iterator[tuple[str, list[_Block]]]:
    role, blocks = "", list[_Block]()
    for next_role, more in turns:
        if next_role == role:
            blocks += more
            continue
        if role:
            yield role, blocks
        role, blocks = next_role, more
    yield role, blocks


def _check_calls(turns: Sequence[tuple[str, Sequence[_Block]]]) -> None:
    """Each call has its result in the next turn, and each result its call. Raises `RequestRefused`."""
    waiting: list[str] = []
    for _, blocks in turns:
        results = [block.tool_use_id for block in blocks if isinstance(block, _ToolResult)]
        for name in results:
            if name not in waiting:
                raise RequestRefused(
                    f"The tool_result for '{name}' answers no tool_use of the turn before it.", param="messages"
                )
            waiting.remove(name)
        if waiting:
            break
        waiting = [block.id for block in blocks if isinstance(block, _ToolUse)]
    if waiting:
        raise RequestRefused(f"The tool_use '{waiting[0]}' has no tool_result in the turn behind it.", param="messages")


def _system(raw: Sequence[Any]) -> list[dict[str, Any]]:
    texts = [{"type": "text", "text": block.text} for block in _blocks("system", raw, "system") if isinstance(block, _Text)]
    return [{"role": "system", "content": texts}] if texts else []


def _messages(role: str, blocks: Sequence[_Block]) -> Iterator[dict[str, Any]]:
    """The chat messages of a turn."""
    for block in blocks:
        if isinstance(block, _ToolResult):
            said = "".join(part["text"] for part in block.content)
            yield {"role": "tool", "tool_call_id": block.tool_use_id, "content": f"Error: {said}" if block.is_error else said}
    texts: list[Any] = [
        block if isinstance(block, MediaPart) else {"type": "text", "text": block.text}
        for block in blocks
        if isinstance(block, _Text | MediaPart)
    ]
    calls = [
        {"id": block.id, "function": {"name": block.name, "arguments": json.dumps(block.input, ensure_ascii=False)}}
        for block in blocks
        if isinstance(block, _ToolUse)
    ]
    thoughts = "\n".join(block.thinking for block in blocks if isinstance(block, _Thinking))
    if texts or calls or role == "assistant":
        message: dict[str, Any] = {"role": role, "content": texts or (None if calls else "")}
        yield message | ({"tool_calls": calls} if calls else {}) | ({"reasoning_content": thoughts} if thoughts else {})
    elif not any(isinstance(block, _ToolResult) for block in blocks):
        yield {"role": role, "content": ""}


def _tools(raw: Sequence[Any]) -> Iterator[dict[str, Any]]:
    for i, tool in enumerate(raw):
        kind = tool.get("type") if isinstance(tool, dict) else None
        if isinstance(kind, str) and kind != "custom":
            raise unsupported(f"tools[{i}].type", f"This server runs no tool '{kind}'. Offer tools of your own.")
        yield validated(_Tool, tool, at=f"tools[{i}]").as_function()


def _calling(choice: _ToolChoice | None) -> dict[str, Any]:
    if choice is None:
        return {}
    if choice.type == "tool":
        if choice.name is None:
            raise missing("tool_choice.name")
        named: Any = {"type": "function", "function": {"name": choice.name}}
    else:
        named = _CHOICES[choice.type]
    return {"tool_choice": named, "parallel_tool_calls": not choice.disable_parallel_tool_use}


def _wishes(thought: _Thought | None, output: _Output | None) -> dict[str, Any]:
    wished: dict[str, Any] = {}
    if output is not None and output.effort is not None:
        wished["reasoning_effort"] = output.effort
    if thought is not None and thought.type in _SWITCHED:
        wished["chat_template_kwargs"] = dict.fromkeys(SWITCHES, _SWITCHED[thought.type])
    if thought is not None and thought.budget_tokens is not None:
        wished["max_reasoning_tokens"] = thought.budget_tokens
    return wished


def _format(output: _Output | None) -> dict[str, Any]:
    if output is None or output.format is None:
        return {}
    return {
        "response_format": {
            "type": "json_schema",
            "json_schema": {"name": "answer", "schema": output.format.schema_, "strict": True},
        }
    }
