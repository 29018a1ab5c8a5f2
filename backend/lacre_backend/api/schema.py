"""JSON schemas as grammars (GBNF), for `response_format` and the arguments of tools.

Rules
- A schema is translated whole or refused: a keyword that the grammar could not enforce is named in the error, never ignored.
  Annotations (title, description, ...) are no constraints. Only of a function that is not `strict` what cannot be enforced is
  left to the model, as OpenAI does.
- What the grammar admits is valid under the schema; it may be less. Properties come in the schema's order, and none that the
  schema does not name.
- Repetitions, depth and size are bounded: a schema is input from outside, and llama.cpp unrolls repetitions.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any, Final

from lacre_backend.api.errors import RequestRefused

MAX_NODES: Final = 1000  # schemas inside a request's schemas; each becomes a few rules
MAX_DEPTH: Final = 32  # nesting, long before Python's own limit
MAX_REPEAT: Final = 256  # llama.cpp unrolls x{m,n} into n rules

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
_KNOWN: Final = frozenset({"type"}).union(*_KEYWORDS.values())

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


class Rules:
    """A grammar while it is made. Rule names are made here, never taken out of a request."""

    def __init__(self) -> None:
        self._rules: dict[str, str] = {}
        self.nodes = 0

    def new(self, rule: str) -> str:
        """The name of a new rule."""
        name = f"r{len(self._rules)}"
        self._rules[name] = rule
        return name

    def define(self, name: str, rule: str) -> None:
        """What a rule of `new` stands for after all."""
        self._rules[name] = rule

    def schema(self, schema: Mapping[str, Any], param: str, *, strict: bool = True) -> str:
        """The name of a rule for a JSON schema. param: whose it is, for errors. Raises `RequestRefused`."""
        return _Translation(self, schema, param, strict=strict).root

    def text(self, root: str) -> str:
        """The whole grammar. root: what it begins with."""
        rules = {**_PRIMITIVES, **self._rules, "root": root}
        return "\n".join(f"{name} ::= {rule}" for name, rule in rules.items())


ANY_OBJECT: Final = "object"  # the rule of any one JSON object


def any_object() -> str:
    """The grammar of `json_object`: any one JSON object."""
    return Rules().text(ANY_OBJECT)


def grammar(schema: Mapping[str, Any], param: str = "response_format") -> str:
    """The grammar of a JSON schema. Raises `RequestRefused`."""
    rules = Rules()
    return rules.text(rules.schema(schema, param))


def literal(text: str) -> str:
    """A text as GBNF writes it."""
    escaped = text.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n")
    return f'"{escaped}"'


def _constant(value: Any) -> str:
    """A JSON value as a GBNF literal: JSON's escapes first, then GBNF's."""
    return literal(json.dumps(value, ensure_ascii=False, separators=(",", ":")))


class _Translation:
    """One schema on its way to rules."""

    def __init__(self, rules: Rules, schema: Mapping[str, Any], param: str, *, strict: bool) -> None:
        self._rules = rules
        self._schema = schema
        self._param = param
        self._strict = strict
        self.root = rules.new(_NOTHING)
        self._refs = {"#": self.root}  # JSON pointer -> rule
        rules.define(self.root, self._visit(schema, "schema", 0))

    def _new(self, rule: str) -> str:
        return self._rules.new(rule)

    def _refused(self, problem: str) -> RequestRefused:
        return RequestRefused(f"Invalid schema for {self._param}: {problem}.", param=self._param)

    def _visit(self, schema: Any, path: str, depth: int) -> str:
        """The name of a rule for `schema`."""
        self._rules.nodes += 1
        if self._rules.nodes > MAX_NODES or depth > MAX_DEPTH:
            raise self._refused(f"more than {MAX_NODES} parts or {MAX_DEPTH} levels")
        if schema is True:
            return "value"
        if not isinstance(schema, dict):
            raise self._refused(f"{path} is not a schema")
        if not self._strict:
            schema = _enforceable(schema)
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
            raise self._refused(f"{path}.type is none of {', '.join(_ALL_TYPES)}")
        return tuple(types)

    def _only(self, keys: set[str], allowed: set[str], path: str) -> None:
        if extra := sorted(keys - allowed):
            raise self._refused(f"{path} uses '{extra[0]}', which is not supported there")

    def _union(self, names: list[str]) -> str:
        return names[0] if len(names) == 1 else self._new(" | ".join(names))

    # Keywords that stand alone

    def _ref(self, pointer: Any, path: str) -> str:
        if not isinstance(pointer, str) or not pointer.startswith("#"):
            raise self._refused(f"{path}.$ref does not point into the schema itself")
        if pointer not in self._refs:
            target: Any = self._schema
            for part in pointer.split("/")[1:]:
                key = part.replace("~1", "/").replace("~0", "~")
                if not isinstance(target, dict) or key not in target:
                    raise self._refused(f"{path}.$ref points to nothing")
                target = target[key]
            # The name first: the target may refer to itself.
            name = self._refs[pointer] = self._new(_NOTHING)
            self._rules.define(name, self._visit(target, pointer, 1))
        return self._refs[pointer]

    def _any_of(self, options: Any, path: str, depth: int) -> str:
        if not isinstance(options, list) or not options:
            raise self._refused(f"{path}.anyOf is not a list of schemas")
        return self._union([self._visit(option, f"{path}.anyOf[{i}]", depth + 1) for i, option in enumerate(options)])

    def _enum(self, values: Any, types: tuple[str, ...], path: str) -> str:
        if not isinstance(values, list) or not 0 < len(values) <= MAX_NODES:
            raise self._refused(f"{path}.enum is not a list of 1 to {MAX_NODES} values")
        if not all(any(_is_a(value, t) for t in types) for value in values):
            raise self._refused(f"{path}.enum holds a value that is not of its type")
        return self._new(" | ".join(map(_constant, values)))

    # Types

    def _object(self, schema: Mapping[str, Any], path: str, depth: int) -> str:
        properties, required = schema.get("properties", {}), schema.get("required", [])
        named = isinstance(required, list) and all(isinstance(name, str) for name in required)
        if not isinstance(properties, dict) or not named:
            raise self._refused(f"{path}.properties or .required has the wrong form")
        if missing := [name for name in required if name not in properties]:
            raise self._refused(f"{path}.required names '{missing[0]}', which is no property")
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
            if not _is_format(schema["format"]):
                raise self._refused(f"{path}.format is none of {', '.join(_FORMATS)}")
            return self._new(_FORMATS[schema["format"]])
        least, most = self._bounds(schema, "minLength", "maxLength", path)
        if (least, most) == (0, None):
            return "string"
        return self._new(f'"\\"" char{{{least},{"" if most is None else most}}} "\\""')

    def _bounds(self, schema: Mapping[str, Any], low: str, high: str, path: str) -> tuple[int, int | None]:
        least, most = schema.get(low, 0), schema.get(high)
        for name, value in ((low, least), (high, 0 if most is None else most)):
            if type(value) is not int or not 0 <= value <= MAX_REPEAT:
                raise self._refused(f"{path}.{name} is not a number from 0 to {MAX_REPEAT}")
        if most is not None and most < least:
            raise self._refused(f"{path}.{high} is less than {low}")
        return least, most


def _is_format(value: Any) -> bool:
    """A caller's value may be anything, a list among it, which no table can be asked about."""
    return isinstance(value, str) and value in _FORMATS


