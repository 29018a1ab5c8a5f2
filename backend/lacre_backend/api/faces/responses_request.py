"""Reads a request of OpenAI's Responses API, and writes it as a chat request.

Rules:
- Nothing is stored: the whole history comes in `input`. What needs a store (`previous_response_id`, `conversation`,
  `item_reference`, `store: true`) is refused by name, as is every tool that a server would run.
- Items of the assistant that follow one another are one message: its reasoning, its text, its calls.
- A `custom` tool takes a text. Models write JSON, so it becomes a function with one text. A tool of a `namespace` gets the
  namespace's name before its own. `ToolNames` leads back.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Annotated, Any, ClassVar, Final, Literal

import pydantic_core
from pydantic import BeforeValidator, Field

from lacre.wire.outer import MAX_TOKENS
from lacre_backend.api import media
from lacre_backend.api.errors import RequestRefused, unsupported
from lacre_backend.api.messages import MAX_MESSAGES, MAX_PARTS, MediaPart, check_turns
from lacre_backend.api.parsed import Echoed, Parsed, bare, json_object, missing, validated
from lacre_backend.api.requests import MAX_TOP_LOGPROBS, ChatCompletionRequest, Effort, check_named
from lacre_backend.api.tools.request import MAX_ID, MAX_NAME, MAX_TOOLS, ToolName

_STATELESS: Final = "Nothing is stored here: send the whole history as 'input'."
# Members that need a store.
_STORED: Final = ("previous_response_id", "conversation", "prompt")
# Members about the caller and its bookkeeping. No answer depends on them, and they are not stored.
_IGNORED: Final[Mapping[str, type]] = {
    "user": str,
    "safety_identifier": str,
    "prompt_cache_key": str,
    "prompt_cache_retention": str,
    "prompt_cache_options": dict,
    "client_metadata": dict,
    "max_tool_calls": int,  # of tools that a server runs
}
# Members that have no effect here at these values (null always among them). Other values are refused.
_INERT: Final[Mapping[str, tuple[Any, ...]]] = {
    "access_programs": (),
    "background": (False,),
    "background_options": (),
    "context_management": ([],),
    "image": (),
    "moderation": (),
    "service_tier": ("auto", "default"),
    "truncation": ("disabled",),
}
_SAME: Final = ("model", "stream", "temperature", "top_p", "parallel_tool_calls", "resume")
_LOGPROBS: Final = "message.output_text.logprobs"
_INCLUDED: Final = frozenset({_LOGPROBS, "reasoning.encrypted_content"})
_TOLD: Final = ("instructions", "metadata", "tools", "tool_choice", "text", "reasoning")
_TEXTS: Final = ("input_text", "output_text", "text", "summary_text", "reasoning_text")
INPUT: Final = "input"  # the argument of a custom tool
_ID = Annotated[str, Field(min_length=1, max_length=MAX_ID)]
MAX_METADATA: Final = 16  # OpenAI's, and so are the lengths; an answer repeats them
_Key = Annotated[str, Field(max_length=64)]
_Value = Annotated[str, Field(max_length=512)]
# Members that the API adds to its items.
_ADDED: Final = frozenset({"id", "status", "caller", "async", "phase"})


def _as_parts(value: Any) -> Any:
    return [{"type": "input_text", "text": value}] if isinstance(value, str) else value


_Parts = Annotated[tuple[Any, ...], BeforeValidator(_as_parts), Field(max_length=MAX_PARTS, strict=False)]


class _Item(Echoed):
    ignored: ClassVar[frozenset[str]] = _ADDED


class _Said(_Item):
    type: Literal["message"] = "message"
    role: Literal["user", "assistant", "system", "developer"]
    content: _Parts


class _Call(_Item):
    type: Literal["function_call"]
    call_id: _ID
    name: ToolName
    namespace: ToolName | None = None
    arguments: str


class _CustomCall(_Item):
    type: Literal["custom_tool_call"]
    call_id: _ID
    name: ToolName
    namespace: ToolName | None = None
    input: str


class _Output(_Item):
    ignored: ClassVar[frozenset[str]] = _ADDED | {"name", "namespace"}

    type: Literal["function_call_output", "custom_tool_call_output"]
    call_id: _ID
    output: _Parts


class _Reasoning(_Item):
    """encrypted_content: of another server; nothing here can read it."""

    type: Literal["reasoning"]
    summary: _Parts = ()
    content: _Parts | None = None
    encrypted_content: str | None = None


_Read = _Said | _Call | _CustomCall | _Output | _Reasoning
_KINDS: Final[Mapping[str, type[_Said | _Call | _CustomCall | _Output | _Reasoning]]] = {
    "message": _Said,
    "function_call": _Call,
    "custom_tool_call": _CustomCall,
    "function_call_output": _Output,
    "custom_tool_call_output": _Output,
    "reasoning": _Reasoning,
}


class _Tool(Echoed):
    ignored: ClassVar[frozenset[str]] = frozenset({"allowed_callers", "defer_loading", "output_schema", "async"})

    type: Literal["function"]
    name: ToolName
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None


class _Syntax(Echoed):
    type: Literal["text", "grammar"]
    syntax: Literal["lark", "regex"] | None = None
    definition: str | None = None


class _Custom(Echoed):
    ignored: ClassVar[frozenset[str]] = frozenset({"allowed_callers", "defer_loading", "async"})

    type: Literal["custom"]
    name: ToolName
    description: str | None = None
    format: _Syntax | None = None


class _Namespace(Echoed):
    type: Literal["namespace"]
    name: ToolName
    description: str | None = None
    tools: Annotated[tuple[Any, ...], Field(max_length=MAX_TOOLS, strict=False)]


class ToolNames(Parsed):
    """custom: the functions that stand for custom tools. spaces: namespace and name of each tool of a namespace."""

    custom: frozenset[str] = frozenset()
    spaces: Mapping[str, tuple[str, str]] = {}

    def of(self, name: str) -> dict[str, str]:
        """The members of a call that name its tool."""
        space, own = self.spaces.get(name, ("", name))
        return {"name": own, "namespace": space} if space else {"name": own}


class _Format(Echoed):
    type: Literal["text", "json_object", "json_schema"]
    name: str | None = None
    description: str | None = None
    schema_: Annotated[dict[str, Any] | None, Field(alias="schema")] = None
    strict: bool | None = None

    def as_response_format(self) -> dict[str, Any]:
        if self.type != "json_schema":
            return {"type": self.type}
        schema = {"name": self.name or "answer", "schema": self.schema_, "strict": self.strict}
        if self.schema_ is None:
            raise missing("text.format.schema")
        return {"type": "json_schema", "json_schema": schema}


class _Text(Echoed):
    format: _Format | None = None
    verbosity: Literal["medium"] | None = None


class _Effort(Echoed):
    """How much the model may reason, and what of it to show. Each is a wish: a model that does not reason ignores it."""

    ignored: ClassVar[frozenset[str]] = frozenset({"context", "mode"})

    effort: Effort | None = None
    summary: str | None = None
    generate_summary: str | None = None


class _StreamOptions(Echoed):
    include_obfuscation: bool = False  # accepted: the seal pads records, not this server


class _Body(Parsed):
    input: Any
    instructions: str | None = None
    max_output_tokens: Annotated[int, Field(ge=1, le=MAX_TOKENS)] | None = None
    include: Annotated[tuple[str, ...], Field(max_length=MAX_PARTS, strict=False)] = ()
    top_logprobs: Annotated[int, Field(ge=0, le=MAX_TOP_LOGPROBS)] | None = None
    tools: Annotated[tuple[Any, ...], Field(max_length=MAX_TOOLS, strict=False)] = ()
    tool_choice: Any = None
    text: _Text | None = None
    reasoning: _Effort | None = None
    metadata: Annotated[dict[_Key, _Value], Field(max_length=MAX_METADATA)] | None = None
    stream_options: _StreamOptions | None = None


class ResponsesRequest(ChatCompletionRequest):
    """`POST /v1/responses`, as the chat request that it amounts to. told: what the answer repeats of the request."""

    names: ToolNames
    told: dict[str, Any]

    @property
    def resumable(self) -> bool:
        """False with log probabilities: the last event repeats all of them, and another worker has none of the first."""
        return super().resumable and not self.logprobs

    def output_limit(self) -> tuple[str, int | None]:
        return "max_output_tokens", self.max_tokens


def parse_responses(body: bytes) -> ResponsesRequest:
    """Raises `RequestRefused`."""
    whole = json_object(body)
    for name in _STORED:
        if whole.pop(name, None) is not None:
            raise unsupported(name, _STATELESS)
    if whole.pop("store", None) not in (None, False):
        raise unsupported("store", _STATELESS)
    raw = bare(whole, _IGNORED, _INERT)
    same = {name: raw.pop(name) for name in _SAME if name in raw}
    if "input" not in raw:
        raise missing("input")
    read = validated(_Body, raw)
    for i, name in enumerate(read.include):
        if name not in _INCLUDED:
            raise RequestRefused(f"This server has no '{name}' to include.", code="unsupported_value", param=f"include[{i}]")
    items = list(_items(read.input))
    _check_calls(items)
    functions, names = _tools(read.tools)
    request = validated(
        ResponsesRequest,
        {
            **same,
            "messages": [*_instructions(read.instructions), *_messages(items)],
            "max_tokens": read.max_output_tokens,
            "tools": functions,
            "tool_choice": _choice(read.tool_choice),
            **(
                {}
                if read.text is None or read.text.format is None
                else {"response_format": read.text.format.as_response_format()}
            ),
            **({"logprobs": True, "top_logprobs": read.top_logprobs} if _LOGPROBS in read.include else {}),
            **({} if read.reasoning is None else {"reasoning_effort": read.reasoning.effort}),
            "names": names,
            "told": {
                name: whole.get(name) for name in ("instructions", "metadata", "tools", "tool_choice", "text", "reasoning")
            },
        },
    )
    check_turns(request.messages)
    check_named(request)
    return request


def _format(text: _Text | None) -> dict[str, Any]:
    return {} if text is None or text.format is None else {"response_format": text.format.as_response_format()}


def _instructions(text: str | None) -> list[dict[str, Any]]:
    return [] if text is None else [{"role": "system", "content": text}]


def _items(given: Any) -> Iterator[_Read]:
    if isinstance(given, str):
        given = [{"role": "user", "content": given}]
    if not isinstance(given, list) or not 0 < len(given) <= MAX_MESSAGES:
        said = f"Invalid 'input': expected a text, or an array of 1 to {MAX_MESSAGES} items."
        raise RequestRefused(said, code="invalid_value", param="input")
    for i, item in enumerate(given):
        path = f"input[{i}]"
        if not isinstance(item, dict):
            raise RequestRefused(f"Invalid type for '{path}': expected an object.", code="invalid_type", param=path)
        kind = item.get("type") or ("message" if "role" in item else None)
        if kind is None:
            raise missing(f"{path}.type")
        if kind == "item_reference":
            raise unsupported(f"{path}.type", _STATELESS)
        if not isinstance(kind, str) or kind not in _KINDS:
            raise RequestRefused(
                f"Items of this type are not supported: '{kind}'.", code="unsupported_value", param=f"{path}.type"
            )
        read = validated(_KINDS[kind], item, at=path)
        if isinstance(read, _Call | _CustomCall):
            _check_name(_flat(read.namespace, read.name), f"{path}.name")
        if isinstance(read, _Said) and read.role == "user":
            content = tuple(_with_media(part, f"{path}.content[{j}]") for j, part in enumerate(read.content))
            read = read.model_copy(update={"content": content})
        for name in ("content", "output", "summary"):
            _text(getattr(read, name, None) or (), f"{path}.{name}")  # texts alone, and a user's media
        yield read


def _with_media(part: Any, at: str) -> Any:
    known = isinstance(part, dict) and part.get("type") in media.PARTS
    return MediaPart.of(media.of_responses(part, at)) if known else part


def _check_name(name: str, at: str) -> None:
    if len(name) > MAX_NAME:
        raise RequestRefused(f"The tool '{name}' has too long a name with its namespace.", param=at)


def _check_calls(items: Sequence[_Read]) -> None:
    """Each call has its output behind it, before anything else is said, and each output its call. Raises `RequestRefused`."""
    waiting: list[str] = []
    begun = False  # an output has come for one of them
    for i, item in enumerate(items):
        if isinstance(item, _Output):
            if item.call_id not in waiting:
                raise RequestRefused(f"The output for '{item.call_id}' answers no call before it.", param=f"input[{i}].call_id")
            waiting.remove(item.call_id)
            begun = True
            continue
        if waiting and (begun or (isinstance(item, _Said) and item.role != "assistant")):
            break
        begun = False
        waiting += [item.call_id] if isinstance(item, _Call | _CustomCall) else []
    if waiting:
        raise RequestRefused(f"The call '{waiting[0]}' has no output behind it.", param="input")


def _text(parts: Sequence[Any], at: str = "") -> str:
    """The parts' text. at: where they stand, for errors. Raises `RequestRefused`."""
    texts = []
    for i, part in enumerate(parts):
        path = f"{at}[{i}]"
        if isinstance(part, MediaPart):
            continue
        if not isinstance(part, dict):
            raise RequestRefused(f"Invalid type for '{path}': expected an object.", code="invalid_type", param=path)
        kind = part.get("type")
        text = part.get("refusal") if kind == "refusal" else part.get("text")
        if kind not in (*_TEXTS, "refusal"):
            raise media.misplaced(path) if kind in media.PARTS else media.not_read(kind, path)
        if not isinstance(text, str):
            raise RequestRefused(
                f"Invalid type for '{path}.text': expected a string.", code="invalid_type", param=f"{path}.text"
            )
        texts.append(text)
    return "".join(texts)


