"""Expands a JSON schema (draft 2020-12) into cases for each type. Each case is a conjunction that a grammar can express.

Rules:
- Pure: a schema in, cases out. A value is valid under the schema exactly if it is valid under one of its type's cases.
- The input is a set of literals: schemas that must hold or must not. `not`, `if` and `oneOf` need both.
- Every keyword is supported, or refused by name and place. Annotations are not constraints; `format` is one.
- In a schema that is not strict, a keyword that cannot be enforced is skipped. What remains admits more, never less.
- `unevaluated…` sees what the keywords beside it evaluated, case by case. Only it requires overlapping branches to be
  separated.
- The number of cases is bounded, because branches multiply.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Any, Final
from urllib.parse import unquote, urldefrag, urljoin

from lacre_backend.api.schema.keywords import demanded, denied
from lacre_backend.api.schema.numbers import empty_range
from lacre_backend.api.schema.terms import (
    TYPES,
    Case,
    Contains,
    Exists,
    Items,
    Literal,
    Literals,
    NoSchema,
    Place,
    Properties,
    SchemaRefused,
    TooCostly,
)

MAX_CASES: Final = 500  # at one place
MAX_MADE: Final = 10_000  # for a whole schema; each takes about 10 microseconds and holds the GIL
MAX_COMPARED: Final = 40  # alternatives that are compared in pairs
MAX_DEPTH: Final = 64  # of nested in-place keywords (`allOf`, `$ref`, ...)

DIALECTS: Final = (
    "https://json-schema.org/draft/2020-12/schema",
    "https://json-schema.org/draft/2019-09/schema",
    "http://json-schema.org/draft-07/schema",
    "http://json-schema.org/draft-06/schema",
)
ANNOTATIONS: Final = frozenset(
    {"title", "description", "default", "examples", "deprecated", "readOnly", "writeOnly", "$schema", "$id", "$comment",
     "$anchor", "$dynamicAnchor", "$defs", "definitions", "contentEncoding", "contentMediaType", "contentSchema",
     # OpenAPI's, and zod's
     "example", "externalDocs", "xml", "id"}
)  # fmt: skip
# Keywords that read their neighbours, and keywords that only their neighbours read.
_HANDLED_BESIDE: Final = frozenset(
    {"then", "else", "items", "additionalProperties", "minContains", "maxContains", "additionalItems"}
)
_LAST: Final = ("unevaluatedItems", "unevaluatedProperties")


@dataclass(frozen=True, slots=True)
class Evaluated:
    """Properties and items evaluated in place. items: the number of first items; None: all."""

    names: frozenset[str] = frozenset()
    patterns: tuple[str, ...] = ()
    properties: bool = False
    items: int | None = 0
    contained: Literals = ()

    def __or__(self, other: Evaluated) -> Evaluated:
        items = None if self.items is None or other.items is None else max(self.items, other.items)
        patterns, contained = (*self.patterns, *other.patterns), (*self.contained, *other.contained)
        return Evaluated(self.names | other.names, patterns, self.properties or other.properties, items, contained)


_NOTHING_SEEN: Final = Evaluated()
Branch = tuple[Case, Evaluated]


class SchemaDocument:
    """A schema, and the places that references name."""

    def __init__(self, root: Any) -> None:
        self.root = Place(root, "", (), "#")
        self._resources: dict[str, Any] = {"": root}
        self._anchors: dict[tuple[str, str], Any] = {}
        self._dynamic: set[tuple[str, str]] = set()
        self._bases: dict[int, str] = {}
        self._paths: dict[int, str] = {}
        self._index(root, "", "#", 0)
        if isinstance(root, dict):
            base = self._bases[id(root)]
            self.root = self._at(root, base, ())

    def _index(self, schema: Any, base: str, path: str, depth: int) -> None:
        if depth > 2 * MAX_DEPTH:
            raise SchemaRefused("$ref", path, "the schema is nested too deeply")
        if isinstance(schema, dict):
            dialect = schema.get("$schema", DIALECTS[0])
            if not isinstance(dialect, str) or dialect.removesuffix("#") not in DIALECTS:
                raise SchemaRefused("$schema", path, "names a dialect other than drafts 6 to 2020-12")
            identity = schema.get("$id")
            if isinstance(identity, str):
                base = urldefrag(urljoin(base, identity)).url
                self._resources[base] = schema
            self._bases[id(schema)], self._paths[id(schema)] = base, path
            for keyword in ("$anchor", "$dynamicAnchor"):
                if isinstance(anchor := schema.get(keyword), str):
                    self._anchors[base, anchor] = schema
                    if keyword == "$dynamicAnchor":
                        self._dynamic.add((base, anchor))
        inside = schema.items() if isinstance(schema, dict) else enumerate(schema) if isinstance(schema, list) else ()
        for step, value in inside:
            if step not in ("enum", "const", "default", "examples"):
                self._index(value, base, f"{path}/{step}", depth + 1)

    def _at(self, schema: Any, base: str, scope: tuple[str, ...]) -> Place:
        if self._dynamic and (not scope or scope[-1] != base) and base not in scope:
            scope = (*scope, base)
        return Place(schema, base, scope, self._paths.get(id(schema), "#"))

    def entered(self, place: Place) -> Place:
        """The same place, relative to its own resource if it begins one."""
        if isinstance(place.schema, dict) and "$id" in place.schema:
            return self._at(place.schema, self._bases.get(id(place.schema), place.base), place.scope)
        return place

    def target(self, place: Place, keyword: str, reference: Any) -> Place:
        """The target of a `$ref` or `$dynamicRef`."""
        if not isinstance(reference, str):
            raise SchemaRefused(keyword, place.path, "is not a string")
        url, fragment = (
            urldefrag(urljoin(place.base, reference)) if not reference.startswith("#") else (place.base, reference[1:])
        )
        if url not in self._resources:
            raise SchemaRefused(keyword, place.path, "points outside the schema, which is not supported")
        schema = self._resources[url]
        if fragment and not fragment.startswith("/"):
            found = self._anchors.get((url, unquote(fragment)))
            if found is None:
                raise SchemaRefused(keyword, place.path, "points to nothing")
            if keyword == "$dynamicRef" and (url, fragment) in self._dynamic:
                outer = next((base for base in place.scope if (base, fragment) in self._dynamic), url)
                return self._at(self._anchors[outer, fragment], outer, place.scope)
            return self._at(found, self._bases[id(found)], (*place.scope,))
        for step in unquote(fragment).split("/")[1:]:
            schema = self._step(schema, step.replace("~1", "/").replace("~0", "~"), place, keyword)
        return self._at(schema, self._bases.get(id(schema), url), place.scope)

    @staticmethod
    def _step(schema: Any, step: str, place: Place, keyword: str) -> Any:
        if isinstance(schema, dict) and step in schema:
            return schema[step]
        if isinstance(schema, list) and re.fullmatch(r"[0-9]{1,9}", step) and int(step) < len(schema):
            return schema[int(step)]
        raise SchemaRefused(keyword, place.path, "points to nothing")


@dataclass(slots=True)
class Cases:
    """Expands literals. strict: refuse unsupported keywords instead of leaving them to the model."""

    document: SchemaDocument
    strict: bool
    made: int = 0
    _open: list[tuple[object, ...]] = field(default_factory=list)

    def of(self, literals: Literals, kind: str) -> list[Case]:
        """The cases of one type that satisfy all literals."""
        branches: list[Branch] = [(Case(kind), _NOTHING_SEEN)]
        for literal in literals:
            branches = [each for case, _ in branches for each in self._literal(literal, case, track=False)]
        return [case for case, _ in branches]

    def _literal(self, literal: Literal, case: Case, *, track: bool) -> list[Branch]:
        place = self.document.entered(literal.place)
        schema = place.schema
        if isinstance(schema, bool):
            return [(case, _NOTHING_SEEN)] if schema == literal.holds else []
        if not isinstance(schema, dict):
            raise NoSchema("schema", place.path, "is not a schema")
        key = (*literal.key, case.type)
        if key in self._open:
            raise SchemaRefused("$ref", place.path, "refers to itself directly")
        if len(self._open) > MAX_DEPTH:
            raise SchemaRefused("$ref", place.path, f"applies more than {MAX_DEPTH} schemas at one place")
        self._open.append(key)
        try:
            return self._holds(place, case, track=track) if literal.holds else list(self._fails(place, case))
        finally:
            self._open.pop()

    def _keywords(self, place: Place) -> list[str]:
        found = [k for k in place.schema if k not in ANNOTATIONS and k not in _HANDLED_BESIDE and k not in _LAST]
        # It makes the property required that distinguishes the branches of `oneOf`
        found.sort(key=lambda keyword: keyword != "discriminator")
        beside = {"then": "if", "else": "if", "minContains": "contains", "maxContains": "contains"}
        for keyword in ("items", "additionalItems", "additionalProperties"):
            if keyword in place.schema:
                found.append(keyword)
        found += [keyword for keyword in _LAST if keyword in place.schema]
        return [k for k in found if k not in beside]

    def _holds(self, place: Place, case: Case, *, track: bool) -> list[Branch]:
        track = track or any(keyword in place.schema for keyword in _LAST)
        branches: list[Branch] = [(case, _NOTHING_SEEN)]
        for keyword in self._keywords(place):
            try:
                after = [(one, seen | more) for before, seen in branches
                         for one, more in self._apply(keyword, place, before, seen, track=track)]  # fmt: skip
                self._count(len(after), keyword, place)
            except SchemaRefused as refused:
                self.leave(refused)
            else:
                branches = after
        return branches

    def _fails(self, place: Place, case: Case) -> Iterator[Branch]:
        """At least one keyword does not hold."""
        for keyword in self._keywords(place):
            try:
                branches = self._without(keyword, place, case)
                self._count(len(branches), keyword, place)
            except SchemaRefused as refused:
                self.leave(refused)
                branches = [(case, _NOTHING_SEEN)]
            yield from branches

    def _without(self, keyword: str, place: Place, case: Case) -> list[Branch]:
        """The branches in which this keyword does not hold."""
        if keyword not in _LAST:
            return [(after, _NOTHING_SEEN) for after in self._deny(keyword, place, case)]
        rest = replace(place, schema={k: v for k, v in place.schema.items() if k != keyword})
        return [(after, _NOTHING_SEEN) for before, seen in self._holds(rest, case, track=True)
                for after in self._unevaluated_fails(keyword, place, before, seen)]  # fmt: skip

    def _count(self, made: int, keyword: str, place: Place) -> None:
        self.made += made
        if self.made > MAX_MADE:
            raise TooCostly(keyword, place.path, "multiplies into too many cases")
        if made > MAX_CASES:
            raise SchemaRefused(keyword, place.path, "multiplies into too many cases")

    def leave(self, refused: SchemaRefused) -> None:
        """Leaves a keyword that cannot be enforced to the model, or raises if the schema is strict."""
        if self.strict or isinstance(refused, NoSchema | TooCostly):
            raise refused

    def unknown(self, keyword: str, place: Place, problem: str = "is not supported") -> None:
        """Refuses a keyword, or leaves it to the model."""
        if self.strict:  # otherwise it is skipped
            raise SchemaRefused(keyword, place.path, problem)

    # What a keyword requires, and what violates it

    def _apply(self, keyword: str, place: Place, case: Case, seen: Evaluated, *, track: bool) -> list[Branch]:
        value = place.schema[keyword]
        match keyword:
            case "$ref" | "$dynamicRef":
                return self._literal(Literal(self.document.target(place, keyword, value)), case, track=track)
            case "allOf":
                branches: list[Branch] = [(case, _NOTHING_SEEN)]
                for literal in self._list(keyword, place):
                    branches = [(a, s | m) for b, s in branches for a, m in self._literal(literal, b, track=track)]
                    self._count(len(branches), keyword, place)
                return branches
            case "anyOf":
                return self._any_of(self._list(keyword, place), case, place, track=track)
            case "oneOf":
                return self._one_of(self._list(keyword, place), case, place)
            case "not":
                return [
                    (c, _NOTHING_SEEN)
                    for c, _ in self._literal(Literal(place.inside(value, keyword), False), case, track=False)
                ]
            case "if":
                return self._if(place, case, track=track)
            case "dependentSchemas":
                return self._dependent_schemas(place, case, track=track)
            case "unevaluatedItems" | "unevaluatedProperties":
                return self._unevaluated(keyword, place, case, seen)
        return [(each, self._seen(keyword, place, case.type)) for each in demanded(self.unknown, keyword, place, case)]

    def _seen(self, keyword: str, place: Place, kind: str) -> Evaluated:
        schema, value = place.schema, place.schema[keyword]
        if kind == "object":
            match keyword:
                case "properties":
                    return Evaluated(names=frozenset(value))
                case "patternProperties":
                    return Evaluated(patterns=tuple(value))
                case "additionalProperties":
                    return Evaluated(properties=True)
        elif kind == "array":
            match keyword:
                case "prefixItems":
                    return Evaluated(items=len(value))
                case "items":
                    return Evaluated(items=len(value) if isinstance(value, list) else None)
                case "additionalItems" if isinstance(schema.get("items"), list):
                    return Evaluated(items=None)
                case "contains":
                    return Evaluated(contained=(Literal(place.inside(value, keyword)),))
        return _NOTHING_SEEN

    def _deny(self, keyword: str, place: Place, case: Case) -> list[Case]:
        value = place.schema[keyword]

        def alone(branches: list[Branch]) -> list[Case]:
            return [each for each, _ in branches]

        match keyword:
            case "$ref" | "$dynamicRef":
                return alone(self._literal(Literal(self.document.target(place, keyword, value), False), case, track=False))
            case "allOf":
                return [c for each in self._list(keyword, place)
                        for c in alone(self._literal(replace(each, holds=False), case, track=False))]  # fmt: skip
            case "anyOf":
                return self._all(tuple(replace(each, holds=False) for each in self._list(keyword, place)), case)
            case "oneOf":
                each = self._list(keyword, place)
                none = self._all(tuple(replace(one, holds=False) for one in each), case)
                return none + [c for i in range(len(each)) for j in range(i) for c in self._all((each[i], each[j]), case)]
            case "not":
                return alone(self._literal(Literal(place.inside(value, keyword)), case, track=False))
            case "if":
                met, then, other = self._condition(place)
                unmet = replace(met, holds=False)
                found = [] if then is None else self._all((met, replace(then, holds=False)), case)
                return found + ([] if other is None else self._all((unmet, replace(other, holds=False)), case))
            case "dependentSchemas":
                if case.type != "object":
                    return []
                return [c for name, schema in self._mapping(keyword, place).items()
                        for c in self._all((Literal(place.inside(schema, keyword, name), False),),
                                           replace(case, required=(*case.required, name)))]  # fmt: skip
        return denied(self.unknown, keyword, place, case)

    def _all(self, literals: Literals, case: Case) -> list[Case]:
        cases = [case]
        for literal in literals:
            cases = [after for before in cases for after, _ in self._literal(literal, before, track=False)]
            self._count(len(cases), "anyOf", literal.place)
        return cases

    def _list(self, keyword: str, place: Place) -> Literals:
        value = place.schema[keyword]
        if not isinstance(value, list) or not value:
            raise SchemaRefused(keyword, place.path, "is not a list of schemas")
        return tuple(Literal(place.inside(each, keyword, i)) for i, each in enumerate(value))

    def _mapping(self, keyword: str, place: Place) -> dict[str, Any]:
        value = place.schema[keyword]
        if not isinstance(value, dict):
            raise SchemaRefused(keyword, place.path, "is not an object")
        return value

    def _any_of(self, options: Literals, case: Case, place: Place, *, track: bool) -> list[Branch]:
        if not track:
            return [branch for option in options for branch in self._literal(option, case, track=False)]
        return self._told_apart(options, case, place, range(1, len(options) + 1))

    def _one_of(self, options: Literals, case: Case, place: Place) -> list[Branch]:
        return self._told_apart(options, case, place, range(1, 2))

    def _told_apart(self, options: Literals, case: Case, place: Place, numbers: range) -> list[Branch]:
        """Each option holds or does not; the number that hold is in `numbers`."""
        if 1 in numbers and self._disjoint(options, case):
            return [branch for option in options for branch in self._literal(option, case, track=True)]
        branches: list[tuple[Case, Evaluated, int]] = [(case, _NOTHING_SEEN, 0)]
        for option in options:
            after = [(c, seen | more, n + 1) for b, seen, n in branches if n + 1 < numbers.stop
                     for c, more in self._literal(option, b, track=True)]  # fmt: skip
            after += [
                (c, seen, n) for b, seen, n in branches for c, _ in self._literal(replace(option, holds=False), b, track=False)
            ]
            self._count(len(after), "anyOf", place)
            branches = after
        return [(c, seen) for c, seen, n in branches if n in numbers]

    def _disjoint(self, options: Literals, case: Case) -> bool:
        """Whether no value satisfies two options, for example because a property's constant separates them. False if that is
        not obvious.
        """
        possible = [option for option in options if self._literal(option, case, track=False)]
        if len(possible) > MAX_COMPARED:
            return False
        pairs = itertools.combinations(possible, 2)
        return all(not self._possible(both) for pair in pairs for both in self._all(pair, case))

    def _possible(self, case: Case) -> bool:
        """Whether some value may satisfy the case, judging by its required properties."""
        for name in case.required:
            own = tuple(each.named[name] for each in case.properties if name in each.named)
            if len(own) > 1 and not any(self._scalars(own, kind) for kind in TYPES):
                return False
        return not case.absent.intersection(case.required)

    def _scalars(self, literals: Literals, kind: str) -> bool:
        return any(not (kind == "number" and empty_range(case)) for case in self.of(literals, kind))

    def _condition(self, place: Place) -> tuple[Literal, Literal | None, Literal | None]:
        schema = place.schema
        then = Literal(place.inside(schema["then"], "then")) if "then" in schema else None
        other = Literal(place.inside(schema["else"], "else")) if "else" in schema else None
        return Literal(place.inside(schema["if"], "if")), then, other

    def _if(self, place: Place, case: Case, *, track: bool) -> list[Branch]:
        met, then, other = self._condition(place)
        if then is None and other is None and not track:
            return [(case, _NOTHING_SEEN)]
        found: list[Branch] = []
        for condition, following in ((met, then), (replace(met, holds=False), other)):
            for before, seen in self._literal(condition, case, track=track):
                if following is None:
                    found.append((before, seen))
                else:
                    found += [(after, seen | more) for after, more in self._literal(following, before, track=track)]
        return found

    def _dependent_schemas(self, place: Place, case: Case, *, track: bool) -> list[Branch]:
        branches: list[Branch] = [(case, _NOTHING_SEEN)]
        if case.type != "object":
            return branches
        for name, schema in self._mapping("dependentSchemas", place).items():
            literal = Literal(place.inside(schema, "dependentSchemas", name))
            branches = [
                branch for before, seen in branches for branch in (
                    (replace(before, absent=before.absent | {name}), seen),
                    *((after, seen | more) for after, more in
                      self._literal(literal, replace(before, required=(*before.required, name)), track=track)),
                )
            ]  # fmt: skip
            self._count(len(branches), "dependentSchemas", place)
        return branches

    # Properties and items that nothing else evaluated

    def _unevaluated(self, keyword: str, place: Place, case: Case, seen: Evaluated) -> list[Branch]:
        literal = Literal(place.inside(place.schema[keyword], keyword))
        if keyword == "unevaluatedProperties":
            if case.type != "object" or seen.properties:
                return [(case, _NOTHING_SEEN)]
            anything = Literal(place.inside(True, keyword))
            known = Properties(dict.fromkeys(seen.names, anything), tuple((p, anything) for p in seen.patterns), literal)
            return [(replace(case, properties=(*case.properties, known)), Evaluated(properties=True))]
        if case.type != "array" or seen.items is None:
            return [(case, _NOTHING_SEEN)]
        anything = Literal(place.inside(True, keyword))
        if seen.contained:
            either = {"anyOf": [each.place.schema for each in seen.contained] + [place.schema[keyword]]}
            literal = Literal(replace(literal.place, schema=either))
            self.document._bases.setdefault(id(either), place.base)
        items = Items((anything,) * seen.items, literal)
        return [(replace(case, items=(*case.items, items)), Evaluated(items=None))]

    def _unevaluated_fails(self, keyword: str, place: Place, case: Case, seen: Evaluated) -> list[Case]:
        literal = Literal(place.inside(place.schema[keyword], keyword), False)
        if keyword == "unevaluatedProperties":
            if case.type != "object" or seen.properties:
                return []
            return [replace(case, exists=(*case.exists, Exists(seen.names, seen.patterns, None, literal, place.path)))]
        if case.type != "array" or seen.items is None:
            return []
        if seen.items or seen.contained:
            self.unknown(keyword, place, "cannot be denied here")
            return [case]
        return [replace(case, contains=(*case.contains, Contains(literal, 1, None)))]
