"""Bytes for frozen dataclasses, by their annotations. It does no I/O.

A value is written field by field, in the order of declaration:

    int        one byte of length, then two's complement, big-endian      float      8 bytes
    bool       one byte, 0 or 1                                             str, bytes 4 bytes of length, then the bytes (UTF-8)
    T | None   one byte, 0 or 1, then T                                     A | B      one byte: which, then the value
    tuple[T, ...], frozenset[T], Mapping[K, V]   4 bytes of count, then the members
    tuple[A, B]                                  the members
    tuple[int, ...], tuple[float, ...]           4 bytes of length, a kind (i, q or d), then numbers as this machine has them
    enum, Literal                                one byte: which

Rules:
- Nothing is read by name, so a message can only make values of the types that its reader expects.
- A count is compared with the bytes that are left before anything is allocated: a member takes at least one byte.
- Reading any bytes returns a value or raises `InvalidMessage`. Text may have lone surrogates, as Python's may.
"""

from __future__ import annotations

import struct
from array import array
from collections.abc import Callable, Mapping
from dataclasses import fields, is_dataclass
from enum import Enum
from types import MappingProxyType, NoneType, UnionType
from typing import Any, Final, Generic, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

from lacre.errors import InvalidMessage, UsageError

_COUNT: Final = struct.Struct("<I")
_FLOAT: Final = struct.Struct("<d")

T = TypeVar("T")


class Bytes:
    """The rest of a message, from which values are read."""

    __slots__ = ("_at", "_data", "_end")

    def __init__(self, data: bytes) -> None:
        self._data, self._at, self._end = data, 0, len(data)

    def take(self, size: int) -> bytes:
        at, end = self._at, self._at + size
        if end > self._end:
            raise InvalidMessage("a message of an engine's process is cut off")
        self._at = end
        return self._data[at:end]

    def byte(self) -> int:
        at = self._at
        if at >= self._end:
            raise InvalidMessage("a message of an engine's process is cut off")
        self._at = at + 1
        return self._data[at]

    def count(self) -> int:
        """Of members or bytes that follow: never more than are left."""
        (count,) = _COUNT.unpack(self.take(_COUNT.size))
        if count > self._end - self._at:
            raise InvalidMessage("a message of an engine's process counts more than it has")
        return int(count)

    @property
    def left(self) -> int:
        return self._end - self._at


Write = Callable[[Any, bytearray], None]
Read = Callable[[Bytes], Any]
Form = tuple[Write, Read]


class Codec(Generic[T]):
    """Writes and reads one dataclass. stands_for: other types to use in place of annotated ones, such as protocols."""

    def __init__(self, kind: type[T], stands_for: Mapping[Any, Any] = MappingProxyType({})) -> None:
        self._write, self._read = _form(kind, stands_for)

    def encode(self, value: T, before: int = 0) -> bytearray:
        """before: how many empty bytes precede it. Raises UsageError for a value that is not of the annotated type."""
        out = bytearray(before)
        try:
            self._write(value, out)
        except (TypeError, AttributeError, ValueError, KeyError, OverflowError, struct.error) as exc:
            raise UsageError(f"a {type(value).__name__} has a field of another type: {type(exc).__name__}") from None
        return out

    def decode(self, data: bytes) -> T:
        """Raises InvalidMessage."""
        source = Bytes(data)
        try:
            value: T = self._read(source)
        except (ValueError, OverflowError, RecursionError, TypeError) as exc:
            raise InvalidMessage(f"a message of an engine's process is damaged: {type(exc).__name__}") from None
        if source.left:
            raise InvalidMessage("a message of an engine's process has bytes behind its end")
        return value


def _form(kind: Any, stands_for: Mapping[Any, Any]) -> Form:
    kind = stands_for.get(kind, kind)
    if kind in _PLAIN:
        return _PLAIN[kind]
    origin, arguments = get_origin(kind), get_args(kind)
    if origin in (Union, UnionType):
        return _union([stands_for.get(one, one) for one in arguments], stands_for)
    if origin is Literal:
        return _choice(arguments)
    if origin is tuple:
        return _tuple(arguments, stands_for)
    if origin is frozenset:
        return _many(_form(arguments[0], stands_for), frozenset)
    if origin is not None and issubclass(origin, Mapping):
        return _mapping(_form(arguments[0], stands_for), _form(arguments[1], stands_for))
    if isinstance(kind, type) and issubclass(kind, Enum):
        return _choice(tuple(kind))
    if is_dataclass(kind) and isinstance(kind, type):
        return _dataclass(kind, stands_for)
    raise UsageError(f"no bytes stand for {kind}")


def _dataclass(kind: type[Any], stands_for: Mapping[Any, Any]) -> Form:
    hints = get_type_hints(kind)
    named = [(field.name, *_form(hints[field.name], stands_for)) for field in fields(kind)]
    writes = [(name, write) for name, write, _ in named]
    reads = [read for _, _, read in named]

    def write(value: Any, out: bytearray) -> None:
        if type(value) is not kind:
            raise TypeError
        for name, one in writes:
            one(getattr(value, name), out)

    def read(source: Bytes) -> Any:
        return kind(*[one(source) for one in reads])

    return write, read


def _write_int(value: int, out: bytearray) -> None:
    size = (value.bit_length() + 8) // 8
    out.append(size)
    out += value.to_bytes(size, "big", signed=True)


