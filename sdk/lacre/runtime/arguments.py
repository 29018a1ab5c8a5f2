"""Checks a caller's arguments where the caller passes them. Errors name the argument.

Rules:
- Only `None` means absent. An empty or blank argument never falls back to the environment: a service passes on its caller's
  token, and must not use its own if that caller sent none.
- An empty environment variable counts as unset, as in most programs.
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
_MOST_AT_ONCE: Final = 2**31 - 1  # of any count in an argument; a larger one is a mistake


def text(value: object, name: str, *, helps: str = "pass a text that is not blank") -> str:
    """A string that is not blank. Raises UsageError. helps: what to do about an empty one."""
    if not isinstance(value, str):
        raise UsageError(f"{name} must be a string, not {kind_of(value)}")
    if not value.strip():
        raise UsageError(f"{name} is empty; {helps}")
    return value


def setting(value: str | None, name: str, variable: str) -> str:
    """The argument; if it is None, the environment variable. Raises UsageError, or SettingsError if both are absent."""
    if value is not None:
        return text(value, name, helps=f"{variable} is used only if {name} is omitted or None")
    found = os.environ.get(variable)
    if not found:
        raise SettingsError(f"pass {name}=... or set {variable}; `lacre up` writes both into DIR/env")
    return found


def instance(value: object, kind: type | tuple[type, ...], name: str) -> None:
    """Raises UsageError if the value is of another type."""
    if not isinstance(value, kind):
        kinds = " or ".join(each.__name__ for each in (kind if isinstance(kind, tuple) else (kind,)))
        raise UsageError(f"{name} must be {kinds}, not {kind_of(value)}")


def function(value: object, name: str) -> None:
    """Raises UsageError if the value cannot be called."""
    if not callable(value):
        raise UsageError(f"{name} must be a function, not {kind_of(value)}")


@contextmanager
def of_request() -> Iterator[None]:
    """Wrap around building a request. Raises UsageError if the arguments cannot make one: a body that is not JSON, say."""
    try:
        yield
    except (TypeError, ValueError, AttributeError, LookupError, RecursionError, OverflowError, httpx2.InvalidURL) as exc:
        if isinstance(exc, UnicodeError):
            raise UsageError(_NOT_UNICODE) from None  # the text of the cause would show the value
        raise UsageError(f"these arguments do not make a request ({type(exc).__name__}): {_OF_REQUEST}") from exc


@contextmanager
def of_content() -> Iterator[None]:
    """Wrap around reading a request's content. Raises UsageError if it does not yield bytes, or is not for this kind of
    client.
    """
    try:
        yield
    except (TypeError, AttributeError, RuntimeError) as exc:
        raise UsageError("content must be text, bytes or an iterable of bytes (for an async client: an async one)") from exc


_OF_REQUEST: Final = "pass plain data without NaN as json=, text or bytes as content=, and strings as headers and params"
_NOT_UNICODE: Final = "a text in these arguments holds half of a surrogate pair, or a character that is not allowed in it"


def hooks(value: object) -> dict[str, list[Any]] | None:
    """`event_hooks=`: the functions for `request`, and those for `response`. Raises UsageError."""
    if value is None:
        return None
    if not isinstance(value, Mapping) or not set(value) <= {"request", "response"}:
        raise UsageError("event_hooks must be a mapping with no names but `request` and `response`")
    found = {name: list(each) if isinstance(each, list | tuple) else [None] for name, each in value.items()}
    if not all(callable(hook) for each in found.values() for hook in each):
        raise UsageError("event_hooks must have a list of functions for each name")
    return found


def limits(value: object) -> httpx2.Limits:
    """`limits=`. Raises UsageError."""
    if not isinstance(value, httpx2.Limits):
        raise UsageError(f"limits must be an httpx2.Limits, not {kind_of(value)}")
    return value


def auth(value: Any, default: object, kind: type, request: type) -> Any:
    """`auth=` of httpx2 or httpx, with their default, `Auth` and `Request`. Raises UsageError, here or at its use."""
    pair = isinstance(value, tuple) and len(value) == 2 and all(isinstance(each, str | bytes) for each in value)
    if pair or value is None or value is default or isinstance(value, kind):
        return value
    if not callable(value):
        raise UsageError(f"auth must be a pair of strings or an Auth, not {kind_of(value)}")

    def checked(asked: object) -> object:
        answered = value(asked)
        if not isinstance(answered, request):
            raise UsageError(f"the function in auth must return the request, not {kind_of(answered)}")
        return answered

    return checked


def sendable(request: object, kind: type, stream: type, *, closed: bool) -> None:
    """Checks what a client is to send: a request of this kind with a body of this kind. Raises UsageError."""
    instance(request, kind, "request")
    if not isinstance(getattr(request, "stream", None), stream):
        raise UsageError("content must be an async iterable for an async client, and a sync one for a sync client")
    seconds = getattr(request, "extensions", {}).get("timeout") or {}
    if not isinstance(seconds, Mapping):
        raise UsageError("timeout must be a number of seconds, a Timeout, or None for no limit")
    for step, each in seconds.items():
        if step == "pool" and each == 0:
            continue  # skips a connection that is free now, or none
        if each is not None and (isinstance(each, bool) or not isinstance(each, int | float) or not 0 < each <= _MOST_SECONDS):
            raise UsageError("timeout must be a number of seconds above 0, a Timeout, or None for no limit")
    if closed:
        raise UsageError("this client is closed: make another one")


def flag(value: object, name: str) -> bool:
    if not isinstance(value, bool):
        raise UsageError(f"{name} must be True or False, not {kind_of(value)}")
    return value


def count(value: object, name: str, *, least: int = 0) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or not least <= value <= _MOST_AT_ONCE:
        shown = value if isinstance(value, int) and not isinstance(value, bool) and abs(value) < 10**12 else kind_of(value)
        raise UsageError(f"{name} must be a whole number of at least {least}, not {shown}")
    return value


def timeout(value: object) -> httpx2.Timeout | float | None:
    """`timeout=`: seconds, an `httpx2.Timeout`, or None for no limit."""
    if value is None or isinstance(value, httpx2.Timeout):
        return value
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value <= _MOST_SECONDS:
        raise UsageError("timeout must be a number of seconds above 0, an httpx2.Timeout, or None for no limit")
    return value


def verify(value: object) -> ssl.SSLContext | str | bool:
    """`verify=`: refuses an empty path, because the system's own authorities would be trusted in its place."""
    if isinstance(value, str):
        return text(value, "verify")
    if not isinstance(value, bool | ssl.SSLContext):
        raise UsageError(f"verify must be an ssl.SSLContext, True, False or a path, not {kind_of(value)}")
    return value


