"""Arrays whose items must differ (`uniqueItems`), if their values can be listed.

Rules:
- llguidance's rules carry 64 bits, one for each value that an array may contain. A bit is set when its value occurs, and
  checked before it may occur. So any order is allowed, and no value occurs twice.
- A grammar cannot track values that cannot be listed, such as all texts. If the answer consists of that JSON only, the engine
  reads it and forbids tokens that would repeat an item (`engine.distinct`). Otherwise `uniqueItems` is refused.
"""

from __future__ import annotations

import math
import urllib.parse
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any, Final

from lacre_backend.api.schema.cases import Cases
from lacre_backend.api.schema.numbers import empty_range
from lacre_backend.api.schema.terms import TYPES, Case, Literals, SchemaRefused
from lacre_backend.engine.distinct import ANY, MARK, WHOLE

MAX_LISTED: Final = 64  # values of an item: the bits of a rule
# Keywords whose schemas apply to the same value, or to any member or item of it.
_INSIDE: Final[Mapping[str, tuple[str, ...]]] = {
    "allOf": (), "anyOf": (), "oneOf": (), "additionalProperties": (ANY,), "items": (ANY,), "prefixItems": (ANY,),
}  # fmt: skip
# Keywords that may prevent an item from becoming longer and so different.
_LIMITING: Final = frozenset(
    {"enum", "const", "pattern", "format", "maxLength", "minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum",
     "multipleOf", "$ref", "anyOf", "oneOf", "allOf", "not", "if"}
)  # fmt: skip
MAX_FOLLOWED: Final = 32  # nested references on the way to a list


def values(cases: Cases, item: Literals, keeps: Callable[[Case, str], bool]) -> list[object] | None:
    """The values that an item may have; None if there are too many or they cannot be listed. keeps: whether a text satisfies a
    case.
    """
    found: list[object] = []
    for kind in TYPES:
        for case in cases.of(item, kind):
            listed = _listed(case, keeps)
            if listed is None:
                return None
            found += [each for each in listed if not any(type(each) is type(other) and each == other for other in found)]
            if len(found) > MAX_LISTED:
                return None
    return found


def _listed(case: Case, keeps: Callable[[Case, str], bool]) -> list[object] | None:
    match case.type:
        case "null":
            return [None]
        case "boolean":
            return sorted({True, False} if case.only is None else case.only)
        case "string" if case.only is not None and not case.formats:
            return [text for text in sorted(case.only) if text not in case.never and keeps(case, text)]
        case "number" if empty_range(case):
            return []
        case "number" if case.low[0] == case.high[0] and not case.multiples:
            return [case.low[0]]
        case "number" if case.whole:
            return _whole(case)
    return None


def _whole(case: Case) -> list[object] | None:
    (low, without_low), (high, without_high) = case.low, case.high
    if math.isinf(low) or math.isinf(high):
        return None
    first, last = math.ceil(low), math.floor(high)
    first += without_low and first == low
    last -= without_high and last == high
    if last - first >= MAX_LISTED or case.multiples:
        return None
    return list(range(first, last + 1))


def rules(name: str, items: Sequence[str], least: int, most: int) -> list[str]:
    """The lines of a rule `name` for the content of an array's brackets. items: the grammar's name for each value."""
    later = f"{name}n"
    count = f"bit_count_ge(_, {least})"
    chosen = [f"{item} {later}::set_bit({i}) %if and(bit_clear({i}), bit_count_lt(_, {most}))" for i, item in enumerate(items)]
    return [
        f"{name}: {name}f::0",
        " | ".join([f'{name}f::_: "" %if {count}', *chosen]),
        " | ".join([f'{later}::_: "" %if {count}', *(f'"," {each}' for each in chosen)]),
    ]


def endless(cases: Cases, item: Literals) -> bool:
    """Whether an item is a text or a number that can always be extended into a different one."""
    free = {kind: Case(kind) for kind in ("string", "number")}
    found = [(kind, case) for kind in TYPES for case in cases.of(item, kind)]
    return bool(found) and all(kind in free and replace(case, whole=None) == free[kind] for kind, case in found)


def whole(cases: Cases, item: Literals) -> bool:
    """Whether a number item must be an integer."""
    found = list(cases.of(item, "number"))
    return bool(found) and all(case.whole for case in found)


def watched(schema: Mapping[str, Any], places: Mapping[str, bool]) -> list[str]:
    """The lines that tell the engine where in an answer the lists at these places of a schema are. places: by place, whether
    its numbers are integers. Raises `SchemaRefused`.
    """
    found: dict[str, set[tuple[str, ...]]] = {}
    others: set[tuple[str, ...]] = set()
    waiting: list[tuple[Any, str, tuple[str, ...], frozenset[str]]] = [(schema, "#", (), frozenset())]
    while waiting:
        part, place, path, followed = waiting.pop()
        if not isinstance(part, dict):
            continue
        if place in places:
            found.setdefault(place, set()).add(path)
        elif _is_limited(part):
            others.add(path)
        reference = part.get("$ref")
        if isinstance(reference, str):
            if reference in followed or len(followed) > MAX_FOLLOWED:
                raise SchemaRefused("uniqueItems", place, "is in a schema that refers to itself; use a list, or omit 'strict'")
            waiting.append((_target(schema, reference), reference, path, followed | {reference}))
        for keyword, step in _INSIDE.items():
            inside = part.get(keyword)
            waiting += [(inside, f"{place}/{keyword}", (*path, *step), followed)]
            if isinstance(inside, list):
                waiting += [(each, f"{place}/{keyword}/{i}", (*path, *step), followed) for i, each in enumerate(inside)]
        members = part.get("properties")
        for name, each in members.items() if isinstance(members, dict) else ():
            waiting.append((each, f"{place}/properties/{name}", (*path, _step(name)), followed))
    for place in sorted(places):
        paths = found.get(place, set())
        if not paths or any(_may_be_one(path, other) for path in paths for other in others):
            raise SchemaRefused(
                "uniqueItems", place, "is at a place where repeated items cannot be detected; use a list, or omit 'strict'"
            )
    lines = {(*path, *((WHOLE,) if places[place] else ())) for place, paths in found.items() for path in paths}
    return sorted(MARK + "".join(f"/{step}" for step in line) for line in lines)


def _is_limited(part: Mapping[str, Any]) -> bool:
    """Whether it may be a list whose items cannot always be extended, so that it must admit equal items."""
    prefix = part.get("prefixItems")
    items = [part.get("items"), *(prefix if isinstance(prefix, list) else ())]
    listed = [part.get("const"), *(part["enum"] if isinstance(part.get("enum"), list) else ())]
    return any(isinstance(each, dict) and not _LIMITING.isdisjoint(each) for each in items) or any(
        isinstance(each, list) for each in listed
    )


def _may_be_one(path: tuple[str, ...], other: tuple[str, ...]) -> bool:
    return len(path) == len(other) and all(a == b or ANY in (a, b) for a, b in zip(path, other, strict=True))


def _step(name: str) -> str:
    return urllib.parse.quote(name.encode("utf-8", "surrogatepass"), safe="")


def _target(schema: Any, reference: str) -> Any:
    for step in reference.removeprefix("#").split("/")[1:]:
        schema = schema.get(step.replace("~1", "/").replace("~0", "~")) if isinstance(schema, dict) else None
    return schema