def _read_int(source: Bytes) -> int:
    return int.from_bytes(source.take(source.byte()), "big", signed=True)


def _write_bool(value: bool, out: bytearray) -> None:
    out.append(bool(value))


def _read_bool(source: Bytes) -> bool:
    if (byte := source.byte()) > 1:
        raise InvalidMessage("a message of an engine's process is damaged")
    return byte == 1


def _write_float(value: float, out: bytearray) -> None:
    out += _FLOAT.pack(value)


def _read_float(source: Bytes) -> float:
    return float(_FLOAT.unpack(source.take(_FLOAT.size))[0])


def _write_bytes(value: bytes, out: bytearray) -> None:
    out += _COUNT.pack(len(value))
    out += value


def _read_bytes(source: Bytes) -> bytes:
    return source.take(source.count())


def _write_str(value: str, out: bytearray) -> None:
    _write_bytes(value.encode("utf-8", "surrogatepass"), out)


def _read_str(source: Bytes) -> str:
    return source.take(source.count()).decode("utf-8", "surrogatepass")


def _write_none(value: None, _out: bytearray) -> None:
    if value is not None:
        raise TypeError


def _read_none(_source: Bytes) -> None:
    return None


_PLAIN: Final[Mapping[Any, Form]] = {
    int: (_write_int, _read_int),
    bool: (_write_bool, _read_bool),
    float: (_write_float, _read_float),
    bytes: (_write_bytes, _read_bytes),
    str: (_write_str, _read_str),
    NoneType: (_write_none, _read_none),
}


def _write_numbers(value: tuple[float, ...], out: bytearray) -> None:
    """Whole numbers in 32 bits if all fit."""
    try:
        numbers = array("i", value)
    except OverflowError:
        numbers = array("q", value)
    _write_array(numbers, out)


def _write_floats(value: tuple[float, ...], out: bytearray) -> None:
    _write_array(array("d", value), out)


def _write_array(numbers: array[Any], out: bytearray) -> None:
    data = numbers.tobytes()
    out += _COUNT.pack(len(data) + 1)
    out += numbers.typecode.encode()
    out += data


def _read_numbers(kinds: str) -> Read:
    def read(source: Bytes) -> tuple[Any, ...]:
        data = source.take(source.count())
        kind = data[:1].decode("ascii")
        if not kind or kind not in kinds:
            raise InvalidMessage("a message of an engine's process is damaged")
        numbers = array(kind)
        numbers.frombytes(data[1:])
        return tuple(numbers)

    return read


def _tuple(members: tuple[Any, ...], stands_for: Mapping[Any, Any]) -> Form:
    if len(members) == 2 and members[1] is Ellipsis:
        if members[0] is int:
            return _write_numbers, _read_numbers("iq")
        if members[0] is float:
            return _write_floats, _read_numbers("d")
        return _many(_form(members[0], stands_for), tuple)
    forms = [_form(member, stands_for) for member in members]

    def write(value: tuple[Any, ...], out: bytearray) -> None:
        for (one, _), member in zip(forms, value, strict=True):
            one(member, out)

    def read(source: Bytes) -> tuple[Any, ...]:
        return tuple(one(source) for _, one in forms)

    return write, read


def _many(form: Form, collect: Callable[[list[Any]], Any]) -> Form:
    write_one, read_one = form

    def write(value: Any, out: bytearray) -> None:
        out += _COUNT.pack(len(value))
        for member in value:
            write_one(member, out)

    def read(source: Bytes) -> Any:
        return collect([read_one(source) for _ in range(source.count())])

    return write, read


def _mapping(key: Form, member: Form) -> Form:
    def write(value: Mapping[Any, Any], out: bytearray) -> None:
        out += _COUNT.pack(len(value))
        for name, one in value.items():
            key[0](name, out)
            member[0](one, out)

    def read(source: Bytes) -> Mapping[Any, Any]:
        return MappingProxyType({key[1](source): member[1](source) for _ in range(source.count())})

    return write, read


def _choice(members: tuple[Any, ...]) -> Form:
    places = {member: place for place, member in enumerate(members)}

    def write(value: Any, out: bytearray) -> None:
        out.append(places[value])

    def read(source: Bytes) -> Any:
        if (place := source.byte()) >= len(members):
            raise InvalidMessage("a message of an engine's process is damaged")
        return members[place]

    return write, read


def _union(kinds: list[Any], stands_for: Mapping[Any, Any]) -> Form:
    forms = [_form(kind, stands_for) for kind in kinds]
    places = {get_origin(kind) or kind: place for place, kind in enumerate(kinds)}

    def place_of(value: Any) -> int:
        """Of a value whose type is a subclass of one, or a whole number for a float."""
        for kind, place in places.items():
            if isinstance(value, kind) or (kind is float and isinstance(value, int)):
                return place
        raise TypeError

    def write(value: Any, out: bytearray) -> None:
        place = places.get(type(value))
        if place is None:
            place = place_of(value)
        out.append(place)
        forms[place][0](value, out)

    def read(source: Bytes) -> Any:
        if (place := source.byte()) >= len(forms):
            raise InvalidMessage("a message of an engine's process is damaged")
        return forms[place][1](source)

    return write, read