def proxy(value: object) -> httpx2.Proxy | httpx2.URL | str | None:
    if isinstance(value, str):
        return text(value, "proxy")
    if value is None or isinstance(value, httpx2.Proxy | httpx2.URL):
        return value
    raise UsageError(f"proxy must be a URL or an httpx2.Proxy, not {kind_of(value)}")


def fields(value: object, name: str) -> dict[str, str]:
    """A mapping of strings to strings, as a query is; None is an empty one. Raises UsageError."""
    if value is None:
        return {}
    if not isinstance(value, Mapping) or not all(isinstance(each, str) for pair in value.items() for each in pair):
        raise UsageError(f"{name} must be a mapping of strings to strings")
    return {unicode_text(key, name): unicode_text(each, name) for key, each in value.items()}


def headers(value: object, name: str) -> dict[str, str]:
    """As `fields`, with the characters that a header may have (RFC 9110 section 5)."""
    found = fields(value, name)
    if not all(_HEADER_NAME.fullmatch(key) and _HEADER_VALUE.fullmatch(each) for key, each in found.items()):
        raise UsageError(f"{name}: a header's name has letters, digits and dashes, and its value visible ASCII")
    return found


def one_or_more(value: object, kind: type[Any], name: str) -> tuple[Any, ...]:
    """One of a kind, or several. Raises UsageError for none, and for another kind."""
    several = (value,) if isinstance(value, kind) else value
    if not isinstance(several, Iterable) or isinstance(several, str | bytes | Mapping):
        raise UsageError(f"{name} must be one {kind.__name__} or several, not {kind_of(value)}")
    found = tuple(several)
    if not found or not all(isinstance(each, kind) for each in found):
        raise UsageError(f"{name} must be one {kind.__name__} or several")
    return found


def unicode_text(value: str, place: str) -> str:
    """Text that UTF-8 can encode. place: its name for a person. Raises UsageError, which shows nothing of it."""
    try:
        value.encode()
    except UnicodeEncodeError as exc:
        raise UsageError(
            f"{place}: character {exc.start} is half of a surrogate pair, not text: decode it with errors='replace'"
        ) from None  # the text of the cause would show it
    return value


def kind_of(value: object) -> str:
    """The type of a caller's value, never the value: it may be a secret."""
    return "None" if value is None else type(value).__name__
