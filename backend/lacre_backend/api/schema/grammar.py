"""JSON schemas as grammars, for `response_format` and the arguments of tools.

Rules:
- A schema is enforced whole or refused. The error names the keyword that cannot be enforced and its place. Annotations (title,
  description, ...) are not constraints. Only if a schema is not `strict`, what cannot be enforced is left to the model, as
  OpenAI does.
- A caller's text enters a grammar only as JSON strings or checked patterns. Rules and their names are made here.
- Size and depth are checked before anything is expanded: a schema is untrusted input.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any, Final

from lacre_backend.api.errors import RequestRefused
from lacre_backend.api.schema import sets
from lacre_backend.api.schema.cases import Cases, SchemaDocument
from lacre_backend.api.schema.rules import RuleMaker
from lacre_backend.api.schema.scalars import ANY_OF, BLANK, PRELUDE
from lacre_backend.api.schema.terms import Literal, NoSchema, SchemaRefused
from lacre_backend.engine.protocol import NO_FORCING

MAX_VALUES: Final = 5000  # JSON values in one schema
MAX_LENGTH: Final = 512 * 1024  # characters of all schemas of a request, as JSON
MAX_DEPTH: Final = 64  # nesting; far below Python's own limit
# Sum over all `multipleOf` of a request. 700,000 took 6 s of CPU and 300 MB; llguidance has no limit for this.
MAX_REMAINDERS: Final = 20_000
_ANY_OBJECT: Final = f"{NO_FORCING}start: %json {json.dumps({'type': 'object', 'x-guidance': {'whitespace_pattern': BLANK}})}\n"


class Grammars:
    """A grammar under construction: an answer's form, and the schemas in it."""

    def __init__(self, *, loosely: bool = False) -> None:
        """loosely: a schema that is not strict admits any value of its type."""
        self._loosely = loosely
        self._schemas: list[str] = []
        self._length = 0
        self._remainders = 0
        self._given: list[tuple[str, Mapping[str, Any]]] = []
        self._marks: list[str] = []  # the places of lists whose items must differ
        self.loose = False  # whether one of them is a schema that is not strict

    def any_object(self) -> str:
        """The name of the rule for any JSON object."""
        return self._named(_ANY_OBJECT)

    def schema(self, schema: Mapping[str, Any], param: str, *, strict: bool = True, alone: bool = False) -> str:
        """The name of the rule for a JSON schema. param: its field, for errors. alone: the answer consists of this value only.

        Raises `RequestRefused`.
        """
        self.loose = self.loose or not strict
        try:
            self._bounded(schema)
            if self._loosely and not strict:
                return self._any(schema)
            self._given.append((param, schema))
            document = SchemaDocument(schema)
            maker = RuleMaker(Cases(document, strict), watched=alone)
            text = maker.text(Literal(document.root))
            self._count(maker.remainders)
            self._marks = self._watched(schema, maker.distinct, strict=strict)
            return self._named(text)
        except SchemaRefused as refused:
            if strict or isinstance(refused, NoSchema):
                raise _refusal(refused, param) from None
        except RecursionError:
            if strict:
                raise _refusal(SchemaRefused("schema", "#", "is nested too deeply"), param) from None
        return self._any(schema)

    def _watched(self, schema: Mapping[str, Any], places: Mapping[str, bool], *, strict: bool) -> list[str]:
        try:
            return sets.watched(schema, places) if places else []
        except SchemaRefused:
            if strict:
                raise
            return []  # left to the model

    def _any(self, schema: Mapping[str, Any]) -> str:
        """The name of the rule for any value of the type at the schema's root."""
        kind = schema.get("type")
        if kind == "object":
            return self.any_object()
        name = ANY_OF.get(kind if kind != "integer" else "number", "anything") if isinstance(kind, str) else "anything"
        return self._named(f"{PRELUDE}start: {name}\n")

    def text(self, rules: str) -> str:
        """The whole grammar. rules: the answer's form, beginning with `start`."""
        if len(self._schemas) == 1 and rules == "start: @s0\n":
            marks = "".join(f"{mark}\n" for mark in self._marks)
            return marks + self._schemas[0]  # alone, it allows no white space before it
        grammars = [{"name": "answer", "lark_grammar": NO_FORCING + rules}]
        grammars += [{"name": f"s{i}", "lark_grammar": source} for i, source in enumerate(self._schemas)]
        return json.dumps({"grammars": grammars})

    def too_large(self) -> RequestRefused:
        """The refusal of a grammar that exceeds the engine's limit. It names the keyword that most likely makes it so large."""
        for keyword in _LARGE:
            for param, schema in self._given:
                if (path := _place(schema, keyword, "#")) is not None:
                    return _refusal(SchemaRefused(keyword, path, "makes the grammar too large to be enforced"), param)
        return _refusal(SchemaRefused(_SIZE, "#", "makes the grammar too large to be enforced"), "response_format")

    def _named(self, source: str) -> str:
        if source not in self._schemas:
            self._schemas.append(source)
        return f"@s{self._schemas.index(source)}"

    def _count(self, remainders: int) -> None:
        self._remainders += remainders
        if self._remainders > MAX_REMAINDERS:
            raise SchemaRefused("multipleOf", "#", f"has more than {MAX_REMAINDERS} remainders, together with earlier ones")

    def _bounded(self, schema: Any) -> None:
        waiting, count = [(schema, 0)], 0
        while waiting:
            value, depth = waiting.pop()
            inside = list(value.values()) if isinstance(value, dict) else value if isinstance(value, list) else []
            count += 1 + len(inside)
            if count > 2 * MAX_VALUES or depth > MAX_DEPTH:
                raise NoSchema(_SIZE, "#", f"has more than {MAX_VALUES} values or {MAX_DEPTH} levels")
            waiting += [(each, depth + 1) for each in inside]
        self._length += len(json.dumps(schema, ensure_ascii=False))
        if self._length > MAX_LENGTH:
            raise NoSchema(_SIZE, "#", f"is longer than {MAX_LENGTH} characters, with those before it")


_SIZE: Final = "schema"
# Ordered by how much each can add to an automaton.
_LARGE: Final = (
    *("multipleOf", "pattern", "patternProperties", "maxLength", "minLength", "maxItems", "minItems", "enum"),
    *("anyOf", "oneOf", "allOf", "contains", "properties"),
)


def grammar(schema: Mapping[str, Any], param: str = "response_format") -> str:
    """The grammar of a JSON schema. Raises `RequestRefused`."""
    grammars = Grammars()
    return grammars.text(f"start: {grammars.schema(schema, param)}\n")


def any_object() -> str:
    """The grammar of `json_object`: any one JSON object."""
    grammars = Grammars()
    return grammars.text(f"start: {grammars.any_object()}\n")


NOTHING: Final = '""'


def literal(text: str) -> str:
    """A text as a Lark literal."""
    return json.dumps(text)


def _place(schema: Any, keyword: str, path: str) -> str | None:
    """The first place that uses a keyword."""
    if isinstance(schema, dict) and keyword in schema:
        return path
    inside = schema.items() if isinstance(schema, dict) else enumerate(schema) if isinstance(schema, list) else ()
    return next((found for step, value in inside if (found := _place(value, keyword, f"{path}/{step}")) is not None), None)


def _refusal(refused: SchemaRefused, param: str) -> RequestRefused:
    return RequestRefused(
        f"Invalid schema for {param}: '{refused.keyword}' at {refused.path} {refused.problem}.",
        code="invalid_value",
        param=param,
    )