def _content(parts: Sequence[Any]) -> Any:
    """The text; with media, the parts in their order."""
    if not any(isinstance(part, MediaPart) for part in parts):
        return _text(parts)
    return [part if isinstance(part, MediaPart) else {"type": "text", "text": _text([part])} for part in parts]


def _messages(items: Sequence[_Read]) -> Iterator[dict[str, Any]]:
    """The chat messages that the items amount to."""
    turn: dict[str, Any] | None = None  # of the assistant, which may go on
    for item in items:
        match item:
            case _Output():
                if turn is not None:
                    yield turn
                turn = None
                yield {"role": "tool", "tool_call_id": item.call_id, "content": _text(item.output)}
            case _Said() if item.role != "assistant":
                if turn is not None:
                    yield turn
                turn = None
                yield {"role": item.role, "content": _content(item.content)}
            case _:
                turn = _extended(turn or {"role": "assistant", "content": ""}, item)
    if turn is not None:
        yield turn


def _extended(turn: dict[str, Any], item: _Said | _Call | _CustomCall | _Reasoning) -> dict[str, Any]:
    match item:
        case _Said():
            return {**turn, "content": turn["content"] + _text(item.content)}
        case _Reasoning():
            thought = _text(item.content or item.summary)
            return {**turn, "reasoning_content": turn.get("reasoning_content", "") + thought} if thought else turn
        case _Call():
            arguments = item.arguments
        case _CustomCall():
            arguments = json.dumps({INPUT: item.input}, ensure_ascii=False)
    call = {"id": item.call_id, "function": {"name": _flat(item.namespace, item.name), "arguments": arguments}}
    return {**turn, "tool_calls": [*turn.get("tool_calls", ()), call]}


