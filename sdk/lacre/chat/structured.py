"""Structured answers: from a Python type or a JSON schema to `response_format`, and from the answer's text to an instance.

Rules:
- `pydantic` reads and checks Python types. It is imported when a program passes such a type, and nothing installs it.
- No error shows any of the answer, because errors end up in logs.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from types import GenericAlias
from typing import TYPE_CHECKING, Any, Final, TypeVar

from lacre.errors import InvalidMessage, UsageError
from lacre.runtime import arguments

if TYPE_CHECKING:
    import pydantic

T = TypeVar("T")
Schema = type[Any] | Mapping[str, Any]

MAX_NAME: Final = 64  # characters of the schema's name; OpenAI's limit
_CUT: Final = "Allow more tokens, or pass `schema=` to the request; then ask again."


def format_of(schema: object) -> dict[str, Any]:
    """`response_format` for a Python type or a JSON schema. Raises UsageError."""
    if isinstance(schema, Mapping):
        return _format("answer", dict(schema))
    adapter = _adapter(schema)
    import pydantic  # noqa: PLC0415 - see the rules

    try:
        made = adapter.json_schema()
    except pydantic.errors.PydanticUserError:
        raise UsageError(f"schema: {_name(schema)} has members that no JSON schema describes") from None
    return _format(_name(schema), _closed(made))


def read(text: str, kind: Any) -> Any:
    """The instance in an answer's text; plain JSON values if `kind` is None or a JSON schema. Raises InvalidMessage and
    UsageError.
    """
    if kind is None or isinstance(kind, Mapping):
        try:
            return json.loads(text)
        except (ValueError, RecursionError):
            raise _unreadable("the model's answer is not JSON, or was cut short") from None
    adapter = _adapter(kind)
    import pydantic  # noqa: PLC0415 - see the rules

    try:
        return adapter.validate_json(text)
    except pydantic.ValidationError as exc:
        found = exc.errors(include_url=False, include_context=False, include_input=False)
        why = f"{len(found)} faults, the first of type {found[0]['type']!r}"
    raise _unreadable(f"the model's answer does not fit {_name(kind)} ({why}), or was cut short")


def _unreadable(message: str) -> InvalidMessage:
    wrong = InvalidMessage(message)
    wrong.remedy = _CUT
    return wrong


def _adapter(kind: Any) -> pydantic.TypeAdapter[Any]:
    if not isinstance(kind, type | GenericAlias):
        raise UsageError(f"schema must be a type or a JSON schema, not {arguments.kind_of(kind)}")
    try:
        import pydantic  # noqa: PLC0415 - see the rules
    except ModuleNotFoundError:
        raise UsageError("a type as schema needs pydantic: pip install pydantic, or pass a JSON schema") from None
    try:
        return pydantic.TypeAdapter(kind)
    except (pydantic.errors.PydanticUserError, TypeError, NameError):
        raise UsageError(f"schema: {_name(kind)} is a type that pydantic cannot read") from None


def _format(name: str, schema: dict[str, Any]) -> dict[str, Any]:
    return {"type": "json_schema", "json_schema": {"name": name, "schema": schema, "strict": True}}


def _name(kind: object) -> str:
    return str(getattr(kind, "__name__", "answer"))[:MAX_NAME]


def _closed(schema: Any) -> Any:
    """The schema of a type, whose objects have no members but the named ones, if it does not say otherwise.

    The type ignores others, and a model that may write them writes too much.
    """
    if isinstance(schema, list):
        return [_closed(each) for each in schema]
    if not isinstance(schema, dict):
        return schema
    inner = {name: each if name in _VALUES else _closed(each) for name, each in schema.items()}
    return {"additionalProperties": False, **inner} if isinstance(schema.get("properties"), dict) else inner


_VALUES: Final = frozenset({"const", "default", "enum", "examples"})  # these hold values and no schemas
