"""What a caller gives, checked where it is given: what is wrong with it is the caller's to mend, and says so by name.

Rules:
- Absent is `None` alone. An empty or blank argument never stands for what the environment says: a service that passes on its
  caller's token must not answer as itself because that caller sent none.
- An environment variable that is empty counts as unset, as programs commonly have it.
- No value of a secret argument is shown.
"""

from __future__ import annotations

import os
import re
import ssl
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Final

import httpx2

from lacre.errors import SettingsError, UsageError

_HEADER_NAME: Final = re.compile(r"[!#$%&'*+.^_`|~0-9A-Za-z-]+")
_HEADER_VALUE: Final = re.compile(r"[\t\x20-\x7e]*")
_MOST_SECONDS: Final = 10**9  # thirty years; sockets and locks overflow not far above it
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


def instance(value: object, kind: type | tuple[type, ...], name: str) -> None:
    """Raises UsageError if the value is of another type."""
    if not isinstance(value, kind):
        kinds = " or ".join(each.__name__ for each in (kind if isinstance(kind, tuple) else (kind,)))
        raise UsageError(f"{name}: {kinds} is expected, not {kind_of(value)}")


def function(value: object, name: str) -> None:
    """Raises UsageError if the value cannot be called."""
    if not callable(value):
        raise UsageError(f"{name}: a function is expected, not {kind_of(value)}")


@contextmanager
def of_request() -> Iterator[None]:
    """Around the building of a request. Raises UsageError for what none can be built of: a body that is not JSON, say."""
    try:
        yield
    except (TypeError, ValueError, AttributeError, LookupError, RecursionError, OverflowError, httpx2.InvalidURL) as exc:
        if isinstance(exc, UnicodeError):
            raise UsageError(_NOT_UNICODE) from None  # its text would show the value
        raise UsageError(f"no request can be built of these arguments ({type(exc).__name__}): {_OF_REQUEST}") from exc


@contextmanager
def of_content() -> Iterator[None]:
    """Around the reading of a request's content. Raises UsageError where it is not of bytes, or not for this client."""
    try:
        yield
    except (TypeError, AttributeError, RuntimeError) as exc:
        raise UsageError("content: text, bytes or an iterable of bytes is expected; an async one for an async client") from exc


_OF_REQUEST: Final = "give json= plain data without NaN, text or bytes for content=, and strings for headers and params"
_NOT_UNICODE: Final = "a text in these arguments holds half of a surrogate pair, or a character that is not allowed there"


def hooks(value: object) -> dict[str, list[Any]] | None:
    """`event_hooks=`: the functions for `request`, and those for `response`. Raises UsageError."""
    if value is None:
        return None
    if not isinstance(value, Mapping) or not set(value) <= {"request", "response"}:
        raise UsageError("event_hooks: a mapping is expected, with `request` and `response` as its only names")
    found = {name: list(each) if isinstance(each, list | tuple) else [None] for name, each in value.items()}
    if not all(callable(hook) for each in found.values() for hook in each):
        raise UsageError("event_hooks: a list of functions is expected for each name")
    return found


def limits(value: object) -> httpx2.Limits:
    """`limits=`. Raises UsageError."""
    if not isinstance(value, httpx2.Limits):
        raise UsageError(f"limits: an httpx2.Limits is expected, not {kind_of(value)}")
    return value


def auth(value: Any, default: object, kind: type, request: type) -> Any:
    """`auth=` of httpx2 or httpx, whose default, `Auth` and `Request` are given. Raises UsageError, here or when it is used."""
    pair = isinstance(value, tuple) and len(value) == 2 and all(isinstance(each, str | bytes) for each in value)
    if pair or value is None or value is default or isinstance(value, kind):
        return value
    if not callable(value):
        raise UsageError(f"auth: a pair of strings or an Auth is expected, not {kind_of(value)}")

    def checked(asked: object) -> object:
        answered = value(asked)
        if not isinstance(answered, request):
            raise UsageError(f"auth: the function must return the request, and returned {kind_of(answered)}")
        return answered

    return checked


def sendable(request: object, kind: type, stream: type, *, closed: bool) -> None:
    """What a client is to send: a request of this kind with a body of this kind. Raises UsageError."""
    instance(request, kind, "request")
    if not isinstance(getattr(request, "stream", None), stream):
        raise UsageError("content: an async iterable belongs to an async client, and any other to a client that is not")
    seconds = getattr(request, "extensions", {}).get("timeout") or {}
    if not isinstance(seconds, Mapping):
        raise UsageError("timeout: a number of seconds is expected, or a Timeout, or None for no limit")
    for step, each in seconds.items():
        if step == "pool" and each == 0:
            continue  # a connection that is free now, or none
        if each is not None and (isinstance(each, bool) or not isinstance(each, int | float) or not 0 < each <= _MOST_SECONDS):
            raise UsageError("timeout: a number of seconds above 0 is expected, or a Timeout, or None for no limit")
    if closed:
        raise UsageError("this client is closed: make another one")


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
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value <= _MOST_SECONDS:
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