def _flat(namespace: str | None, name: str) -> str:
    return f"{namespace}__{name}" if namespace else name


def _tools(given: Sequence[Any]) -> tuple[list[dict[str, Any]], ToolNames]:
    functions: list[dict[str, Any]] = []
    custom: set[str] = set()
    spaces: dict[str, tuple[str, str]] = {}
    for path, space, tool in _offered(given, "tools"):
        read = tool
        name = _flat(space, read.name)
        if space:
            spaces[name] = space, read.name
        if isinstance(read, _Custom):
            custom.add(name)
            functions.append(_text_function(name, read))
        else:
            shape = {"name": name, "description": read.description, "parameters": read.parameters, "strict": read.strict}
            functions.append({"type": "function", "function": shape})
        _check_name(name, f"{path}.name")
    return functions, ToolNames(custom=frozenset(custom), spaces=spaces)


def _offered(given: Sequence[Any], at: str) -> Iterator[tuple[str, str, _Tool | _Custom]]:
    """The tools with their paths and namespaces."""
    for i, tool in enumerate(given):
        path = f"{at}[{i}]"
        kind = tool.get("type") if isinstance(tool, dict) else None
        if kind == "namespace" and at == "tools":
            space = validated(_Namespace, tool, at=path)
            yield from ((each, space.name, read) for each, _, read in _offered(space.tools, f"{path}.tools"))
        elif kind == "custom":
            yield path, "", validated(_Custom, tool, at=path)
        elif kind == "function" or not isinstance(kind, str):
            yield path, "", validated(_Tool, tool, at=path)
        else:
            said = f"This server runs no tool '{kind}'. Turn it off in your program, or offer functions of your own."
            raise unsupported(f"{path}.type", said)


