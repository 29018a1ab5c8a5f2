"""The terms of a JSON schema's analysis: schemas that hold or do not, and what one case requires of a value."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any, Final, TypeAlias

from lacre_backend.api.schema.patterns import Patterns

TYPES: Final = ("null", "boolean", "number", "string", "array", "object")
MAX_EXACT: Final = 2**53  # JSON readers do not distinguish all integers beyond this
MAX_COUNT: Final = 10_000  # of characters, items or properties; far more than a context holds

Unknown: TypeAlias = Callable[..., None]  # refuses a keyword, or leaves it to the model


class SchemaRefused(Exception):
    """A keyword that cannot be enforced. keyword: its name. path: its place, from the schema's root."""

    def __init__(self, keyword: str, path: str, problem: str) -> None:
        super().__init__(problem)
        self.keyword = keyword
        self.path = path
        self.problem = problem


class NoSchema(SchemaRefused):
    """Not a schema, too large, or allows no value. Refused whether strict or not."""


class TooCostly(SchemaRefused):
    """Takes too long to analyse. If the schema is not strict, all of it is left to the model."""


@dataclass(frozen=True, slots=True)
class Place:
    """A schema and its place. scope: the resources through which it was reached, for `$dynamicRef`."""

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
            return ("alone", *sorted((k, type(v), v) for k, v in members))  # the same at every place
        return (id(self.schema), self.scope)

    def inside(self, schema: Any, *steps: str | int) -> Place:
        """A schema below this one."""
        return replace(self, schema=schema, path="/".join([self.path, *map(str, steps)]))


@dataclass(frozen=True, slots=True)
class Literal:
    """A schema that must hold, or must not."""

    place: Place
    holds: bool = True

    @property
    def key(self) -> tuple[object, ...]:
        return (self.holds, *self.place.key)


Literals = tuple[Literal, ...]


@dataclass(frozen=True, slots=True)
class Items:
    """The schemas of an array's items. first: for the first items. rest: for all others."""

    first: tuple[Literal, ...]
    rest: Literal | None


@dataclass(frozen=True, slots=True)
class Properties:
    """The schemas of an object's properties. named: by name. patterns: by a pattern of the name. other: for properties that
    neither covers.
    """

    named: Mapping[str, Literal]
    patterns: tuple[tuple[str, Literal], ...] = ()
    other: Literal | None = None

    def of(self, name: str, searched: Patterns) -> list[Literal]:
        found = [self.named[name]] if name in self.named else []
        found += [literal for pattern, literal in self.patterns if searched.matches(pattern, name)]
        return found or ([] if self.other is None else [self.other])


@dataclass(frozen=True, slots=True)
class Exists:
    """A required property that no name or pattern covers. `name` and `value` constrain its name and its value."""

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
    """A conjunction for one type. Fields of other types are empty.

    only: the values of a boolean or string. whole: whether a number is an integer; None: either.
    """

    type: str
    only: frozenset[Any] | None = None
    never: frozenset[str] = frozenset()
    whole: bool | None = None
    low: tuple[float, bool] = (-math.inf, False)  # and whether the bound is excluded
    high: tuple[float, bool] = (math.inf, False)
    multiples: tuple[float, ...] = ()  # at most one: several are combined into their least common multiple
    least: int = 0  # characters, items or properties
    most: int | None = None
    patterns: tuple[tuple[str, bool], ...] = ()  # and whether they must match
    formats: tuple[str, ...] = ()
    items: tuple[Items, ...] = ()
    contains: tuple[Contains, ...] = ()
    unique: str | None = None  # the place that requires different items
    properties: tuple[Properties, ...] = ()
    names: Literals = ()
    required: tuple[str, ...] = ()
    absent: frozenset[str] = frozenset()
    exists: tuple[Exists, ...] = ()
