"""Reads the members of a JSON object from another party: it ignores unknown ones, and refuses missing or mistyped ones."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, Final, Self

from lacre.errors import InvalidMessage
from lacre.jose.jws import b64u_decode
from lacre.runtime.json_objects import parse_object

EXACT: Final = 2**53 - 1  # the largest integer that every reader of JSON holds exactly (RFC 7493 section 2.2)


class Members:
    """A typed view of one JSON object. `what` names it in errors; values never appear there."""

    __slots__ = ("_values", "_what")

    def __init__(self, values: object, what: str) -> None:
        if not isinstance(values, Mapping):
            raise InvalidMessage(f"{what} must be a JSON object")
        self._values: Mapping[str, Any] = values
        self._what = what

    @classmethod
    def parse(cls, data: bytes | bytearray, what: str) -> Self:
        """Raises InvalidMessage."""
        return cls(parse_object(data, what), what)

    def __contains__(self, name: str) -> bool:
        return name in self._values

    def get(self, name: str, default: object = None) -> object:
        """The value as it came."""
        return self._values.get(name, default)

    def _get(self, name: str, kind: type | tuple[type, ...], expected: str) -> Any:
        value = self._values.get(name)
        # bool is an int to Python, but not in a JSON format.
        if not isinstance(value, kind) or isinstance(value, bool) is not (kind is bool):
            raise InvalidMessage(f"{self._what}: member {name!r} must be {expected}")
        return value

    def text(self, name: str) -> str:
        return str(self._get(name, str, "a string"))

    def optional_text(self, name: str) -> str | None:
        """Like `text`, for a member that must be there and may be null."""
        if name in self._values and self._values[name] is None:
            return None
        return self.text(name)

    def flag(self, name: str) -> bool:
        return bool(self._get(name, bool, "true or false"))

    def count(self, name: str, most: float = math.inf) -> int:
        """An integer from 0 to `most`."""
        value = int(self._get(name, int, "an integer"))
        if not 0 <= value <= most:
            limit = "" if most == math.inf else f", and {most} at most"
            raise InvalidMessage(f"{self._what}: member {name!r} must not be negative{limit}")
        return value

    def time(self, name: str) -> float:
        """A NumericDate (RFC 7519 section 2): seconds since the epoch."""
        try:
            value = float(self._get(name, (int, float), "a number of seconds"))
        except OverflowError:  # an integer of hundreds of digits
            value = math.inf
        if not math.isfinite(value):
            raise InvalidMessage(f"{self._what}: member {name!r} must be finite")
        return value

    def octets(self, name: str, size: int | None = None) -> bytes:
        """base64url text as bytes; of exactly `size` bytes, if given."""
        value = b64u_decode(self.text(name))
        if size is not None and len(value) != size:
            raise InvalidMessage(f"{self._what}: member {name!r} must hold {size} bytes")
        return value

    def optional_octets(self, name: str, size: int) -> bytes | None:
        """Like `octets`, for a member that must be there and may be null."""
        if name in self._values and self._values[name] is None:
            return None
        return self.octets(name, size)

    def texts(self, name: str) -> tuple[str, ...]:
        values = self._get(name, list, "a list of strings")
        if not all(isinstance(value, str) for value in values):
            raise InvalidMessage(f"{self._what}: member {name!r} must be a list of strings")
        return tuple(values)

    def text_lists(self, name: str, *, at_most: int) -> tuple[tuple[str, ...], ...]:
        """A list of 1 to `at_most` lists of strings."""
        values = self._get(name, list, "a list of lists of strings")
        if not 1 <= len(values) <= at_most:
            raise InvalidMessage(f"{self._what}: member {name!r} must have 1 to {at_most} entries")
        return tuple(Members({name: value}, self._what).texts(name) for value in values)

    def objects(self, name: str) -> tuple[Members, ...]:
        values = self._get(name, list, "a list of objects")
        return tuple(Members(value, f"{self._what}.{name}") for value in values)

    def counts(self, name: str) -> dict[str, int]:
        """An object of integers >= 0, by their names; empty if it is missing."""
        if name not in self._values:
            return {}
        values = Members(self._get(name, dict, "an object of integers"), f"{self._what}.{name}")
        return {key: values.count(key) for key in values._values}

    def named_objects(self, name: str) -> dict[str, Members]:
        values = self._get(name, dict, "an object")
        return {key: Members(value, f"{self._what}.{name}[{key!r}]") for key, value in values.items()}
