"""What a problem document says beside its type (RFC 9457 section 3.2): which limit, how much, which names are valid.

Rules:
- Only the members of this table are written and read, each in its form. Everything else in a document is dropped.
- Nobody signed them. The SDK shows them in its own words. They change what a person reads, never what the SDK trusts or tries
  next.
- No value is a sentence: names, numbers and short lists of names cannot speak for us.
"""

from __future__ import annotations

import datetime
import re
from collections.abc import Callable
from typing import Final

from lacre.errors import Detail, Details
from lacre.runtime.json_objects import object_in

NONE: Final[Details] = {}
MAX_LISTED: Final = 32  # names in a list: as many as a person reads
_MOST: Final = 2**53  # every JSON reader holds it exactly
_NAME: Final = re.compile(r"[\x21-\x7e]{1,128}")  # as models and pools are named


def _name(value: object) -> str | None:
    return value if isinstance(value, str) and _NAME.fullmatch(value) else None


def _count(value: object) -> int | None:
    return value if isinstance(value, int) and not isinstance(value, bool) and 0 <= value <= _MOST else None


def _time(value: object) -> float | None:
    if not isinstance(value, int | float) or isinstance(value, bool):
        return None
    return float(value) if 0 <= value <= _LAST_TIME else None  # false for NaN


def _listed(value: object) -> tuple[str, ...] | None:
    if not isinstance(value, list | tuple) or not value:
        return None
    names = tuple(name for name in map(_name, value[:MAX_LISTED]) if name is not None)
    return names or None


_LAST_TIME: Final = 253_402_300_799  # 9999-12-31T23:59:59Z: later times have no date
_FORMS: Final[dict[str, Callable[[object], Detail | None]]] = {
    "limit": _name,  # the limit that is used up or exceeded: as plans.toml and the settings name it, or `max_tokens`
    "scope": _name,  # whose limit it is: user, tenant, plan, address, gateway, policy
    "unit": _name,  # what it counts
    "ceiling": _count,  # the limit itself
    "asked": _count,  # how much this request asked for
    "remaining": _count,  # how much was left
    "fits": _count,  # output tokens (`max_tokens`, over all choices) that would fit
    "reason": _name,  # why a token is not accepted
    "claim": _name,  # the claim in question
    "expired_at": _time,  # seconds since the epoch
    "header": _name,  # the request's field that is missing or wrong
    "models": _listed,  # the models that the caller may use
    "pools": _listed,
    "paths": _listed,  # the paths that exist
    "methods": _listed,  # the methods that the path takes
    "request_id": _name,  # the gateway's name for the request, as in the header `Lacre-Request-Id`
}


def read(body: bytes) -> dict[str, Detail]:
    """The members of a problem document that are in this table and well-formed. Never raises."""
    value = object_in(body) or {}
    found = {name: form(value[name]) for name, form in _FORMS.items() if name in value}
    return {name: detail for name, detail in found.items() if detail is not None}


def written(details: Details) -> dict[str, Detail]:
    """The same members, for a document: it omits malformed ones, and keeps at most `MAX_LISTED` names of a list."""
    found = {name: form(details[name]) for name, form in _FORMS.items() if name in details}
    return {name: detail for name, detail in found.items() if detail is not None}


_UNITS: Final = {"concurrent-requests": "requests at once"}
_REASONS: Final = {
    "missing": "None was sent.",
    "revoked": "It was revoked.",
    "no-such-limit": "The plans have no such limit for this budget.",
    "shape": "Another shape would be allowed.",
    "kem": "Another key encapsulation would be allowed.",
    "affinity": "It would be allowed without affinity: make the client with affinity=False.",
}


def told(details: Details) -> str:
    """The same in a sentence or two, for a person; empty if there is nothing to say."""
    return " ".join(filter(None, (_limit(details), _token(details), _names(details))))


def _limit(details: Details) -> str:
    if "limit" not in details:
        return _field(details)
    unit = f" {_UNITS.get(str(details['unit']), details['unit'])}" if "unit" in details else ""
    parts = [f"The limit is {details['limit']}"]
    if "scope" in details:
        parts.append(f"of the {details['scope']}")
    amounts = [
        f"{said} {details[name]}{unit if name == 'ceiling' else ''}"
        for name, said in (("ceiling", "at most"), ("asked", "asked for"), ("remaining", "left"))
        if name in details and (name, details[name]) != ("asked", 1)  # one request, as ever
    ]
    fits = f" A max_tokens of {details['fits']} or less would fit." if "fits" in details else ""
    return " ".join(parts) + (f": {', '.join(amounts)}." if amounts else ".") + fits


def _field(details: Details) -> str:
    return f"The header field is {details['header']}." if "header" in details else ""


def _token(details: Details) -> str:
    if "expired_at" in details:
        return f"The token expired at {_date(details['expired_at'])}."
    if "reason" not in details:
        return ""
    if "claim" not in details:
        return _REASONS.get(str(details["reason"]), f"The reason is {details['reason']}.")
    return f"The gateway does not accept its claim {details['claim']}: {details['reason']}."


def _date(value: Detail) -> str:
    seconds = value if isinstance(value, int | float) else 0.0
    return datetime.datetime.fromtimestamp(int(seconds), datetime.UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


def _names(details: Details) -> str:
    said = (("models", "Models"), ("pools", "Pools"), ("paths", "Paths"), ("methods", "Methods"))
    lists = [f"{word}: {', '.join(value)}." for name, word in said if isinstance(value := details.get(name), tuple)]
    return " ".join(lists)
