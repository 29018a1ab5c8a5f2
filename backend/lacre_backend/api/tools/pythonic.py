"""Calls as Python writes them, in a list: `[get_tide(port="Porto"), now()]`. Llama 4 and LFM2.

Rules:
- A call's arguments come out together, as JSON, when the call is whole. What is no Python stays as the model wrote it.
- The grammar allows arguments in the order of the schema's properties. Texts are JSON texts, which Python reads alike, or stand
  between single quotes if their schema does not limit them.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Iterator, Mapping
from typing import Any, Final

import pydantic_core

from lacre_backend.api.schema.grammar import Grammars, literal
from lacre_backend.api.tools.format import START, AnswerPlace, CallFormat
from lacre_backend.api.tools.parts import Argued, Part
from lacre_backend.api.tools.reader import CallReader
from lacre_backend.api.tools.request import Calling, Function
from lacre_backend.api.tools.tagged import is_text, listed, properties, unlimited, value_rule

MAX_DEPTH: Final = 64  # of arguments; deeper ones stay as the model wrote them
_WORDS: Final[Mapping[str, Any]] = {"True": True, "False": False, "None": None, "true": True, "false": False, "null": None}
_NAME: Final = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
_KEY: Final = re.compile(r"\s*([A-Za-z_][A-Za-z0-9_]*)\s*=")
_CLOSED: Final[Mapping[str, str]] = {"[": "]", "(": ")", "{": "}"}
_STRING: Final = re.compile(r"'(?:[^'\\]|\\.)*+'|\"(?:[^\"\\]|\\.)*+\"", re.DOTALL)
_BARE: Final = re.compile(r"[^,:\[\](){}'\"]+")
_ESCAPE: Final = re.compile(r"\\(x[0-9a-fA-F]{2}|u[0-9a-fA-F]{4}|U[0-9a-fA-F]{8}|.)", re.DOTALL)
_ESCAPES: Final[Mapping[str, str]] = {"n": "\n", "t": "\t", "r": "\r", "b": "\b", "f": "\f", "/": "/", "\n": "",
                                      "\\": "\\", "'": "'", '"': '"'}  # fmt: skip
_QUOTED: Final = r"py_quoted: /'(?:[^'\\\n]|\\[\\'\"nrt])*'/" + "\n"


class PythonicCalls(CallFormat):
    """A call is `name(key=value, ...)`."""

    def shows(self, name: str, arguments: Mapping[str, Any], text: str) -> bool:
        """Templates quote texts in either way, or not at all."""
        ways = (json.dumps, repr, str)
        return any(self.begin + self._told(name, arguments, way) + self.end in text for way in ways)

    def told(self, name: str, arguments: Mapping[str, Any]) -> str:
        """A call as the model writes it."""
        return self._told(name, arguments, repr)

    def _told(self, name: str, arguments: Mapping[str, Any], way: Any) -> str:
        return f"{name}({', '.join(f'{key}={way(value)}' for key, value in arguments.items())})"

    def grammar(self, grammars: Grammars, calling: Calling, speech: str | None, at: AnswerPlace = START) -> str:
        rules = CallFormat.grammar(self, grammars, calling, speech, at)
        return rules + _QUOTED if "py_quoted" in rules else rules

    def _call_of(self, grammars: Grammars, i: int, function: Function) -> str:
        schema, param = function.arguments(), f"tools[{i}].function.parameters"
        required, strict = schema.get("required") or (), bool(function.strict)
        members = [
            (f"{literal(key + '=')} {_value_of(grammars, schema, each, param, strict=strict)}", key in required)
            for key, each in properties(schema).items()
            if _NAME.fullmatch(key)  # no other name can stand before a `=`
        ]
        return f"({literal(function.name + self.middle)} ({listed(members, ', ')}))"


def _value_of(grammars: Grammars, root: Mapping[str, Any], schema: Any, param: str, *, strict: bool) -> str:
    if isinstance(schema, dict) and schema.get("type") == "boolean":
        return '("True" | "False" | "true" | "false")'
    rule = value_rule(grammars, root, schema, param, strict=strict)
    return f"({rule} | py_quoted)" if is_text(schema) and unlimited(schema) else rule


PYTHONIC: Final = PythonicCalls(begin="[", open="", middle="(", close=")", between=", ", end="]")  # Llama 3.2 and 4
LFM: Final = PythonicCalls(
    begin="<|tool_call_start|>[",
    open="",
    middle="(",
    close=")",
    between=", ",
    end="]<|tool_call_end|>",
    marker="<|tool_call_start|>",
    markers=("<|tool_call_start|>", "<|tool_call_end|>", "<|tool_response_start|>", "<|tool_response_end|>"),
)


class PythonicReader(CallReader):
    """Parses one answer with such calls."""

    def _arguments(self) -> Iterator[Part]:
        end = _end(self._held)
        if end >= 0:
            text, self._held = self._held[:end], self._held[end:]
            self._state = self._closing
            yield Argued(self._index, as_json(text))


def _end(text: str) -> int:
    """Where the bracket stands that closes the call; -1 if it has not come."""
    quote, escaped, depth = "", False, 0
    for i, character in enumerate(text):
        if quote:
            quote = "" if character == quote and not escaped else quote
            escaped = character == "\\" and not escaped
        elif character in "\"'":
            quote = character
        elif character == ")" and depth <= 0:
            return i
        else:
            depth += (character in "([{") - (character in ")]}")
    return -1


def as_json(text: str) -> str:
    """Arguments of a call as JSON. What is no list of Python's values by name stays as it is."""
    named: dict[str, Any] = {}
    at = 0
    try:
        while at < len(text) and _behind_space(text, at) < len(text):
            key = _KEY.match(text, at)
            if key is None:
                return text
            named[key[1]], at = _read(text, key.end(), 0)
            at = _behind_comma(text, at, "")
        told = json.dumps(named, ensure_ascii=False, allow_nan=False)
        told.encode()
    except ValueError:
        return text
    return told


