"""Scalars of a JSON schema as grammar rules and terminals, and the common base of all rules.

Rules:
- A string has one spelling: short escapes, and control characters with four digits. So an excluded string can be excluded by
  its spelling.
- Numbers have as many digits as JSON readers keep exactly.
"""

from __future__ import annotations

import itertools
import json
import math
from typing import Any, Final

from lacre_backend.api.schema.cases import Cases
from lacre_backend.api.schema.formats import NARROWER
from lacre_backend.api.schema.numbers import empty_range, remainders
from lacre_backend.api.schema.patterns import NotRegular, Pattern, Patterns
from lacre_backend.api.schema.terms import Case, Literal, SchemaRefused, TooCostly

MAX_RULES: Final = 8000  # of one schema
BLANK: Final = r"[ \n\r\t]{1,20}"  # bounded; otherwise a model may write white space up to its limit

PRELUDE: Final = rf"""%llguidance {{"no_forcing": true, "ignore_once": true}}
%ignore /{BLANK}/
CH: /[^"\\\x00-\x1F\x7F]/ | /\\(["\\bfnrt]|u00(0[0-7be-f]|1[0-9a-f]|7f))/
STR: "\"" CH* "\""
PLAIN: /[^"\\\x00-\x1F\x7F]*/
NUMBER: /-?(0|[1-9][0-9]{{0,15}})(\.[0-9]{{1,15}})?([eE][-+]?[0-9]{{1,2}})?/
WHOLE: /-?(0|[1-9][0-9]{{0,15}})/
KEYWORD: /true|false|null/
FRACTION: /-?(0|[1-9][0-9]{{0,8}})\.[0-9]{{0,4}}[1-9]/
NULL: "null"
BOOLEAN: /true|false/
anyobject: "{{" (STR ":" anything ("," STR ":" anything)*)? "}}"
anyarray: "[" (anything ("," anything)*)? "]"
anything: anyobject | anyarray | STR | NUMBER | KEYWORD
"""
# The rule for any value of a type.
ANY_OF: Final = {
    "null": "NULL",
    "boolean": "BOOLEAN",
    "number": "NUMBER",
    "string": "STR",
    "array": "anyarray",
    "object": "anyobject",
}
# An inline schema uses the white space of the rules around it: only then llguidance joins both into one set of lexemes.
_BLANKS: Final = {"x-guidance": {"whitespace_pattern": BLANK}}
NOTHING: Final = '""'


