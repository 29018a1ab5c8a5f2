"""JSON by orjson, with the same results and refusals as the SDK's own reader and writer.

Rules:
- orjson turns integers beyond 64 bits into floating point. If a number is that large, the SDK's reader reads the text again.
- So does text that orjson refuses: the SDK's reader accepts some of it, and words the refusals of the rest.
- orjson writes null for a number that is not finite. Here that is an error: a reader would take it for a missing value.
- Text is written as UTF-8, not escaped, and without spaces.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from typing import Any, Final

import orjson

from lacre.errors import UsageError
from lacre.runtime.json_objects import parse_object

_LARGE: Final = 2.0**63  # smaller integers stay integers
_STANDARD: Final = json.JSONEncoder(separators=(",", ":"), ensure_ascii=False, allow_nan=False)


def read_object(data: bytes, what: str) -> dict[str, Any]:
    """As `lacre.runtime.json_objects.parse_object`. Raises InvalidMessage."""
    try:
        value = orjson.loads(data)
    except orjson.JSONDecodeError:
        return parse_object(data, what)
    return value if isinstance(value, dict) and not _has_large(value) else parse_object(data, what)


def _has_large(value: dict[str, Any]) -> bool:
    """Whether there is a large number anywhere in it."""
    left: list[Any] = [value]
    while left:
        each = left.pop()
        kind = each.__class__
        if kind is dict:
            left.extend(each.values())
        elif kind is list:
            left.extend(each)
        elif kind is float and not -_LARGE < each < _LARGE:
            return True
    return False


def write_object(members: Mapping[str, Any]) -> bytes:
    """The members as JSON. Raises UsageError for a number that is not finite, and for text that is not Unicode."""
    for value in members.values():
        if value.__class__ is float and not math.isfinite(value):
            raise UsageError("JSON has no form for a number that is not finite")
    return write(members)


def write(value: object) -> bytes:
    """The same for any value whose numbers are finite."""
    try:
        return orjson.dumps(value)
    except TypeError:  # integers of more than 64 bits, keys that are no texts, lone surrogates
        pass
    try:
        return _STANDARD.encode(value).encode()
    except ValueError as exc:
        raise UsageError("text in a statement is not Unicode, or a number in it is not finite") from exc
