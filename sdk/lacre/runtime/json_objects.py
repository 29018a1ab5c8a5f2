"""Reads foreign bytes as one JSON object. Text that nests too deep for Python's reader does not count as JSON."""

from __future__ import annotations

import json
from typing import Any, NoReturn

from lacre.errors import InvalidMessage


def parse_object(data: bytes | bytearray | str, what: str, *, once: bool = False) -> dict[str, Any]:
    """Raises InvalidMessage, which calls the text `what` and does not repeat it.

    The text is UTF-8 without a byte order mark, and has no NaN and no infinity (RFC 8259): other readers refuse these.
    once: refuse an object that repeats a member, at any depth: readers would differ (RFC 8725 section 3.10).
    """
    try:
        text = data if isinstance(data, str) else data.decode()
        value = json.loads(text, object_pairs_hook=_unrepeated if once else None, parse_constant=_no_number)
    except (ValueError, RecursionError) as exc:
        raise InvalidMessage(f"{what} is not JSON" + (", or repeats a member" if once else "")) from exc
    if not isinstance(value, dict):
        raise InvalidMessage(f"{what} is not a JSON object")
    return value


def object_in(data: bytes | bytearray | str) -> dict[str, Any] | None:
    """None if the text is not a JSON object."""
    try:
        return parse_object(data, "it")
    except InvalidMessage:
        return None


def _no_number(_text: str) -> NoReturn:
    raise ValueError


def _unrepeated(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    members = dict(pairs)
    if len(members) != len(pairs):
        raise ValueError
    return members
