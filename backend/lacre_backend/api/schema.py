"""JSON schemas as grammars (GBNF), for `response_format`.

Rules
- A schema is translated whole or refused: a keyword that the grammar could not enforce is named in the error, never ignored.
  Annotations (title, description, ...) are no constraints.
- What the grammar admits is valid under the schema; it may be less. Properties come in the schema's order, and none that the
  schema does not name.
- Repetitions, depth and size are bounded: a schema is input from outside, and llama.cpp unrolls repetitions.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any, Final

from lacre_backend.api.errors import RequestRefused

MAX_NODES: Final = 1000  # schemas inside a schema; each becomes a few rules
MAX_DEPTH: Final = 32  # nesting, long before Python's own limit
MAX_REPEAT: Final = 256  # llama.cpp unrolls x{m,n} into n rules
_PARAM: Final = "response_format"

_ANNOTATIONS: Final = frozenset(
    {"title", "description", "default", "examples", "deprecated", "readOnly", "writeOnly", "$schema", "$id", "$comment"}
)
_DEFINITIONS: Final = ("$defs", "definitions")
_KEYWORDS: Final[Mapping[str, frozenset[str]]] = {
    "object": frozenset({"properties", "required", "additionalProperties"}),
    "array": frozenset({"items", "minItems", "maxItems"}),
    "string": frozenset({"minLength", "maxLength", "format"}),
    "integer": frozenset(),
    "number": frozenset(),
    "boolean": frozenset(),
    "null": frozenset(),
}
_ALL_TYPES: Final = tuple(_KEYWORDS)

_NOTHING: Final = '""'

# White space is bounded, or a model may write blanks until its limit.
_PRIMITIVES: Final[Mapping[str, str]] = {
    "ws": r'| " " | "\n" [ \t]{0,20}',
    "char": r'[^"\\\x7F\x00-\x1F] | [\\] (["\\/bfnrt] | "u" [0-9a-fA-F]{4})',
    "string": r'"\"" char* "\""',
    "integer": r'"-"? ("0" | [1-9] [0-9]{0,15})',
    "number": r'integer ("." [0-9]{1,15})? ([eE] [-+]? [0-9]{1,2})?',
    "boolean": r'"true" | "false"',
    "null": r'"null"',
    "value": "object | array | string | number | boolean | null",
    "object": r'"{" ws (string ":" ws value ("," ws string ":" ws value)*)? ws "}"',
    "array": r'"[" ws (value ("," ws value)*)? ws "]"',
    "date": r'[0-9]{4} "-" ("0" [1-9] | "1" [0-2]) "-" ("0" [1-9] | [12] [0-9] | "3" [01])',
    "time": r'hour ":" [0-5] [0-9] ":" [0-5] [0-9] ("." [0-9]{1,6})? ("Z" | [-+] hour ":" [0-5] [0-9])',
    "hour": r'[01] [0-9] | "2" [0-3]',
}
_FORMATS: Final[Mapping[str, str]] = {
    "date": r'"\"" date "\""',
    "time": r'"\"" time "\""',
    "date-time": r'"\"" date "T" time "\""',
    "uuid": r'"\"" [0-9a-f]{8} "-" [0-9a-f]{4} "-" [0-9a-f]{4} "-" [0-9a-f]{4} "-" [0-9a-f]{12} "\""',
}


def any_object() -> str:
    """The grammar of `json_object`: any one JSON object."""
    return _text({"root": "object"})


def grammar(schema: Mapping[str, Any]) -> str:
    """The grammar of a JSON schema. Raises `RequestRefused`."""
    return _Translation(schema).text()


def _text(rules: Mapping[str, str]) -> str:
    return "\n".join(f"{name} ::= {rule}" for name, rule in {**_PRIMITIVES, **rules}.items())


def _refused(problem: str) -> RequestRefused:
    return RequestRefused(f"Invalid schema for response_format: {problem}.", param=_PARAM)


def _constant(value: Any) -> str:
    """A JSON value as a GBNF literal: JSON's escapes first, then GBNF's."""
    data = json.dumps(value, ensure_ascii=False, separators=(",", ":"))
    return '"' + data.replace("\\", "\\\\").replace('"', '\\"') + '"'


class _Translation:
    """One schema on its way to rules. Rule names are made here, never taken out of the schema."""

    def __init__(self, schema: Mapping[str, Any]) -> None:
        self._schema = schema
        self._rules: dict[str, str] = {}
        self._refs = {"#": "root"}  # JSON pointer -> rule
        self._nodes = 0
        self._rules["root"] = _NOTHING
        self._rules["root"] = self._visit(schema, "schema", 0)

    def text(self) -> str:
        return _text(self._rules)

    def _new(self, rule: str) -> str:
        name = f"r{len(self._rules)}"
        self._rules[name] = rule
        return name

    def _visit(self, schema: Any, path: str, depth: int) -> str:
        """The name of a rule for `schema`."""
        self._nodes += 1
        if self._nodes > MAX_NODES or depth > MAX_DEPTH:
            raise _refused(f"more than {MAX_NODES} parts or {MAX_DEPTH} levels")
        if schema is True:
            return "value"
        if not isinstance(schema, dict):
            raise _refused(f"{path} is not a schema")
        keys = schema.keys() - _ANNOTATIONS - set(_DEFINITIONS if depth == 0 else ())
        if "$ref" in keys:
            self._only(keys, {"$ref"}, path)
            return self._ref(schema["$ref"], path)
        if "anyOf" in keys:
            self._only(keys, {"anyOf"}, path)
            return self._any_of(schema["anyOf"], path, depth)
        for keyword in ("enum", "const"):
            if keyword in keys:
                self._only(keys, {keyword, "type"}, path)
                return self._enum(schema["enum"] if keyword == "enum" else [schema["const"]], self._types(schema, path), path)
        return self._visit_types(schema, keys, path, depth)

    def _visit_types(self, schema: Mapping[str, Any], keys: set[str], path: str, depth: int) -> str:
        types = self._types(schema, path)
        if "type" not in keys:
            # A schema without a type that uses one type's keywords means that type, as everyone writes it.
            types = tuple(t for t in _ALL_TYPES if keys and keys <= _KEYWORDS[t]) or types
            if not keys:
                return "value"
        self._only(keys, {"type"}.union(*(_KEYWORDS[t] for t in types)), path)
        return self._union([self._visit_type(t, schema, path, depth) for t in types])

    def _visit_type(self, type_name: str, schema: Mapping[str, Any], path: str, depth: int) -> str:
        match type_name:
            case "object":
                return self._object(schema, path, depth)
            case "array":
                return self._array(schema, path, depth)
            case "string":
                return self._string(schema, path)
        return type_name

    def _types(self, schema: Mapping[str, Any], path: str) -> tuple[str, ...]:
        types = schema.get("type", list(_ALL_TYPES))
        types = [types] if isinstance(types, str) else types
        if not isinstance(types, list) or not types or not all(isinstance(t, str) and t in _KEYWORDS for t in types):
            raise _refused(f"{path}.type is none of {', '.join(_ALL_TYPES)}")
        return tuple(types)

    def _only(self, keys: set[str], allowed: set[str], path: str) -> None:
        if extra := sorted(keys - allowed):
            raise _refused(f"{path} uses '{extra[0]}', which is not supported there")

    def _union(self, names: list[str]) -> str:
        return names[0] if len(names) == 1 else self._new(" | ".join(names))

    # Keywords that stand alone

    def _ref(self, pointer: Any, path: str) -> str:
        if not isinstance(pointer, str) or not pointer.startswith("#"):
            raise _refused(f"{path}.$ref does not point into the schema itself")
        if pointer not in self._refs:
            target: Any = self._schema
            for part in pointer.split("/")[1:]:
                key = part.replace("~1", "/").replace("~0", "~")
                if not isinstance(target, dict) or key not in target:
                    raise _refused(f"{path}.$ref points to nothing")
                target = target[key]
            # The name first: the target may refer to itself.
            name = self._refs[pointer] = self._new(_NOTHING)
            self._rules[name] = self._visit(target, pointer, 1)
        return self._refs[pointer]

    def _any_of(self, options: Any, path: str, depth: int) -> str:
        if not isinstance(options, list) or not options:
            raise _refused(f"{path}.anyOf is not a list of schemas")
        return self._union([self._visit(option, f"{path}.anyOf[{i}]", depth + 1) for i, option in enumerate(options)])

    def _enum(self, values: Any, types: tuple[str, ...], path: str) -> str:
        if not isinstance(values, list) or not 0 < len(values) <= MAX_NODES:
            raise _refused(f"{path}.enum is not a list of 1 to {MAX_NODES} values")
        if not all(any(_is_a(value, t) for t in types) for value in values):
            raise _refused(f"{path}.enum holds a value that is not of its type")
        return self._new(" | ".join(map(_constant, values)))

    # Types

    def _object(self, schema: Mapping[str, Any], path: str, depth: int) -> str:
        properties, required = schema.get("properties", {}), schema.get("required", [])
        if not isinstance(properties, dict) or not isinstance(required, list):
            raise _refused(f"{path}.properties or .required has the wrong form")
        if missing := [name for name in required if name not in properties]:
            raise _refused(f"{path}.required names '{missing[0]}', which is no property")
        if not properties:
            return self._map(schema.get("additionalProperties", True), path, depth)
        members = [
            (f'{_constant(name)} ":" ws {self._visit(value, f"{path}.{name}", depth + 1)}', name in required)
            for name, value in properties.items()
        ]
        return self._new(f'"{{" ws {self._members(members)} ws "}}"')

    def _members(self, members: list[tuple[str, bool]]) -> str:
        """A rule for members in their order, the optional ones present or not, with commas between those present.

        Built from the last on: `later` is what may follow a member that is present, `first` what may come if none was yet.
        """
        first = later = self._new(_NOTHING)
        for member, required in reversed(members):
            name = self._new(member)
            if required:
                first, later = self._new(f"{name} {later}"), self._new(f'"," ws {name} {later}')
            else:
                first, later = self._new(f"{name} {later} | {first}"), self._new(f'("," ws {name})? {later}')
        return first

    def _map(self, values: Any, path: str, depth: int) -> str:
        if values is False:
            return self._new('"{" ws "}"')
        pair = self._new(f'string ":" ws {self._visit(values, f"{path}.additionalProperties", depth + 1)}')
        return self._new(f'"{{" ws ({pair} ("," ws {pair})*)? ws "}}"')

    def _array(self, schema: Mapping[str, Any], path: str, depth: int) -> str:
        item = self._visit(schema.get("items", True), f"{path}.items", depth + 1)
        least, most = self._bounds(schema, "minItems", "maxItems", path)
        if most == 0:
            return self._new('"[" ws "]"')
        more = self._new(f'"," ws {item}')
        rest = f"{more}{{{max(least - 1, 0)},{'' if most is None else most - 1}}}"
        return self._new(f'"[" ws {item} {rest} ws "]"' if least else f'"[" ws ({item} {rest})? ws "]"')

    def _string(self, schema: Mapping[str, Any], path: str) -> str:
        if "format" in schema:
            self._only(schema.keys() & _KEYWORDS["string"], {"format"}, path)
            if schema["format"] not in _FORMATS:
                raise _refused(f"{path}.format is none of {', '.join(_FORMATS)}")
            return self._new(_FORMATS[schema["format"]])
        least, most = self._bounds(schema, "minLength", "maxLength", path)
        if (least, most) == (0, None):
            return "string"
        return self._new(f'"\\"" char{{{least},{"" if most is None else most}}} "\\""')

    def _bounds(self, schema: Mapping[str, Any], low: str, high: str, path: str) -> tuple[int, int | None]:
        least, most = schema.get(low, 0), schema.get(high)
        for name, value in ((low, least), (high, 0 if most is None else most)):
            if type(value) is not int or not 0 <= value <= MAX_REPEAT:
                raise _refused(f"{path}.{name} is not a number from 0 to {MAX_REPEAT}")
        if most is not None and most < least:
            raise _refused(f"{path}.{high} is less than {low}")
        return least, most


def _is_a(value: Any, type_name: str) -> bool:
    match value:
        case None:
            return type_name == "null"
        case bool():
            return type_name == "boolean"
        case int():
            return type_name in ("integer", "number")
        case float():
            return type_name == "number"
        case str():
            return type_name == "string"
        case list():
            return type_name == "array"
    return type_name == "object"
