"""Models of the kinds that people write with pydantic."""

from __future__ import annotations

import datetime
import decimal
import enum
import ipaddress
import pathlib
import re
import uuid
from typing import Annotated, Any, Final, Generic, Literal, NamedTuple, Optional, TypeVar, Union

from pydantic import (
    UUID4,
    AnyHttpUrl,
    AnyUrl,
    AwareDatetime,
    Base64Bytes,
    BaseModel,
    ConfigDict,
    Field,
    FutureDate,
    HttpUrl,
    Json,
    NaiveDatetime,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    RootModel,
    SecretStr,
    StringConstraints,
    conint,
    conlist,
    constr,
)
from pydantic.dataclasses import dataclass
from typing_extensions import TypedDict

T = TypeVar("T")


class Colour(enum.Enum):
    RED = "red"
    GREEN = "green"
    BLUE = "blue"


class Level(enum.IntEnum):
    LOW = 1
    HIGH = 3


class Mixed(enum.Enum):
    ONE = 1
    TWO = "two"
    NONE = None


class Address(BaseModel):
    street: str = Field(max_length=40)
    city: str = Field(min_length=1, max_length=20)
    zip: Annotated[str, Field(pattern=r"^\d{4}-\d{3}$")]


class Plain(BaseModel):
    name: str
    age: int
    score: float
    happy: bool


class Described(BaseModel):
    """A docstring, which is a description."""

    name: str = Field(description="Her name", examples=["Ana"], title="Name")
    old: int = Field(default=3, deprecated=True)
    model_config = ConfigDict(json_schema_extra={"example": {"name": "Ana"}})


class Integers(BaseModel):
    a: int = Field(ge=0, le=120)
    b: int = Field(gt=-5, lt=5)
    c: PositiveInt
    d: NonNegativeInt
    e: conint(multiple_of=5, ge=10, le=100)  # type: ignore[valid-type]
    f: int = Field(ge=-9007199254740991, le=9007199254740991)


class Huge(BaseModel):
    a: int = Field(ge=0, le=10**18)
    b: int = Field(ge=-(2**63), lt=2**63)
    c: float = Field(le=1e100)


class Floats(BaseModel):
    a: float = Field(ge=0, le=1)
    b: float = Field(gt=0.5, lt=2.5)
    c: PositiveFloat
    d: float = Field(multiple_of=0.5, ge=0, le=10)


class Money(BaseModel):
    price: decimal.Decimal
    tax: decimal.Decimal = Field(ge=0, le=1)
    exact: decimal.Decimal = Field(max_digits=6, decimal_places=2)


class Strings(BaseModel):
    a: constr(min_length=2, max_length=5)  # type: ignore[valid-type]
    b: Annotated[str, StringConstraints(pattern=r"^[A-Z]{2}\d{3}$")]
    c: Annotated[str, StringConstraints(strip_whitespace=True, to_lower=True, max_length=8)]
    d: str = Field(pattern="^(low|high)$")


class Codes(BaseModel):
    sku: str = Field(pattern=r"^[A-Z]{3}-\d{4}(?:-[a-z])?$", max_length=10)
    slug: str = Field(pattern=r"^[a-z0-9]+(?:-[a-z0-9]+)*$")
    phone: str = Field(pattern=r"^\+[1-9]\d{6,14}$")
    colour: str = Field(pattern=r"^#(?:[0-9a-fA-F]{3}|[0-9a-fA-F]{6})$")


class Dates(BaseModel):
    day: datetime.date
    at: datetime.datetime
    time: datetime.time
    took: datetime.timedelta


class Moments(BaseModel):
    aware: AwareDatetime
    naive: NaiveDatetime | None
    future: FutureDate | None = None


class Links(BaseModel):
    home: HttpUrl
    any: AnyUrl
    more: list[AnyHttpUrl] = Field(max_length=2)


class Ids(BaseModel):
    id: uuid.UUID
    other: UUID4


class Network(BaseModel):
    v4: ipaddress.IPv4Address
    v6: ipaddress.IPv6Address
    either: ipaddress.IPv4Address | ipaddress.IPv6Address
    net: ipaddress.IPv4Network
    net6: ipaddress.IPv6Network
    interface: ipaddress.IPv4Interface


class Odd(BaseModel):
    secret: SecretStr
    path: pathlib.Path
    data: Base64Bytes
    inside: Json[Any]


class Enums(BaseModel):
    colour: Colour
    level: Level
    mixed: Mixed
    maybe: Colour | None = None


class Literals(BaseModel):
    a: Literal["x", "y"]
    b: Literal[1, 2, 3]
    c: Literal["only"]
    d: Literal["x", 1, None, True]


class Optionals(BaseModel):
    a: Optional[str] = None  # noqa: UP045 - as people write it
    b: int | None
    c: str = "default"
    d: list[int] = []
    e: Union[int, str, None] = None  # noqa: UP007


class Unions(BaseModel):
    a: int | str
    b: Address | Plain
    c: list[int] | dict[str, int] | None
    d: int | float | bool


class Nested(BaseModel):
    home: Address
    work: Address | None = None
    others: list[Address] = Field(default_factory=list, max_length=2)


class Tuples(BaseModel):
    pair: tuple[int, str]
    point: tuple[float, float, float]
    many: tuple[int, ...]
    inner: list[tuple[str, bool]] = Field(max_length=3)