class ScalarRules:
    """Makes the terminals, and the rules of values without parts."""

    def __init__(self, cases: Cases) -> None:
        self._cases = cases
        self._patterns = Patterns()
        self._lines: list[str] = []
        self._names = itertools.count()
        self._terminals: dict[str, str] = {}
        self.remainders = 0  # that automata store for `multipleOf`

    def _new(self, body: str) -> str:
        name = f"r{next(self._names)}"
        self._define(name, body)
        return name

    def _define(self, name: str, body: str) -> None:
        self._line(f"{name}: {body}")

    def _line(self, line: str) -> None:
        if len(self._lines) > MAX_RULES:
            raise TooCostly("schema", "#", f"needs more than {MAX_RULES} rules")
        self._lines.append(line)

    def _terminal(self, body: str) -> str:
        if body not in self._terminals:
            self._terminals[body] = name = f"T{len(self._terminals)}"
            self._lines.append(f"{name}: {body}")
        return self._terminals[body]

    def _scalar(self, case: Case, at: Literal, scalars: list[dict[str, Any]], bodies: list[str]) -> None:
        match case.type:
            case "null":
                scalars.append({"type": "null"})
            case "boolean":
                scalars += [{"type": "boolean"}] if case.only is None else [{"const": value} for value in sorted(case.only)]
            case "number":
                self._number(case, at, scalars, bodies)
            case _:
                self._string(case, at, scalars, bodies)

    def _number(self, case: Case, at: Literal, scalars: list[dict[str, Any]], bodies: list[str]) -> None:
        if empty_range(case):
            return
        bounds: dict[str, Any] = {}
        for (value, without), keyword in ((case.low, "inimum"), (case.high, "aximum")):
            if not math.isinf(value):
                m = keyword.replace("i", "mi", 1) if keyword == "inimum" else "m" + keyword
                bounds[f"exclusive{m[0].upper()}{m[1:]}" if without else m] = value
        if case.whole is False:
            if bounds or case.multiples:
                raise SchemaRefused("type", at.place.path, "cannot exclude integers from a range")
            bodies.append("FRACTION")
            return
        if not bounds and not case.multiples:
            bodies.append("WHOLE" if case.whole else "NUMBER")  # with as many digits as JSON readers keep exactly
            return
        scalars.append(self._numeric({"type": "integer" if case.whole else "number", **bounds}, case.multiples))

    def _numeric(self, schema: dict[str, Any], multiples: tuple[float, ...]) -> dict[str, Any]:
        if not multiples:
            return schema
        self.remainders += remainders(multiples[0])
        return {**schema, "multipleOf": multiples[0]}

    def _string(self, case: Case, at: Literal, scalars: list[dict[str, Any]], bodies: list[str]) -> None:
        if case.most is not None and case.most < case.least:
            return
        if case.only is not None:
            scalars += self._listed(case, at)
        elif case.never or not all(holds and self._read(pattern, at).plain for pattern, holds in case.patterns):
            bodies.append(self._terminal(self._spelled(case, at)))
        else:
            lengths = {"minLength": case.least} if case.least else {}
            most = {} if case.most is None else {"maxLength": case.most}
            schema: dict[str, Any] = {"type": "string", **lengths, **most}
            parts = [{"pattern": pattern} for pattern, _ in dict.fromkeys(case.patterns)]
            parts += [{"format": name} for name in dict.fromkeys(case.formats)]
            scalars.append({**schema, **parts[0]} if len(parts) == 1 else {**schema, "allOf": parts} if parts else schema)

    def _listed(self, case: Case, at: Literal) -> list[dict[str, Any]]:
        if case.formats:
            raise SchemaRefused("format", at.place.path, "is combined with a list of values; remove one of them")
        found = [text for text in sorted(case.only or ()) if text not in case.never and self._is(case, text, at)]
        return [{"enum": found}] if found else []

    def _is(self, case: Case, text: str, at: Literal) -> bool:
        """Whether a text satisfies lengths and patterns."""
        long_enough = case.least <= len(text) and (case.most is None or len(text) <= case.most)
        try:
            return long_enough and all(self._patterns.matches(pattern, text) == holds for pattern, holds in case.patterns)
        except NotRegular as error:
            raise SchemaRefused("pattern", at.place.path, str(error)) from None

    def _spelled(self, case: Case, at: Literal) -> str:
        """A string as a terminal, including its quotes."""
        parts = [_counted_string(case)]
        for pattern, holds in dict.fromkeys((*case.patterns, *((NARROWER[name], True) for name in case.formats))):
            spelled = f'("\\"" (PLAIN & ({self._read(pattern, at).expression})) "\\"")'
            parts.append(spelled if holds else f"~{spelled}")
            if not holds:
                parts.append('("\\"" PLAIN "\\"")')  # only in these a pattern can be checked by the characters themselves
        if case.never:
            parts.append(f"~({' | '.join(map(quoted, sorted(case.never)))})")  # as one set: separate terms would multiply
        return " & ".join(
            f"({part})" if " " in part and not part.startswith(("~", "(")) else part for part in dict.fromkeys(parts)
        )

    def _read(self, pattern: str, at: Literal) -> Pattern:
        try:
            return self._patterns.read(pattern)
        except NotRegular as error:
            raise SchemaRefused("pattern", at.place.path, str(error)) from None


def _counted_string(case: Case) -> str:
    """Any string of the case's length."""
    if case.most is None:
        return f'"\\"" CH{{{case.least}}} CH* "\\""' if case.least else "STR"
    return f'"\\"" CH{{{case.least},{case.most}}} "\\""' if case.most else '"\\"\\""'


def inline(schema: dict[str, Any]) -> str:
    """A schema that llguidance parses itself."""
    return f"%json {json.dumps(schema | _BLANKS)}"


def quoted(text: str) -> str:
    """A JSON string as a Lark literal."""
    spelled = json.dumps(text, ensure_ascii=False).replace("\x7f", "\\u007f")  # one spelling each, the same as `CH` has
    return json.dumps(spelled, ensure_ascii=False)