def _read(text: str, at: int, depth: int) -> tuple[Any, int]:
    """The value that begins at a place, and where it ends. Raises ValueError."""
    at = _behind_space(text, at)
    if depth > MAX_DEPTH:
        raise ValueError
    if closed := _CLOSED.get(text[at : at + 1]):
        return _read_list(text, at + 1, closed, depth)
    if quoted := _STRING.match(text, at):
        return _ESCAPE.sub(_unescaped, quoted[0][1:-1]), quoted.end()
    bare = _BARE.match(text, at)
    word = "" if bare is None else bare[0].strip()
    if bare is None or not word:
        raise ValueError
    return _WORDS[word] if word in _WORDS else _number(word), bare.end()


def _read_list(text: str, at: int, closed: str, depth: int) -> tuple[Any, int]:
    each: list[Any] = []
    named: dict[str, Any] = {}
    at = _behind_space(text, at)
    while not text.startswith(closed, at):
        value, at = _read(text, at, depth + 1)
        if closed == "}":
            at = _behind_space(text, at)
            if not isinstance(value, str) or not text.startswith(":", at):
                raise ValueError
            named[value], at = _read(text, at + 1, depth + 1)
        else:
            each.append(value)
        at = _behind_comma(text, at, closed)
    return named if closed == "}" else each, at + 1


def _behind_space(text: str, at: int) -> int:
    while text[at : at + 1].isspace():
        at += 1
    return at


def _behind_comma(text: str, at: int, closed: str) -> int:
    """Where the next value begins, or the list ends. closed: what ends it; "" for the end of the text. Raises ValueError."""
    at = _behind_space(text, at)
    if text.startswith(",", at):
        return _behind_space(text, at + 1)
    if at < len(text) if closed == "" else not text.startswith(closed, at):
        raise ValueError
    return at


def _number(word: str) -> Any:
    """A number, or a text without its quotes."""
    try:
        return pydantic_core.from_json(word, allow_inf_nan=False)
    except ValueError:
        return word


def _unescaped(match: re.Match[str]) -> str:
    said = match[1]
    if said[0] in "xuU" and len(said) > 1:
        code = int(said[1:], 16)
        if code > sys.maxunicode:
            raise ValueError
        return chr(code)
    return _ESCAPES.get(said, match[0])