def _text_function(name: str, tool: _Custom) -> dict[str, Any]:
    syntax = tool.format
    told = [tool.description] if tool.description else []
    if syntax is not None and syntax.definition:
        told.append(f"Its input is in this {syntax.syntax or 'lark'} grammar:\n{syntax.definition}")
    parameters = {
        "type": "object",
        "properties": {INPUT: {"type": "string"}},
        "required": [INPUT],
        "additionalProperties": False,
    }
    return {"type": "function", "function": {"name": name, "description": "\n".join(told) or None, "parameters": parameters}}


def _choice(choice: Any) -> Any:
    """In the words of a chat's `tool_choice`. What is not understood passes unchanged, and is refused there."""
    match choice:
        case {"type": "function" | "custom", "name": str(name), **rest}:
            return {"type": "function", "function": {"name": _flat(_space(rest), name)}}
        case {"type": "allowed_tools", "mode": mode, "tools": list(tools)}:
            return {"type": "allowed_tools", "allowed_tools": {"mode": mode, "tools": [_choice(tool) for tool in tools]}}
    return choice


def _space(rest: Mapping[Any, Any]) -> str | None:
    space = rest.get("namespace")
    return space if isinstance(space, str) else None


def custom_input(arguments: str) -> str:
    """The text of a custom tool's call. If the limit cut the call, as much as was said."""
    try:
        read = pydantic_core.from_json(arguments or "{}", allow_partial="trailing-strings")
    except ValueError:
        return arguments
    said = read.get(INPUT) if isinstance(read, dict) else None
    return said if isinstance(said, str) else arguments