def _enforceable(schema: Mapping[str, Any]) -> Mapping[str, Any]:
    """A schema without the keywords that a grammar cannot enforce; what it admits then may break those."""
    for union in ("anyOf", "oneOf"):
        if union in schema and "properties" not in schema:
            return {"anyOf": schema[union]}
    alone = next((keyword for keyword in ("$ref", "enum", "const") if keyword in schema), None)
    if alone is not None:
        return {alone: schema[alone], **({"type": schema["type"]} if "type" in schema and alone != "$ref" else {})}
    kept = {keyword: value for keyword, value in schema.items() if keyword in _KNOWN}
    if not _is_format(kept.get("format")):
        kept.pop("format", None)
    else:
        kept = {keyword: value for keyword, value in kept.items() if keyword not in ("minLength", "maxLength")}
    for bound in ("minLength", "maxLength", "minItems", "maxItems"):
        if bound in kept and not (type(kept[bound]) is int and 0 <= kept[bound] <= MAX_REPEAT):
            del kept[bound]
    if isinstance(kept.get("required"), list) and isinstance(properties := kept.get("properties", {}), dict):
        kept["required"] = [name for name in kept["required"] if not isinstance(name, str) or name in properties]
    if "type" not in kept and len({kind for kind, keywords in _KEYWORDS.items() if kept.keys() & keywords}) > 1:
        return {}  # of several types at once: anything
    types = kept.get("type", [])
    names = [types] if isinstance(types, str) else types if isinstance(types, list) else []
    allowed = {"type"}.union(*(_KEYWORDS[name] for name in names if isinstance(name, str) and name in _KEYWORDS))
    return {keyword: value for keyword, value in kept.items() if "type" not in kept or keyword in allowed}


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
