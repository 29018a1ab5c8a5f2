"""The cases of a JSON schema as grammar rules, in llguidance's Lark form.

Rules:
- A rule stands for a set of literals and is made once, so that schemas may refer to themselves.
- Every value that the rules admit is valid under the schema. They admit all valid values, but in one spelling. Properties come
  in the schema's order, unnamed ones last. Numbers and escapes have one form, and white space is bounded.
- If a name occurs twice, JSON readers use the last property. So a property that the schema demands among the unnamed ones comes
  last.
- A schema whose grammar would have too many alternatives is refused here, by name, before compilation.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from typing import Any, Final

from lacre_backend.api.schema import sets
from lacre_backend.api.schema.cases import Cases
from lacre_backend.api.schema.patterns import NotRegular
from lacre_backend.api.schema.scalars import ANY_OF, NOTHING, PRELUDE, ScalarRules, inline, quoted
from lacre_backend.api.schema.terms import (
    TYPES,
    Case,
    Contains,
    Exists,
    Literal,
    Literals,
    NoSchema,
    Properties,
    SchemaRefused,
    TooCostly,
)

MAX_OPTIONAL: Final = 450  # optional properties of one object: llguidance tracks four states for each, and 2,000 in total
MAX_ALTERNATIVES: Final = 300  # arrays and objects at one place, six states each
MAX_CLASSES: Final = 4  # patterns of property names in one object: each may match or not
MAX_COUNTED: Final = 2000  # states of an object or array whose properties or items are counted
MAX_FIRST: Final = 1000  # items of an array with their own schemas
MAX_DEPTH: Final = 100  # of nested schemas; below Python's own limit
_NO: Final = None  # the rule of an impossible value
_UNIQUE: Final = (
    f"needs items of at most {sets.MAX_LISTED} values, as of an enum, or a 'maxItems' of 1 at most; "
    "use a list, or omit 'strict'"
)


class RuleMaker(ScalarRules):
    """Makes the rules of one schema."""

    def __init__(self, cases: Cases, *, watched: bool = False) -> None:
        """watched: the engine can detect repeated items in the answer, which consists of this value only."""
        super().__init__(cases)
        self._watched = watched
        self.distinct: dict[str, bool] = {}  # by place of a watched list: whether its numbers are integers
        self._made: dict[frozenset[tuple[object, ...]], tuple[str | None, Literals]] = {}
        self._depth = 0

    def text(self, root: Literal) -> str:
        """The whole grammar. Raises `SchemaRefused`."""
        name = self._rule((root,))
        if name is _NO:
            raise NoSchema("schema", "#", "allows no value")
        return f"{PRELUDE}start: {name}\n" + "\n".join(self._lines) + "\n"

    def _rule(self, literals: Iterable[Literal]) -> str | None:
        """The name of a rule for the values that satisfy all literals; None if there are none."""
        wanted = tuple({each.key: each for each in literals if each.key != (True, True)}.values())
        if not wanted:
            return "anything"
        key = frozenset(each.key for each in wanted)
        if key in self._made:
            return self._made[key][0]
        name = f"r{next(self._names)}"
        self._made[key] = name, wanted  # the name first: a schema may refer to itself
        self._depth += 1
        if self._depth > MAX_DEPTH:
            raise TooCostly("schema", wanted[0].place.path, f"has more than {MAX_DEPTH} levels")
        bodies = self._alternatives(wanted)
        self._depth -= 1
        if not bodies:
            self._made[key] = _NO, wanted
            return _NO
        self._define(name, " | ".join(bodies))
        return name

    def _alternatives(self, wanted: Literals) -> list[str]:
        scalars: list[dict[str, Any]] = []
        bodies: list[str] = []
        for kind in TYPES:
            for case in self._cases.of(wanted, kind):
                try:
                    self._one(case, wanted[0], scalars, bodies)
                except SchemaRefused as refused:
                    self._cases.leave(refused)
                    bodies.append(ANY_OF[kind])
        bodies = list(dict.fromkeys(bodies))
        if len(bodies) > MAX_ALTERNATIVES:
            told = f"leaves more than {MAX_ALTERNATIVES} arrays and objects at one place"
            self._cases.leave(SchemaRefused("anyOf", wanted[0].place.path, told))
            return ["anything"]
        if scalars:
            one = scalars[0] if len(scalars) == 1 else {"anyOf": scalars}
            bodies.append(inline(one))
        return bodies

    def _one(self, case: Case, at: Literal, scalars: list[dict[str, Any]], bodies: list[str]) -> None:
        match case.type:
            case "array":
                bodies += self._array(case, at)
            case "object":
                bodies += self._object(case, at)
            case _:
                self._scalar(case, at, scalars, bodies)

    # Arrays

    def _array(self, case: Case, at: Literal) -> list[str]:
        n_first = max((len(each.first) for each in case.items), default=0)
        if n_first > MAX_FIRST:
            raise SchemaRefused("prefixItems", at.place.path, f"has more than {MAX_FIRST} items")
        if case.unique is not None and not (case.most is not None and case.most <= 1):
            found = None if n_first or case.contains else sets.values(self._cases, _item(case, 0), self._keeps(at))
            if found is not None:
                return self._set(case, found)
            if self._watched and not n_first and not case.contains and sets.endless(self._cases, _item(case, 0)):
                whole = sets.whole(self._cases, _item(case, 0))
                self.distinct[case.unique] = whole and self.distinct.get(case.unique, True)
            else:
                self._cases.unknown("uniqueItems", replace(at.place, path=case.unique), _UNIQUE)
        firsts = [_item(case, i) for i in range(n_first)]
        rest = _item(case, n_first)
        if case.contains:
            return self._counted_array(case, at, firsts, rest)
        most = case.most
        names: list[str] = []
        for i, literals in enumerate(firsts):
            name = self._rule(literals)
            if name is _NO:
                most = i if most is None else min(most, i)
                break
            names.append(name)
        tail = self._rule(rest) if most is None or most > n_first else _NO
        if tail is _NO:
            most = len(names) if most is None else min(most, len(names))
        if most is not None and most < case.least:
            return []
        return [f'"[" {self._sequence(names, tail, case.least, most)} "]"']

    def _keeps(self, at: Literal) -> Callable[[Case, str], bool]:
        return lambda case, text: self._is(case, text, at)

    def _set(self, case: Case, found: Sequence[object]) -> list[str]:
        most = len(found) if case.most is None else min(case.most, len(found))
        if most < case.least:
            return []
        items = [quoted(each) if isinstance(each, str) else inline({"const": each}) for each in found]
        name = f"r{next(self._names)}"
        for line in sets.rules(name, items, case.least, most):
            self._line(line)
        return [f'"[" {name} "]"']

    def _sequence(self, names: Sequence[str], tail: str | None, least: int, most: int | None) -> str:
        """A comma-separated list: first the items of `names`, then any number of `tail`."""
        if most == 0:
            return ""
        after = ""
        n = len(names) if most is None else min(len(names), most)
        start = max(n, 1)
        if tail is not None and (most is None or most > start):
            after = f'("," {tail}){{{max(least - start, 0)},{"" if most is None else most - start}}}'
        for i in range(n - 1, 0, -1):
            step = f'"," {names[i]} {after}'
            after = self._new(step if i < least else f"({step})?")
        first = names[0] if names else tail
        return f"{first} {after}" if least else f"({first} {after})?"

    def _counted_array(self, case: Case, at: Literal, firsts: list[Literals], rest: Literals) -> list[str]:
        """States: the number of items, and how many of them match each `contains`."""
        if len(case.contains) > 2:
            raise SchemaRefused("contains", at.place.path, "is required in more than two ways at once")
        end = max(len(firsts), case.least, 0 if case.most is None else case.most)
        caps = [max(each.least, -1 if each.most is None else each.most + 1) for each in case.contains]
        if (end + 1) * math.prod(cap + 1 for cap in caps) > MAX_COUNTED:
            raise SchemaRefused("contains", at.place.path, "has too many items to count")
        states: dict[tuple[int, tuple[int, ...]], str | None] = {}

        def state(i: int, counts: tuple[int, ...]) -> str | None:
            if (i, counts) not in states:
                name = f"r{next(self._names)}"
                states[i, counts] = name
                ways = steps(i, counts)
                states[i, counts] = name if ways else _NO
                if ways:
                    self._define(name, " | ".join(ways))
            return states[i, counts]

        def steps(i: int, counts: tuple[int, ...]) -> list[str]:
            enough = i >= case.least and all(c.least <= n <= (math.inf if c.most is None else c.most)
                                             for c, n in zip(case.contains, counts, strict=True))  # fmt: skip
            ways = ['""'] if enough else []
            if case.most is not None and i >= case.most:
                return ways
            for picks in itertools.product((True, False), repeat=len(counts)):
                after = tuple(min(n + pick, cap) for n, pick, cap in zip(counts, picks, caps, strict=True))
                if any(c.most is not None and n > c.most for c, n in zip(case.contains, after, strict=True)):
                    continue
                item = self._rule((*(firsts[i] if i < len(firsts) else rest), *_picked(case.contains, picks)))
                following = state(min(i + 1, end), after) if item is not _NO else _NO
                if item is not _NO and following is not _NO:
                    comma = '"," ' if i else ""
                    ways.append(f"{comma}{item} {following}")
            return ways

        if end == 0:
            end = 1  # the first item has no comma before it
        start = state(0, (0,) * len(caps))
        return [] if start is _NO else [f'"[" {start} "]"']

    # Objects

    def _object(self, case: Case, at: Literal) -> list[str]:
        if case.exists:
            return self._existing(case, at)
        return self._fields(case, at, None)

    def _existing(self, case: Case, at: Literal) -> list[str]:
        """Requires a property without a known name: one that other parts name, or one of the rest."""
        exists, others = case.exists[0], case.exists[1:]
        without = replace(case, exists=others)
        value = () if exists.value is None else (exists.value,)
        bodies = []
        for name in _named(case):
            unknown = name not in exists.known and not any(self._match(p, name, at) for p in exists.patterns)
            if unknown and (exists.name is None or self._name_is(name, (exists.name,), at)):
                bodies += self._object(_demanding(without, name, value), at)
        if others:
            self._cases.unknown("not", at.place, "requires more than one property without a name")
            return bodies
        return bodies + self._fields(without, at, exists)

    def _match(self, pattern: str, name: str, at: Literal) -> bool:
        try:
            return self._patterns.matches(pattern, name)
        except NotRegular as error:
            raise SchemaRefused("patternProperties", at.place.path, str(error)) from None

    def _value(self, case: Case, name: str, at: Literal) -> list[Literal]:
        try:
            return [literal for each in case.properties for literal in each.of(name, self._patterns)]
        except NotRegular as error:
            raise SchemaRefused("patternProperties", at.place.path, str(error)) from None

    def _name_is(self, name: str, literals: Literals, at: Literal) -> bool:
        return not literals or any(
            (case.only is None or name in case.only)
            and name not in case.never
            and not case.formats
            and self._is(case, name, at)
            for case in self._cases.of(literals, "string")
        )

    def _fields(self, case: Case, at: Literal, exists: Exists | None) -> list[str]:
        """exists: a required property that the case does not name."""
        names = _named(case)
        members: list[tuple[str, bool]] = []
        for name in names:
            required = name in case.required
            rule = (
                _NO
                if name in case.absent or not self._name_is(name, case.names, at)
                else self._rule(self._value(case, name, at))
            )
            if rule is _NO and required:
                return []
            if rule is not _NO:
                members.append((f'{quoted(name)} ":" {rule}', required))
        if sum(not required for _, required in members) > MAX_OPTIONAL:
            raise SchemaRefused("properties", at.place.path, f"names more than {MAX_OPTIONAL} optional properties")
        pairs = self._pairs(case, at, names, None)
        last = None
        if exists is not None:
            special = self._pairs(case, at, names, exists)
            if not special:
                return []
            last = self._new(" | ".join(special))
        pair = self._new(" | ".join(pairs)) if pairs else None
        return self._laid_out(case, at, members, pair, last)

    def _laid_out(
        self, case: Case, at: Literal, members: list[tuple[str, bool]], pair: str | None, last: str | None
    ) -> list[str]:
        required = sum(needed for _, needed in members) + (last is not None)
        least, most = max(case.least - required, 0), case.most
        if most is not None and most < required:
            return []
        if least == 0 and most is None:
            body = self._members(members, pair, last)
            return [f'"{{" {body} "}}"']
        return self._counted_object(case, at, members, pair, last)

    def _members(self, members: list[tuple[str, bool]], pair: str | None, last: str | None) -> str:
        """Members in order with commas between, the optional ones present or not; then the unnamed ones.

        Built from the last member backwards. `later` follows a present member; `first` applies if none was present yet.
        """
        tail = "" if pair is None else f'("," {pair})*'
        begun = "" if pair is None else f'{pair} ("," {pair})*'
        if last is not None:
            later = f'{tail} "," {last}'
            first = f'({pair} ",")* {last}' if pair is not None else last
        else:
            later, first = tail, f"({begun})?" if begun else ""
        for member, needed in reversed(members):
            following, instead = later, first
            later = self._new(f'"," {member} {following}' if needed else f'"," {member} {following} | {following or NOTHING}')
            first = self._new(f"{member} {following}" if needed else f"{member} {following} | {instead or NOTHING}")
        return first

    def _counted_object(
        self, case: Case, at: Literal, members: list[tuple[str, bool]], pair: str | None, last: str | None
    ) -> list[str]:
        """States: the next member, and how many are present."""
        cap = case.least if case.most is None else case.most + 1
        if pair is not None and case.least > sum(needed for _, needed in members) + 1:
            self._cases.unknown("minProperties", at.place, "counts properties without a name, which a model may repeat")
        if (len(members) + 1) * (cap + 1) > MAX_COUNTED:
            keyword = "minProperties" if case.least else "maxProperties"
            raise SchemaRefused(keyword, at.place.path, "has too many properties to count")
        named = [(self._new(member), needed) for member, needed in members]
        following: dict[int, str | None] = {n: self._unnamed(case, n, pair, last) for n in range(cap + 1)}
        for name, needed in reversed(named):
            before: dict[int, str | None] = {}
            for n in range(cap + 1):
                then, comma = following[min(n + 1, cap)], '"," ' if n else ""
                ways = [] if then is None else [f"{comma}{name} {then}"]
                if not needed and (skipped := following[n]) is not None:
                    ways.append(skipped)
                before[n] = self._new(" | ".join(ways)) if ways else None
            following = before
        return [] if following[0] is None else [f'"{{" {following[0]} "}}"']

    def _unnamed(self, case: Case, n: int, pair: str | None, last: str | None) -> str | None:
        """What may follow that many named properties."""
        least = max(case.least - n, 0)
        most = None if case.most is None else case.most - n
        if most is not None and most < 0:
            return None
        if last is not None:
            if most == 0:
                return None
            before = "" if pair is None or most == 1 else f'({pair} ","){{0,{"" if most is None else most - 1}}}'
            comma = '"," ' if n else ""
            return self._new(f"{comma}{before} {last}") if least <= 1 else None
        if pair is None or most == 0:
            return self._new('""') if least == 0 else None
        if n:
            return self._new(f'("," {pair}){{{least},{"" if most is None else most}}}')
        others = "" if most == 1 else f'("," {pair}){{{max(least - 1, 0)},{"" if most is None else most - 1}}}'
        some = f"{pair} {others}"
        return self._new(some if least else f"({some})?")

    def _pairs(self, case: Case, at: Literal, names: Sequence[str], exists: Exists | None) -> list[str]:
        """Name and value of properties that the case does not name: one alternative for each set of patterns that a name may
        match.
        """
        patterns = list(dict.fromkeys(pattern for each in case.properties for pattern, _ in each.patterns))
        if exists is not None:
            patterns += [p for p in exists.patterns if p not in patterns]
        if len(patterns) > MAX_CLASSES:
            raise SchemaRefused("patternProperties", at.place.path, f"has more than {MAX_CLASSES} patterns at one place")
        found = []
        for picks in itertools.product((True, False), repeat=len(patterns)):
            held = {pattern for pattern, pick in zip(patterns, picks, strict=True) if pick}
            if exists is not None and held & set(exists.patterns):
                continue
            literals = _unnamed_value(case, held)
            if exists is not None and exists.value is not None:
                literals.append(exists.value)
            value = self._rule(literals)
            if value is not _NO:
                conditions = [(pattern, pattern in held) for pattern in patterns]
                found += [f'{key} ":" {value}' for key in self._keys(case, conditions, names, at, exists)]
        return found

    def _keys(
        self, case: Case, conditions: list[tuple[str, bool]], names: Sequence[str], at: Literal, exists: Exists | None
    ) -> list[str]:
        extra = () if exists is None or exists.name is None else (exists.name,)
        never = frozenset(names) | (frozenset() if exists is None else exists.known)
        wanted = (*case.names, *extra)
        kinds = self._cases.of(wanted, "string") if wanted else [Case("string")]
        keys = []
        for kind in kinds:
            if kind.most is not None and kind.most < kind.least:
                continue
            kind = replace(kind, never=kind.never | never, patterns=(*kind.patterns, *conditions))  # noqa: PLW2901 - narrowed
            if kind.only is not None:
                keys += [quoted(t) for t in sorted(kind.only) if t not in kind.never and self._is(kind, t, at)]
            elif kind == Case("string"):
                keys.append("STR")
            else:
                keys.append(self._terminal(self._spelled(kind, at)))
        return keys


def _item(case: Case, i: int) -> Literals:
    found = []
    for each in case.items:
        if i < len(each.first):
            found.append(each.first[i])
        elif each.rest is not None:
            found.append(each.rest)
    return tuple(found)


def _picked(contains: tuple[Contains, ...], picks: tuple[bool, ...]) -> Literals:
    return tuple(
        each.item if pick else replace(each.item, holds=not each.item.holds) for each, pick in zip(contains, picks, strict=True)
    )


def _named(case: Case) -> list[str]:
    """The names that the case mentions, in order."""
    named = [name for each in case.properties for name in each.named]
    return list(dict.fromkeys([*named, *case.required, *sorted(case.absent)]))


def _unnamed_value(case: Case, held: set[str]) -> list[Literal]:
    found: list[Literal] = []
    for each in case.properties:
        own = [literal for pattern, literal in each.patterns if pattern in held]
        found += own or ([] if each.other is None else [each.other])
    return found


def _demanding(case: Case, name: str, value: Literals) -> Case:
    return replace(
        case, required=(*case.required, name), properties=(*case.properties, *(Properties({name: each}) for each in value))
    )
