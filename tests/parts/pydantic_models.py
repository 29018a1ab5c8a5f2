"""Models of the kinds that people write with pydantic: as classes if that is how they differ, else as rows of one table."""

from __future__ import annotations

import datetime
import decimal
import enum
import ipaddress
import pathlib
import re
import uuid
from typing import Annotated, Any, Final, Generic, Literal, NamedTuple, Optional, TypeVar, Union

import pydantic
from pydantic import BaseModel, ConfigDict, Field, NonNegativeInt, PositiveInt, RootModel, StringConstraints, create_model
from pydantic.dataclasses import dataclass
from typing_extensions import TypedDict

T = TypeVar("T")
PYTHON: Final = ConfigDict(regex_engine="python-re")


class Colour(enum.Enum):
    RED = "red"
    GREEN = "green"
    BLUE = "blue"


Level = enum.IntEnum("Level", {"LOW": 1, "HIGH": 3})
Mixed = enum.Enum("Mixed", {"ONE": 1, "TWO": "two", "NONE": None})


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


class Node(BaseModel):
    value: int
    children: list[Node] = Field(default=[], max_length=2)


class Linked(BaseModel):
    value: bool
    next: Linked | None


class Json_(RootModel[Union[None, bool, int, str, list["Json_"], dict[str, "Json_"]]]):  # noqa: UP007
    pass


class Leaf(BaseModel):
    op: Literal["number"]
    value: float


class Sum(BaseModel):
    op: Literal["sum"]
    left: Annotated[Leaf | Sum, Field(discriminator="op")]
    right: Annotated[Leaf | Sum, Field(discriminator="op")]


class Allows(BaseModel):
    model_config = ConfigDict(extra="allow")
    a: int
    __pydantic_extra__: dict[str, int]


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


