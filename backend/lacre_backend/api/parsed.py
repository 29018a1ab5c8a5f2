"""JSON objects as frozen values, with errors in OpenAI's words: the field by its path, never its value."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any, ClassVar, Final, TypeVar

import pydantic_core
from pydantic import BaseModel, ConfigDict, ValidationError, model_validator

from lacre_backend.api.errors import RequestRefused, unsupported

MAX_VALUES: Final = 65536  # JSON values in a body; a long conversation has a few thousand
# pydantic's names for types, mapped to JSON's.
_TYPES: Final = {
    "int": "integer", "float": "number", "bool": "boolean", "str": "string", "list": "array", "tuple": "array",
    "dict": "object", "model": "object",
}  # fmt: skip

_SPOKEN: Final[Mapping[type, str]] = {
    str: "a string",
    dict: "an object",
    list: "an array",
    bool: "a boolean",
    int: "an integer",
}


class Parsed(BaseModel):
    """Refuses undeclared members."""

    model_config = ConfigDict(strict=True, extra="forbid", frozen=True)


class Echoed(Parsed):
    """Values that clients send back as received or write in full: null counts as absent, and bookkeeping members are
    dropped.
    """

    ignored: ClassVar[frozenset[str]] = frozenset()

    @model_validator(mode="before")
    @classmethod
    def _bare(cls, raw: Any) -> Any:
        if not isinstance(raw, dict):
            return raw
        return {name: value for name, value in raw.items() if value is not None and name not in cls.ignored}


def json_object(body: bytes) -> dict[str, Any]:
    """The body's JSON object. The parser refuses lone surrogates and deep nesting. Raises `RequestRefused`."""
    try:
        raw = pydantic_core.from_json(body, allow_inf_nan=False)
    except ValueError:
        raise RequestRefused("We could not parse the JSON body of your request. Send a JSON object in UTF-8.") from None
    if not isinstance(raw, dict):
        raise RequestRefused("The body must be a JSON object.")
    check_size(raw)
    for name, value in raw.items():
        if has_infinite(value):
            raise RequestRefused(
                f"'{name}' holds a number that JSON readers do not keep exactly.", code="invalid_value", param=name
            )
    return raw


def bare(raw: Mapping[str, Any], ignored: Mapping[str, type], inert: Mapping[str, tuple[Any, ...]]) -> dict[str, Any]:
    """A body's members that have an effect. ignored: those of which no answer depends, with their types. inert: the values at
    which a member has no effect; other values are refused. Null counts as absent. Raises `RequestRefused`.
    """
    for name, kind in ignored.items():
        if not isinstance(raw.get(name), kind | None):
            raise RequestRefused(f"Invalid type for '{name}': expected {_SPOKEN[kind]}.", code="invalid_type", param=name)
    for name, allowed in inert.items():
        value = raw.get(name)
        if value is not None and not any(type(value) is type(each) and value == each for each in allowed):
            raise unsupported(name)
    return {name: value for name, value in raw.items() if value is not None and name not in inert and name not in ignored}


def check_size(document: Any) -> None:
    """Limits the number of values. A body could hold millions, and checking each would block the worker for everyone.

    Raises `RequestRefused`.
    """
    for count, _ in enumerate(_values(document)):
        if count > MAX_VALUES:
            raise RequestRefused(f"The body holds more than {MAX_VALUES} values.", status=413, code="request_too_large")


def has_infinite(document: Any) -> bool:
    """Whether it contains a number beyond the range of JSON readers, such as 1e999. They would turn it into Infinity, which is
    not JSON.
    """
    return any(isinstance(value, float) and math.isinf(value) for value in _values(document))


def _values(document: Any) -> Iterator[Any]:
    waiting = [document]
    while waiting:
        value = waiting.pop()
        yield value
        if isinstance(value, dict):
            waiting += value.values()
        elif isinstance(value, list):
            waiting += value


def missing(param: str) -> RequestRefused:
    return RequestRefused(f"Missing required parameter: '{param}'.", code="missing_required_parameter", param=param)


_Parsed = TypeVar("_Parsed", bound=Parsed)


def validated(kind: type[_Parsed], raw: Any, *, at: str = "") -> _Parsed:
    """at: the path of `raw` in the request, for errors. Raises `RequestRefused`."""
    try:
        return kind.model_validate(raw)
    except ValidationError as error:
        # Without the input: nothing needs it.
        first = error.errors(include_url=False, include_input=False)[0]
    raise _invalid(first["type"], _path(at, first["loc"]), first.get("ctx", {}))


def _path(at: str, loc: tuple[int | str, ...]) -> str:
    path = at + "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in loc if part != "[key]")
    return path.removeprefix(".")


def _invalid(kind: str, path: str, context: Mapping[str, Any]) -> RequestRefused:
    """One of pydantic's errors in OpenAI's words."""
    at_least, at_most = context.get("ge", context.get("gt")), context.get("le", context.get("lt"))
    match kind:
        case "missing":
            return missing(path)
        case "extra_forbidden":
            return RequestRefused(f"Unknown parameter: '{path}'.", code="unknown_parameter", param=path)
        case "greater_than_equal" | "greater_than":
            said, code = f"below minimum value. Expected a value >= {at_least}", "below_min_value"
        case "less_than_equal" | "less_than":
            said, code = f"above maximum value. Expected a value <= {at_most}", "above_max_value"
        case "too_short" if context.get("actual_length") == 0:
            said, code = "empty array. Expected an array with at least one element", "empty_array"
        case "too_long":
            said, code = f"array too long. Expected at most {context.get('max_length')} elements", "array_above_max_length"
        case "string_too_long":
            said, code = f"string too long. Expected at most {context.get('max_length')} characters", "string_above_max_length"
        case "string_too_short":
            said, code = "empty string. Expected at least one character", "string_below_min_length"
        case "literal_error":
            said, code = f"value is not supported. Expected one of {context.get('expected')}", "invalid_value"
        case _ if kind.endswith(("_type", "_parsing")):
            told = kind.removesuffix("_type").removesuffix("_parsing")
            wanted = _TYPES.get(told, told)
            return RequestRefused(f"Invalid type for '{path}': expected {_a(wanted)}.", code="invalid_type", param=path)
        case _:
            said, code = "the value has the wrong form", "invalid_value"
    return RequestRefused(f"Invalid '{path}': {said}.", code=code, param=path)


def _a(noun: str) -> str:
    return f"an {noun}" if noun[0] in "aeiou" else f"a {noun}"
