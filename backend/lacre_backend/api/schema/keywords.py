"""What keywords of a single type require, and what violates them (JSON Schema Validation, draft 2020-12, section 6).

Rules:
- A keyword holds for every value of another type, so no such value violates it.
- A keyword's own value is checked here. An invalid one is refused by name.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from typing import Any, Final

from lacre_backend.api.schema.formats import of_string
from lacre_backend.api.schema.numbers import above, below, bound, exact, number
from lacre_backend.api.schema.terms import (
    MAX_COUNT,
    TYPES,
    Case,
    Contains,
    Exists,
    Items,
    Literal,
    Place,
    Properties,
    SchemaRefused,
    Unknown,
)

_KEYWORDS: Final = {
    "number": ("minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum", "multipleOf"),
    "string": ("minLength", "maxLength", "pattern", "format"),
    "array": ("prefixItems", "items", "additionalItems", "minItems", "maxItems", "contains", "uniqueItems"),
    "object": ("properties", "patternProperties", "additionalProperties", "propertyNames", "required", "dependentRequired",
               "minProperties", "maxProperties"),
}  # fmt: skip
_OF_TYPE: Final = {keyword: kind for kind, keywords in _KEYWORDS.items() for keyword in keywords}
_LEAST: Final = ("minLength", "minItems", "minProperties")
_MOST: Final = ("maxLength", "maxItems", "maxProperties")


def demanded(unknown: Unknown, keyword: str, place: Place, case: Case) -> list[Case]:
    """The cases in which the keyword holds."""
    match keyword:
        case "type":
            return _typed(_types(place), case)
        case "enum" | "const":
            return _one_of(keyword, _values(keyword, place), place, case)
        case "discriminator":
            return [_discriminated(place, case)]
    kind = _OF_TYPE.get(keyword)
    if kind is None:
        unknown(keyword, place)
        return [case]
    _check(keyword, place)
    if case.type != kind:
        return [case]
    if kind == "number":
        return [number(unknown, keyword, place, case)]
    if keyword in _LEAST or keyword in _MOST:
        n = _counted(unknown, keyword, place)
        return [case] if n is None else [_at_least(case, n) if keyword in _LEAST else _at_most(case, n)]
    if kind == "string":
        return [of_string(unknown, keyword, place, case)]
    return _array(keyword, place, case) if kind == "array" else _object(keyword, place, case)


def denied(unknown: Unknown, keyword: str, place: Place, case: Case) -> list[Case]:
    """The cases in which the keyword does not hold."""
    value = place.schema[keyword]
    match keyword:
        case "type":
            types = _types(place)
            others = [t for t in TYPES if t not in types and not (t == "number" and "integer" in types)]
            wholes = _whole(case, False) if case.type == "number" and "integer" in types and "number" not in types else []
            return _typed(others, case) + wholes
        case "enum" | "const":
            return _none_of(keyword, _values(keyword, place), place, case)
        case "discriminator":
            return []
    kind = _OF_TYPE.get(keyword)
    if kind is None:
        unknown(keyword, place)
        return [case]
    _check(keyword, place)
    if case.type != kind:
        return []
    if keyword in _LEAST:
        n = _counted(unknown, keyword, place)
        return [case] if n is None else [_at_most(case, n - 1)] if n > 0 else []
    if keyword in _MOST:
        n = _counted(unknown, keyword, place)
        return [case] if n is None else [_at_least(case, n + 1)]
    match keyword:
        case "minimum" | "exclusiveMinimum":
            return [below(case, bound(keyword, place), excluded=keyword == "minimum")]
        case "maximum" | "exclusiveMaximum":
            return [above(case, bound(keyword, place), excluded=keyword == "maximum")]
        case "pattern":
            return [replace(case, patterns=(*case.patterns, (value, False)))]
        case "format" | "multipleOf":
            unknown(keyword, place, "cannot be denied")
            return [case]
    return (_array_denied if kind == "array" else _object_denied)(unknown, keyword, place, case)


# Validity of the keywords' own values


def _check(keyword: str, place: Place) -> None:
    value = place.schema[keyword]
    wanted: type | tuple[type, ...]
    match keyword:
        case "pattern" | "format":
            wanted = str
        case "prefixItems" | "required":
            wanted = list
        case "properties" | "patternProperties" | "dependentRequired":
            wanted = dict
        case "uniqueItems":
            wanted = bool
        case "contains" | "additionalProperties" | "propertyNames" | "additionalItems":
            wanted = (dict, bool)
        case "items":
            wanted = (dict, bool, list)
        case _:
            return
    names = (
        [value]
        if keyword == "required"
        else list(value.values())
        if keyword == "dependentRequired" and isinstance(value, dict)
        else []
    )
    if not isinstance(value, wanted) or any(not isinstance(n, list) or not all(isinstance(x, str) for x in n) for n in names):
        raise SchemaRefused(keyword, place.path, "has the wrong form")


def _types(place: Place) -> list[str]:
    value = place.schema["type"]
    types = value if isinstance(value, list) else [value]
    if not types or not all(isinstance(t, str) and (t in TYPES or t == "integer") for t in types):
        raise SchemaRefused("type", place.path, f"is not one of {', '.join(TYPES)} and integer")
    return types


def _values(keyword: str, place: Place) -> list[Any]:
    values = place.schema["enum"] if keyword == "enum" else [place.schema["const"]]
    if not isinstance(values, list) or not values:
        raise SchemaRefused(keyword, place.path, "is not a list of values")
    return values


def _counted(unknown: Unknown, keyword: str, place: Place) -> int | None:
    value = place.schema[keyword]
    if isinstance(value, bool) or not isinstance(value, int | float) or value != value // 1 or value < 0:
        raise SchemaRefused(keyword, place.path, "is not a whole number from 0 on")
    if value > MAX_COUNT:
        unknown(keyword, place, f"is more than {MAX_COUNT}")
        return None
    return int(value)


# Any type


def _typed(types: Iterable[str], case: Case) -> list[Case]:
    if case.type == "number":
        return [case] if "number" in types else _whole(case, True) if "integer" in types else []
    return [case] if case.type in types else []


def _whole(case: Case, whole: bool) -> list[Case]:
    return [replace(case, whole=whole)] if case.whole in (None, whole) else []


def kind_of(value: Any) -> str:
    match value:
        case None:
            return "null"
        case bool():
            return "boolean"
        case int() | float():
            return "number"
        case str():
            return "string"
    return "array" if isinstance(value, list) else "object"


def _one_of(keyword: str, values: list[Any], place: Place, case: Case) -> list[Case]:
    own = [value for value in values if kind_of(value) == case.type]
    match case.type:
        case "null":
            return [case] if own else []
        case "boolean" | "string":
            only = frozenset(own) if case.only is None else case.only & frozenset(own)
            return [replace(case, only=only)] if only else []
        case "number":
            listed = sorted({exact(keyword, value, place) for value in own})
            return [below(above(case, value, excluded=False), value, excluded=False) for value in listed]
        case "array":
            return [_exactly_items(case, value, keyword, place) for value in own]
    return [_exactly_members(case, value, keyword, place) for value in own]


def _exactly_items(case: Case, value: list[Any], keyword: str, place: Place) -> Case:
    nothing_more = Literal(place.inside(False, keyword))
    case = _with_items(case, _constants(value, keyword, place), nothing_more)
    return _at_most(_at_least(case, len(value)), len(value))


def _exactly_members(case: Case, value: dict[str, Any], keyword: str, place: Place) -> Case:
    members = dict(zip(value, _constants(list(value.values()), keyword, place), strict=True))
    nothing_more = Literal(place.inside(False, keyword))
    return _with(replace(case, required=(*case.required, *value)), Properties(members, (), nothing_more))


def _constants(values: list[Any], keyword: str, place: Place) -> tuple[Literal, ...]:
    return tuple(Literal(place.inside({"const": value}, keyword, i)) for i, value in enumerate(values))


def _none_of(keyword: str, values: list[Any], place: Place, case: Case) -> list[Case]:
    own = [value for value in values if kind_of(value) == case.type]
    match case.type:
        case "null":
            return [] if own else [case]
        case "boolean":
            only = (frozenset({True, False}) if case.only is None else case.only) - frozenset(own)
            return [replace(case, only=only)] if only else []
        case "string":
            return [replace(case, never=case.never | frozenset(own))]
    cases = [case]
    for value in own:
        cases = [after for before in cases for after in _other_than(keyword, value, place, before)]
        if len(cases) > 200:
            raise SchemaRefused(keyword, place.path, "has too many values to be denied")
    return cases


def _other_than(keyword: str, value: Any, place: Place, case: Case) -> list[Case]:
    if case.type == "number":
        value = exact(keyword, value, place)
        return [below(case, value, excluded=True), above(case, value, excluded=True)]
    if case.type == "array":
        other_length = [_at_least(case, len(value) + 1)] + ([_at_most(case, len(value) - 1)] if value else [])
        return other_length + _one_differs(_constants(value, keyword, place), place, case)
    names = dict(zip(value, _constants(list(value.values()), keyword, place), strict=True))
    return [
        *(replace(case, absent=case.absent | {name}) for name in names),
        *(_with(replace(case, required=(*case.required, name)), Properties({name: replace(literal, holds=False)}))
          for name, literal in names.items()),
        replace(case, exists=(*case.exists, Exists(frozenset(names), (), None, None, place.path))),
    ]  # fmt: skip


# Lengths


def _at_least(case: Case, n: int) -> Case:
    return replace(case, least=max(case.least, n))


def _at_most(case: Case, n: int) -> Case:
    return replace(case, most=n if case.most is None else min(case.most, n))


# Arrays


def _with_items(case: Case, first: tuple[Literal, ...], rest: Literal | None) -> Case:
    return replace(case, items=(*case.items, Items(first, rest)))


def _anything(place: Place) -> Literal:
    return Literal(place.inside(True))


def _firsts(place: Place) -> int:
    """How many items have their own schemas, which `items` does not cover."""
    first = place.schema.get("prefixItems", [])
    return len(first) if isinstance(first, list) else 0


def _literals(keyword: str, place: Place) -> tuple[Literal, ...]:
    return tuple(Literal(place.inside(each, keyword, i)) for i, each in enumerate(place.schema[keyword]))


def _array(keyword: str, place: Place, case: Case) -> list[Case]:
    value = place.schema[keyword]
    match keyword:
        case "prefixItems":
            return [_with_items(case, _literals(keyword, place), None)]
        case "items" if isinstance(value, list):  # until draft 7
            return [_with_items(case, _literals(keyword, place), None)]
        case "items":
            return [_with_items(case, (_anything(place),) * _firsts(place), Literal(place.inside(value, keyword)))]
        case "additionalItems":
            first = place.schema.get("items")
            if not isinstance(first, list):
                return [case]
            return [_with_items(case, (_anything(place),) * len(first), Literal(place.inside(value, keyword)))]
        case "contains":
            least, most = contained(place)
            item = Literal(place.inside(value, keyword))
            return (
                [case]
                if (least, most) == (0, None)
                else [replace(case, contains=(*case.contains, Contains(item, least, most)))]
            )
    return [replace(case, unique=place.path)] if value else [case]


def contained(place: Place) -> tuple[int, int | None]:
    """`minContains` and `maxContains`."""
    bounds: list[int | None] = []
    for keyword, default in (("minContains", 1), ("maxContains", None)):
        value = place.schema.get(keyword, default)
        if value is not None and (
            isinstance(value, bool) or not isinstance(value, int | float) or value != value // 1 or value < 0
        ):
            raise SchemaRefused(keyword, place.path, "is not a whole number from 0 on")
        bounds.append(None if value is None else int(value))
    return bounds[0] or 0, bounds[1]


def _one_differs(literals: tuple[Literal, ...], place: Place, case: Case) -> list[Case]:
    return [
        _at_least(_with_items(case, (*(_anything(place),) * i, replace(literal, holds=False)), None), i + 1)
        for i, literal in enumerate(literals)
    ]


def _array_denied(unknown: Unknown, keyword: str, place: Place, case: Case) -> list[Case]:
    value = place.schema[keyword]
    match keyword:
        case "prefixItems":
            return _one_differs(_literals(keyword, place), place, case)
        case "items" if isinstance(value, list):
            return _one_differs(_literals(keyword, place), place, case)
        case "items" | "additionalItems":
            first = (
                len(place.schema["items"])
                if keyword == "additionalItems" and isinstance(place.schema.get("items"), list)
                else _firsts(place)
            )
            if keyword == "additionalItems" and not isinstance(place.schema.get("items"), list):
                return []
            if value is False:
                return [_at_least(case, first + 1)]
            if value is True:
                return []
            if first:
                unknown(keyword, place, "cannot be denied beside 'prefixItems'")
                return [case]
            return [replace(case, contains=(*case.contains, Contains(Literal(place.inside(value, keyword), False), 1, None)))]
        case "contains":
            least, most = contained(place)
            item = Literal(place.inside(value, keyword))
            few = [Contains(item, 0, least - 1)] if least else []
            many = [] if most is None else [Contains(item, most + 1, None)]
            return [replace(case, contains=(*case.contains, each)) for each in few + many]
    if not value:
        return []
    unknown(keyword, place, "cannot be denied")
    return [case]


# Objects


def _with(case: Case, properties: Properties) -> Case:
    return replace(case, properties=(*case.properties, properties))


def _members(keyword: str, place: Place) -> dict[str, Literal]:
    return {name: Literal(place.inside(schema, keyword, name)) for name, schema in place.schema[keyword].items()}


def _others(place: Place) -> tuple[list[str], list[str]]:
    """The names and patterns that `additionalProperties` does not cover."""
    found = []
    for keyword in ("properties", "patternProperties"):
        value = place.schema.get(keyword, {})
        if not isinstance(value, dict):
            raise SchemaRefused(keyword, place.path, "has the wrong form")
        found.append(list(value))
    return found[0], found[1]


def _discriminated(place: Place, case: Case) -> Case:
    """OpenAPI's `discriminator` (version 3.1, section 4.8.25): the property that distinguishes options is required."""
    value = place.schema["discriminator"]
    name = value.get("propertyName") if isinstance(value, dict) else None
    return replace(case, required=(*case.required, name)) if case.type == "object" and isinstance(name, str) else case