Names = type("Names", (RootModel[list[str]],), {"__module__": __name__})
Cat = create_model("Cat", kind=Literal["cat"], lives=(int, Field(ge=0, le=9)))
Dog = create_model("Dog", kind=Literal["dog"], breed=str)
Puppy = create_model("Puppy", kind=(Literal["puppy"], "puppy"), age=int)
MODELS: Final[dict[str, type[BaseModel]]] = {
    model.__name__: model
    for model in (
        Plain, Described,
        create_model("Integers", a=(int, Field(ge=0, le=120)), b=(int, Field(gt=-5, lt=5)), c=PositiveInt, d=NonNegativeInt,
            e=pydantic.conint(multiple_of=5, ge=10, le=100), f=(int, Field(ge=-9007199254740991, le=9007199254740991))),
        create_model("Huge", a=(int, Field(ge=0, le=10**18)), b=(int, Field(ge=-(2**63), lt=2**63)),
            c=(float, Field(le=1e100))),
        create_model("Floats", a=(float, Field(ge=0, le=1)), b=(float, Field(gt=0.5, lt=2.5)), c=pydantic.PositiveFloat,
            d=(float, Field(multiple_of=0.5, ge=0, le=10))),
        create_model("Money", price=decimal.Decimal, tax=(decimal.Decimal, Field(ge=0, le=1)),
            exact=(decimal.Decimal, Field(max_digits=6, decimal_places=2))),
        create_model("Strings", a=pydantic.constr(min_length=2, max_length=5),
            b=Annotated[str, StringConstraints(pattern=r"^[A-Z]{2}\d{3}$")],
            c=Annotated[str, StringConstraints(strip_whitespace=True, to_lower=True, max_length=8)],
            d=(str, Field(pattern="^(low|high)$"))),
        create_model("Codes", sku=(str, Field(pattern=r"^[A-Z]{3}-\d{4}(?:-[a-z])?$", max_length=10)),
            slug=(str, Field(pattern=r"^[a-z0-9]+(?:-[a-z0-9]+)*$")), phone=(str, Field(pattern=r"^\+[1-9]\d{6,14}$")),
            colour=(str, Field(pattern=r"^#(?:[0-9a-fA-F]{3}|[0-9a-fA-F]{6})$"))),
        create_model("Dates", day=datetime.date, at=datetime.datetime, time=datetime.time, took=datetime.timedelta),
        create_model("Moments", aware=pydantic.AwareDatetime, naive=pydantic.NaiveDatetime | None,
            future=(pydantic.FutureDate | None, None)),
        create_model("Links", home=pydantic.HttpUrl, any=pydantic.AnyUrl,
            more=(list[pydantic.AnyHttpUrl], Field(max_length=2))),
        create_model("Ids", id=uuid.UUID, other=pydantic.UUID4),
        create_model("Network", v4=ipaddress.IPv4Address, v6=ipaddress.IPv6Address,
            either=ipaddress.IPv4Address | ipaddress.IPv6Address, net=ipaddress.IPv4Network, net6=ipaddress.IPv6Network,
            interface=ipaddress.IPv4Interface),
        create_model("Odd", secret=pydantic.SecretStr, path=pathlib.Path, data=pydantic.Base64Bytes,
            inside=pydantic.Json[Any]),
        create_model("Enums", colour=Colour, level=Level, mixed=Mixed, maybe=(Colour | None, None)),
        create_model("Literals", a=Literal["x", "y"], b=Literal[1, 2, 3], c=Literal["only"], d=Literal["x", 1, None, True]),
        create_model("Optionals", a=(Optional[str], None), b=int | None, c=(str, "default"), d=(list[int], []),  # noqa: UP045 - as people write it
            e=(Union[int, str, None], None)),  # noqa: UP007
        create_model("Unions", a=int | str, b=Address | Plain, c=list[int] | dict[str, int] | None, d=int | float | bool),
        create_model("Nested", home=Address, work=(Address | None, None),
            others=(list[Address], Field(default_factory=list, max_length=2))),
        create_model("Tuples", pair=tuple[int, str], point=tuple[float, float, float], many=tuple[int, ...],
            inner=(list[tuple[str, bool]], Field(max_length=3))),
        create_model("Sets", colours=set[Colour], flags=set[bool],
            small=(set[Literal[1, 2, 3]], Field(min_length=1, max_length=2)), frozen=frozenset[Level]),
        create_model("Tags", tags=set[str], numbers=(set[int], Field(max_length=4)),
            fixed=Annotated[set[str], Field(min_length=2, max_length=5)]),
        create_model("UniqueObjects", __config__=ConfigDict(frozen=True),
            pairs=(frozenset[tuple[int, bool]], Field(max_length=3))),
        create_model("Lists", a=(list[str], Field(min_length=1, max_length=3)),
            b=pydantic.conlist(int, min_length=2, max_length=2), c=(list[list[int]], Field(max_length=2)),
            d=(list[Any], Field(max_length=2))),
        create_model("Records", counts=dict[str, int], nested=(dict[str, Address], Field(max_length=2)),
            by_colour=dict[Colour, float], by_number=dict[int, str], free=dict[str, Any]),
        create_model("Keyed",
            by_code=(dict[Annotated[str, StringConstraints(pattern="^[a-z]{2}$")], int], Field(min_length=1, max_length=2))),
        Node, Linked,
        create_model("Document", body=Json_),
        create_model("Pet", pet=(Cat | Dog | Puppy, Field(discriminator="kind")),
            others=(list[Annotated[Cat | Dog, Field(discriminator="kind")]], Field(max_length=2))),
        create_model("Expression", root=Annotated[Leaf | Sum, Field(discriminator="op")]),
        create_model("Forbids", __config__=ConfigDict(extra="forbid"), a=int, b=(str | None, None)),
        Allows,
        create_model("Aliased", __config__=ConfigDict(populate_by_name=True), first=(str, Field(alias="firstName")),
            last=(str, Field(validation_alias="lastName"))),
        Derived, Page[int],
        create_model("Structures", movie=Movie, point=Point, rectangle=Rectangle),
        Names,
        create_model("Quoted", __doc__="Names and values that need escapes.", a=Literal['a "quoted" \\ é\n', "ação"],
            b=(int, Field(alias='odd "name" /~'))),
        create_model("Steps", steps=(list[Literal["start", "stop"]], Field(min_length=1, max_length=3)),
            final=(str, Field(max_length=10))),
        create_model("Passwords", __config__=PYTHON, password=(str, Field(pattern=r"^(?=.*[A-Z])(?=.*\d)[A-Za-z\d]{8,12}$")),
            user=(str, Field(pattern=r"^(?!admin$)[a-z]{3,8}$"))),
        create_model("Patterns", __config__=PYTHON, either=(str, Field(pattern=r"^a+$|^b+$")),
            word=(re.Pattern[str] | None, None), letters=Annotated[str, Field(pattern=r"[a-z]+")],
            time=(str, Field(pattern=r"^([01]\d|2[0-3]):[0-5]\d$"))),
        create_model("Empty"),
        create_model("Deep", a=(dict[str, list[dict[str, Address | None]]], Field(max_length=1))),
    )
}  # fmt: skip