class Sets(BaseModel):
    colours: set[Colour]
    flags: set[bool]
    small: set[Literal[1, 2, 3]] = Field(min_length=1, max_length=2)
    frozen: frozenset[Level]


class Tags(BaseModel):
    tags: set[str]
    numbers: set[int] = Field(max_length=4)
    fixed: Annotated[set[str], Field(min_length=2, max_length=5)]


class UniqueObjects(BaseModel):
    model_config = ConfigDict(frozen=True)
    pairs: frozenset[tuple[int, bool]] = Field(max_length=3)


class Lists(BaseModel):
    a: list[str] = Field(min_length=1, max_length=3)
    b: conlist(int, min_length=2, max_length=2)  # type: ignore[valid-type]
    c: list[list[int]] = Field(max_length=2)
    d: list[Any] = Field(max_length=2)


class Records(BaseModel):
    counts: dict[str, int]
    nested: dict[str, Address] = Field(max_length=2)
    by_colour: dict[Colour, float]
    by_number: dict[int, str]
    free: dict[str, Any]


class Keyed(BaseModel):
    by_code: dict[Annotated[str, StringConstraints(pattern="^[a-z]{2}$")], int] = Field(min_length=1, max_length=2)


class Node(BaseModel):
    value: int
    children: list[Node] = Field(default=[], max_length=2)


class Linked(BaseModel):
    value: bool
    next: Linked | None


class Json_(RootModel[Union[None, bool, int, str, list["Json_"], dict[str, "Json_"]]]):  # noqa: UP007
    pass


class Document(BaseModel):
    body: Json_


class Cat(BaseModel):
    kind: Literal["cat"]
    lives: int = Field(ge=0, le=9)


class Dog(BaseModel):
    kind: Literal["dog"]
    breed: str


class Puppy(BaseModel):
    kind: Literal["puppy"] = "puppy"
    age: int


class Pet(BaseModel):
    pet: Cat | Dog | Puppy = Field(discriminator="kind")
    others: list[Annotated[Cat | Dog, Field(discriminator="kind")]] = Field(max_length=2)


class Leaf(BaseModel):
    op: Literal["number"]
    value: float


class Sum(BaseModel):
    op: Literal["sum"]
    left: Annotated[Leaf | Sum, Field(discriminator="op")]
    right: Annotated[Leaf | Sum, Field(discriminator="op")]


class Expression(BaseModel):
    root: Annotated[Leaf | Sum, Field(discriminator="op")]


class Forbids(BaseModel):
    model_config = ConfigDict(extra="forbid")
    a: int
    b: str | None = None


class Allows(BaseModel):
    model_config = ConfigDict(extra="allow")
    a: int
    __pydantic_extra__: dict[str, int]


class Aliased(BaseModel):
    model_config = ConfigDict(populate_by_name=True)
    first: str = Field(alias="firstName")
    last: str = Field(validation_alias="lastName")


class Base(BaseModel):
    id: int


class Derived(Base):
    name: str


class Page(BaseModel, Generic[T]):
    items: list[T] = Field(max_length=2)
    total: NonNegativeInt


class Movie(TypedDict, total=False):
    title: str
    year: int


class Point(NamedTuple):
    x: int
    y: int = 0


@dataclass
class Rectangle:
    width: PositiveInt
    height: PositiveInt


class Structures(BaseModel):
    movie: Movie
    point: Point
    rectangle: Rectangle


class Names(RootModel[list[str]]):
    pass


class Quoted(BaseModel):
    """Names and values that need escapes."""

    a: Literal['a "quoted" \\ é\n', "ação"]
    b: int = Field(alias='odd "name" /~')


class Steps(BaseModel):
    steps: list[Literal["start", "stop"]] = Field(min_length=1, max_length=3)
    final: str = Field(max_length=10)


class Passwords(BaseModel):
    model_config = ConfigDict(regex_engine="python-re")
    password: str = Field(pattern=r"^(?=.*[A-Z])(?=.*\d)[A-Za-z\d]{8,12}$")
    user: str = Field(pattern=r"^(?!admin$)[a-z]{3,8}$")


class Patterns(BaseModel):
    model_config = ConfigDict(regex_engine="python-re")
    either: str = Field(pattern=r"^a+$|^b+$")
    word: re.Pattern[str] | None = None
    letters: Annotated[str, Field(pattern=r"[a-z]+")]
    time: str = Field(pattern=r"^([01]\d|2[0-3]):[0-5]\d$")


class Empty(BaseModel):
    pass


class Deep(BaseModel):
    a: dict[str, list[dict[str, Address | None]]] = Field(max_length=1)


MODELS: Final[dict[str, type[BaseModel]]] = {
    model.__name__: model
    for model in (
        Plain, Described, Integers, Huge, Floats, Money, Strings, Codes, Dates, Moments, Links, Ids, Network, Odd, Enums,
        Literals, Optionals, Unions, Nested, Tuples, Sets, Tags, UniqueObjects, Lists, Records, Keyed, Node, Linked,
        Document, Pet, Expression, Forbids, Allows, Aliased, Derived, Page[int], Structures, Names, Quoted, Steps,
        Passwords, Patterns, Empty, Deep,
    )
}  # fmt: skip
