"""Gemma 4's calls: like JSON, with bare names of members, and texts between marks of their own.

Rules:
- A call's arguments come out together, as JSON, when the call is whole: a mark inside of a text ends nothing.
- The members come in the order of their names, as the template writes them.
- Numbers, choices and texts are held to their schemas. A `strict` schema with anything else is refused by name.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from typing import Any, Final

import pydantic_core

from lacre_backend.api.errors import RequestRefused
from lacre_backend.api.schema.grammar import Grammars, literal
from lacre_backend.api.tools.format import START, AnswerPlace, CallFormat, in_pattern
from lacre_backend.api.tools.parts import Argued, Part
from lacre_backend.api.tools.reader import CallReader
from lacre_backend.api.tools.request import Calling, Function
from lacre_backend.api.tools.tagged import choices, is_text, listed, properties, unenforced

QUOTE: Final = '<|"|>'
MAX_DEPTH: Final = 64  # of arguments; deeper ones stay as the model wrote them
_SCALARS: Final = frozenset({"number", "integer", "boolean", "null"})
_BARE: Final = re.compile(r"[^,:{}\[\]]*")
_FREE: Final = f"""gemma_text[lazy]: /(?s:.*){in_pattern(QUOTE)}/
gemma_any: {literal(QUOTE)} gemma_text | /-?[0-9]+(\\.[0-9]+)?/ | "true" | "false" | "null" | gemma_members | gemma_items
gemma_members: "{{" (gemma_member ("," gemma_member)*)? "}}"
gemma_member: /[A-Za-z0-9_ .-]+/ ":" gemma_any
gemma_items: "[" (gemma_any ("," gemma_any)*)? "]"
"""


class GemmaCalls(CallFormat):
    """A call's arguments are no JSON until they are read."""

    def shows(self, name: str, arguments: Mapping[str, Any], text: str) -> bool:
        return self.told(name, arguments) in text

    def told(self, name: str, arguments: Mapping[str, Any]) -> str:
        """A call as the model writes it."""
        return f"{self.open}{name}{_told(arguments)}{self.close.removeprefix('}')}"

    def grammar(self, grammars: Grammars, calling: Calling, speech: str | None, at: AnswerPlace = START) -> str:
        return CallFormat.grammar(self, grammars, calling, speech, at) + _FREE

    def _call_of(self, grammars: Grammars, i: int, function: Function) -> str:
        schema, strict = function.arguments(), bool(function.strict)
        required = schema.get("required") or ()
        members = [
            (
                f"{literal(key + ':')} {_value_of(grammars, each, f'tools[{i}].function.parameters', strict=strict)}",
                key in required,
            )
            for key, each in sorted(properties(schema).items(), key=lambda item: item[0].lower())
        ]
        return f"({literal(function.name + self.middle)} ({listed(members, ',')}))"


def _value_of(grammars: Grammars, schema: Any, param: str, *, strict: bool) -> str:
    if is_text(schema):
        if among := choices(schema):
            return f"({' | '.join(literal(f'{QUOTE}{each}{QUOTE}') for each in among)})"
        unenforced(schema, param, strict=strict)
        return f"{literal(QUOTE)} gemma_text"
    if isinstance(schema, dict) and schema.get("type") in _SCALARS:
        return grammars.schema(schema, param, strict=strict)
    if strict:
        said = f"Invalid schema for {param}: this model's format of calls enforces texts, numbers and booleans alone."
        raise RequestRefused(said, code="invalid_value", param=param)
    return "gemma_any"


def _told(value: Any) -> str:
    match value:
        case str():
            return f"{QUOTE}{value}{QUOTE}"
        case dict():
            members = sorted(value.items(), key=lambda item: item[0].lower())
            return "{" + ",".join(f"{key}:{_told(each)}" for key, each in members) + "}"
        case list():
            return "[" + ",".join(map(_told, value)) + "]"
    return json.dumps(value)


GEMMA: Final = GemmaCalls(
    open="<|tool_call>call:",
    middle="{",
    close="}<tool_call|>",
    marker="<|tool_call>",
    markers=("<|tool_call>", "<tool_call|>", QUOTE, "<|tool_response>", "<tool_response|>", "<|tool>", "<tool|>"),
)


class GemmaReader(CallReader):
    """Parses one answer with such calls."""

    def _arguments(self) -> Iterator[Part]:
        end = _end(self._held, self._format.close)
        if end >= 0:
            text, self._held = "{" + self._held[:end] + "}", self._held[end:]
            self._state = self._closing
            yield Argued(self._index, as_json(text))


def _end(text: str, close: str) -> int:
    """Where the mark stands that is not inside of a text; -1 if it has not come."""
    place = 0
    while True:
        end, quote = text.find(close, place), text.find(QUOTE, place)
        if quote < 0 or 0 <= end < quote:
            return end
        place = text.find(QUOTE, quote + len(QUOTE)) + len(QUOTE)
        if place < quote + len(QUOTE):
            return -1


def as_json(text: str) -> str:
    """Arguments as JSON. What is not in Gemma's form stays as it is."""
    try:
        told, end = _read(text, 0, 0)
    except ValueError:
        return text
    return told if end == len(text) else text


def _read(text: str, at: int, depth: int) -> tuple[str, int]:
    """The value that begins at a place, as JSON, and where it ends. Raises ValueError."""
    if depth > MAX_DEPTH:
        raise ValueError
    if text.startswith(QUOTE, at):
        end = text.index(QUOTE, at + len(QUOTE))
        return json.dumps(text[at + len(QUOTE) : end], ensure_ascii=False), end + len(QUOTE)
    if text[at : at + 1] in ("{", "["):
        return _read_list(text, at, depth)
    found = _BARE.match(text, at)
    bare = "" if found is None else found[0].strip()
    try:
        pydantic_core.from_json(bare, allow_inf_nan=False)
    except ValueError:
        bare = json.dumps(bare, ensure_ascii=False)  # a text without its marks
    return bare, at if found is None else found.end()


def _read_list(text: str, at: int, depth: int) -> tuple[str, int]:
    opened = text[at]
    closed = "}" if opened == "{" else "]"
    told: list[str] = []
    at += 1
    while not text.startswith(closed, at):
        name = ""
        if opened == "{":
            key, at = _read_key(text, at)
            name = f"{json.dumps(key, ensure_ascii=False)}: "
        value, at = _read(text, at, depth + 1)
        told.append(name + value)
        if text.startswith(",", at):
            at += 1
        elif not text.startswith(closed, at):
            raise ValueError
    return opened + ", ".join(told) + closed, at + 1


def _read_key(text: str, at: int) -> tuple[str, int]:
    if text.startswith(QUOTE, at):
        end = text.index(QUOTE, at + len(QUOTE))
        return text[at + len(QUOTE) : end], text.index(":", end) + 1
    end = text.index(":", at)
    return text[at:end].strip(), end + 1
