"""The terms in which a JSON schema is taken apart: schemas that hold or do not, and what one case demands of a value."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Final

from lacre_backend.api.schema.patterns import Patterns

TYPES: Final = ("null", "boolean", "number", "string", "array", "object")
MAX_EXACT: Final = 2**53  # numbers beyond are not told apart by readers of JSON
MAX_COUNT: Final = 10_000  # of characters, items or properties; far beyond what a context holds


class SchemaRefused(Exception):
    """What cannot be enforced. keyword: its name; path: where, from the schema's root."""

    def __init__(self, keyword: str, path: str, problem: str) -> None:
        super().__init__(problem)
        self.keyword = keyword
        self.path = path
        self.problem = problem


class NoSchema(SchemaRefused):
    """What is no schema, is too large, or admits nothing: refused whether strict or not."""


class TooCostly(SchemaRefused):
    """What takes too long to look at. Of a schema that is not strict all is left to the model."""


@dataclass(frozen=True, slots=True)
class Place:
    """A schema where it stands. scope: the resources it was reached through, for `$dynamicRef`."""

    schema: Any
    base: str
    scope: tuple[str, ...]
    path: str

    @property
    def key(self) -> tuple[object, ...]:
        if isinstance(self.schema, bool):
            return (self.schema,)
        members = self.schema.items() if isinstance(self.schema, dict) else ()
        if members and not any(k[:1] == "$" or isinstance(v, dict | list) for k, v in members):
            return ("alone", *sorted((k, type(v), v) for k, v in members))  # the same wherever it stands
        return (id(self.schema), self.scope)

    def inside(self, schema: Any, *steps: str | int) -> Place:
        """A schema below this one."""
        return replace(self, schema=schema, path="/".join([self.path, *map(str, steps)]))


@dataclass(frozen=True, slots=True)
class Literal:
    """A schema that holds, or does not."""

    place: Place
    holds: bool = True

    @property
    def key(self) -> tuple[object, ...]:
        return (self.holds, *self.place.key)


Literals = tuple[Literal, ...]


@dataclass(frozen=True, slots=True)
class Items:
    """first: of the first items; rest: of all others."""

    first: tuple[Literal, ...]
    rest: Literal | None


@dataclass(frozen=True, slots=True)
class Properties:
    """named: by name; patterns: by what a name matches; other: of the properties that neither tells of."""

    named: Mapping[str, Literal]
    patterns: tuple[tuple[str, Literal], ...] = ()
    other: Literal | None = None

    def of(self, name: str, searched: Patterns) -> list[Literal]:
        found = [self.named[name]] if name in self.named else []
        found += [literal for pattern, literal in self.patterns if searched.matches(pattern, name)]
        return found or ([] if self.other is None else [self.other])


@dataclass(frozen=True, slots=True)
class Exists:
    """A property that neither a name nor a pattern tells of, or whose name is as `name` says, and whose value is as `value`."""

    known: frozenset[str]
    patterns: tuple[str, ...]
    name: Literal | None
    value: Literal | None
    path: str


@dataclass(frozen=True, slots=True)
class Contains:
    item: Literal
    least: int
    most: int | None


@dataclass(frozen=True, slots=True)
class Case:
    """A conjunction for one type; what does not belong to the type is empty.

    only: the values of a boolean or string. Numbers: `whole` is whether they are integers, None for either.
    """

    type: str
    only: frozenset[Any] | None = None
    never: frozenset[str] = frozenset()
    whole: bool | None = None
    low: tuple[float, bool] = (-math.inf, False)  # and whether it is excluded
    high: tuple[float, bool] = (math.inf, False)
    multiples: tuple[float, ...] = ()  # one at most: several are their least common multiple
    least: int = 0  # characters, items or properties
    most: int | None = None
    patterns: tuple[tuple[str, bool], ...] = ()  # and whether they match
    formats: tuple[str, ...] = ()
    items: tuple[Items, ...] = ()
    contains: tuple[Contains, ...] = ()
    unique: str | None = None  # where items must differ
    properties: tuple[Properties, ...] = ()
    names: Literals = ()
    required: tuple[str, ...] = ()
    absent: frozenset[str] = frozenset()
    exists: tuple[Exists, ...] = ()