def _object(keyword: str, place: Place, case: Case) -> list[Case]:
    value = place.schema[keyword]
    match keyword:
        case "properties":
            return [_with(case, Properties(_members(keyword, place)))]
        case "patternProperties":
            return [_with(case, Properties({}, tuple(_members(keyword, place).items())))]
        case "additionalProperties":
            names, patterns = _others(place)
            anything = _anything(place)
            other = Literal(place.inside(value, keyword))
            return [_with(case, Properties(dict.fromkeys(names, anything), tuple((p, anything) for p in patterns), other))]
        case "propertyNames":
            return [replace(case, names=(*case.names, Literal(place.inside(value, keyword))))]
        case "required":
            return [replace(case, required=(*case.required, *value))]
    cases = [case]
    for name, needed in value.items():  # dependentRequired
        cases = [after for each in cases for after in (
            replace(each, absent=each.absent | {name}), replace(each, required=(*each.required, name, *needed)))]  # fmt: skip
        if len(cases) > 200:
            raise SchemaRefused(keyword, place.path, "multiplies into too many cases")
    return cases


def _object_denied(_unknown: Unknown, keyword: str, place: Place, case: Case) -> list[Case]:
    value = place.schema[keyword]

    def exists(known: Iterable[str], patterns: Iterable[str], name: Literal | None, literal: Literal | None) -> Case:
        return replace(case, exists=(*case.exists, Exists(frozenset(known), tuple(patterns), name, literal, place.path)))

    match keyword:
        case "properties":
            return [_with(replace(case, required=(*case.required, name)), Properties({name: replace(literal, holds=False)}))
                    for name, literal in _members(keyword, place).items()]  # fmt: skip
        case "patternProperties":
            return [exists((), (), Literal(place.inside({"pattern": pattern}, keyword, pattern)), replace(literal, holds=False))
                    for pattern, literal in _members(keyword, place).items()]  # fmt: skip
        case "additionalProperties":
            return [exists(*_others(place), None, Literal(place.inside(value, keyword), False))]
        case "propertyNames":
            return [exists((), (), Literal(place.inside(value, keyword), False), None)]
        case "required":
            return [replace(case, absent=case.absent | {name}) for name in value]
    return [replace(case, required=(*case.required, name), absent=case.absent | {other})
            for name, needed in value.items() for other in needed]  # fmt: skip
