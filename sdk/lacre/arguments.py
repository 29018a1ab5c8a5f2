"""What a caller gives, checked where it is given: what is wrong with it is the caller's to mend, and says so by name.

Rules:
- Absent is `None` alone. An empty or blank argument never stands for what the environment says: a service that passes on its
  caller's token must not answer as itself because that caller sent none.
- An environment variable that is empty counts as unset, as programs commonly have it.
- No value of a secret argument is shown.
"""

from __future__ import annotations

import math
import os
import re
import ssl
from collections.abc import Iterable, Mapping
from typing import Any, Final

import httpx2

from lacre.errors import SettingsError, UsageError

_HEADER_NAME: Final = re.compile(r"[!#$%&'*+.^_`|~0-9A-Za-z-]+")
_HEADER_VALUE: Final = re.compile(r"[\t\x20-\x7e]*")
_MOST_AT_ONCE: Final = 2**31 - 1  # of any count that a caller names; what is above it is a mistake


def text(value: object, name: str, *, helps: str = "give one that says something") -> str:
    """A string that says something. Raises UsageError. helps: what to do about an empty one."""
    if not isinstance(value, str):
        raise UsageError(f"{name}: a string is wanted, not {kind_of(value)}")
    if not value.strip():
        raise UsageError(f"{name}: it is empty; {helps}")
    return value


def setting(value: str | None, name: str, variable: str) -> str:
    """The argument; where it is None, the environment variable. Raises UsageError, or SettingsError where both are absent."""
    if value is not None:
        return text(value, name, helps=f"{variable} does not stand in for it, unless {name} is left out or None")
    found = os.environ.get(variable)
    if not found:
        raise SettingsError(f"pass {name}=... or set {variable}; `lacre up` writes both into DIR/env")
    return found


def flag(value: object, name: str) -> bool:
    if not isinstance(value, bool):
        raise UsageError(f"{name}: True or False is wanted, not {kind_of(value)}")
    return value


def count(value: object, name: str, *, least: int = 0) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or not least <= value <= _MOST_AT_ONCE:
        shown = value if isinstance(value, int) and not isinstance(value, bool) and abs(value) < 10**12 else kind_of(value)
        raise UsageError(f"{name}: a whole number from {least} up is wanted, not {shown}")
    return value


def timeout(value: object) -> httpx2.Timeout | float | None:
    """`timeout=`: seconds, an `httpx2.Timeout`, or None for no limit."""
    if value is None or isinstance(value, httpx2.Timeout):
        return value
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value) or value <= 0:
        raise UsageError("timeout: a number of seconds above 0 is wanted, or an httpx2.Timeout, or None for no limit")
    return value


def verify(value: object) -> ssl.SSLContext | str | bool:
    """`verify=`: an empty path is refused, for in its place the system's own authorities would be trusted."""
    if isinstance(value, str):
        return text(value, "verify")
    if not isinstance(value, bool | ssl.SSLContext):
        raise UsageError(f"verify: an ssl.SSLContext, True, False or a path is wanted, not {kind_of(value)}")
    return value


def proxy(value: object) -> httpx2.Proxy | httpx2.URL | str | None:
    if isinstance(value, str):
        return text(value, "proxy")
    if value is None or isinstance(value, httpx2.Proxy | httpx2.URL):
        return value
    raise UsageError(f"proxy: a URL or an httpx2.Proxy is wanted, not {kind_of(value)}")


def fields(value: object, name: str) -> dict[str, str]:
    """A mapping of strings to strings, as a query is; None is an empty one. Raises UsageError."""
    if value is None:
        return {}
    if not isinstance(value, Mapping) or not all(isinstance(each, str) for pair in value.items() for each in pair):
        raise UsageError(f"{name}: a mapping of strings to strings is wanted")
    return {unicode_text(key, name): unicode_text(each, name) for key, each in value.items()}


def headers(value: object, name: str) -> dict[str, str]:
    """As `fields`, of the signs that a header may have (RFC 9110 section 5)."""
    found = fields(value, name)
    if not all(_HEADER_NAME.fullmatch(key) and _HEADER_VALUE.fullmatch(each) for key, each in found.items()):
        raise UsageError(f"{name}: a header has letters, digits and dashes in its name, and visible ASCII in its value")
    return found


def one_or_more(value: object, kind: type[Any], name: str) -> tuple[Any, ...]:
    """One of a kind, or several. Raises UsageError for none, and for another kind."""
    several = (value,) if isinstance(value, kind) else value
    if not isinstance(several, Iterable) or isinstance(several, str | bytes | Mapping):
        raise UsageError(f"{name}: a {kind.__name__} is wanted, or several, not {kind_of(value)}")
    found = tuple(several)
    if not found or not all(isinstance(each, kind) for each in found):
        raise UsageError(f"{name}: a {kind.__name__} is wanted, or several")
    return found


def unicode_text(value: str, place: str) -> str:
    """Text that UTF-8 can say. place: where it stands, for a person. Raises UsageError, which shows nothing of it."""
    try:
        value.encode()
    except UnicodeEncodeError as exc:
        raise UsageError(
            f"{place}: character {exc.start} is half of a surrogate pair, and no text: decode it with errors='replace'"
        ) from None  # its text would be shown
    return value


def kind_of(value: object) -> str:
    """What somebody gave, by its kind alone: its value may be a secret."""
    return "None" if value is None else type(value).__name__
