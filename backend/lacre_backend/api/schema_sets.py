"""Arrays whose items differ (`uniqueItems`), where their values can be listed.

Rules
- llguidance's rules carry 64 bits, one for each value that an array may hold: set when the value is there, and looked at before
  it comes. So any order is admitted, and no value twice.
- Of values that cannot be listed, such as all texts, a grammar keeps no record: there `uniqueItems` is refused.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from typing import Final

from lacre_backend.api.schema_cases import Cases
from lacre_backend.api.schema_numbers import empty_range
from lacre_backend.api.schema_terms import TYPES, Case, Literals

MAX_LISTED: Final = 64  # values of an item: the bits of a rule


def values(cases: Cases, item: Literals, keeps: Callable[[Case, str], bool]) -> list[object] | None:
    """What an item may be; None where there are too many values, or such as are not listed. keeps: whether a text is as a case
    wants it.
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
    """The lines of a rule `name` for what stands between an array's brackets. items: what a grammar calls each value."""
    later = f"{name}n"
    count = f"bit_count_ge(_, {least})"
    chosen = [f"{item} {later}::set_bit({i}) %if and(bit_clear({i}), bit_count_lt(_, {most}))" for i, item in enumerate(items)]
    return [
        f"{name}: {name}f::0",
        " | ".join([f'{name}f::_: "" %if {count}', *chosen]),
        " | ".join([f'{later}::_: "" %if {count}', *(f'"," {each}' for each in chosen)]),
    ]


def spelled(value: object) -> str:
    """A value as JSON has it, in its one spelling."""
    return json.dumps(value, ensure_ascii=False)
