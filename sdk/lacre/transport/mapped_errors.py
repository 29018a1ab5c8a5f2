"""Errors of the connection to the gateway, or to a token server. Only this file maps httpx2's exceptions.

An error here is both Lacre's and httpx2's, so that programs written for httpx2 handle it.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TypeVar

import httpx2

from lacre import errors
from lacre.errors import TimedOut, Unreachable

__all__ = ["TimedOut", "Unreachable", "mapped", "mapped_stream"]


E = TypeVar("E", TimedOut, Unreachable)


@contextmanager
def mapped(who: str = "the gateway", setting: str = "LACRE_URL") -> Iterator[None]:
    """who: the peer that the block talks to. setting: where its address comes from."""
    try:
        yield
    except httpx2.TimeoutException as exc:
        late = _told(TimedOut, exc, who, setting)
        late.reached = not isinstance(exc, httpx2.ConnectTimeout | httpx2.PoolTimeout)
        raise late from exc
    except httpx2.TransportError as exc:
        gone = _told(Unreachable, exc, who, setting)
        gone.reached = not isinstance(exc, httpx2.ConnectError | httpx2.ProxyError | httpx2.UnsupportedProtocol)
        raise gone from exc
    except (httpx2.InvalidURL, UnicodeError) as exc:
        raise errors.SettingsError(f"{who} has an address that cannot be resolved: check {setting} and the proxy") from exc


@contextmanager
def mapped_stream() -> Iterator[None]:
    try:
        yield
    except httpx2.TimeoutException as exc:
        raise TimedOut("the answer stalled: the received part is not the whole answer") from exc
    except httpx2.TransportError as exc:
        broke = errors.TruncatedStream("the connection broke in mid-answer: the received part is not the whole answer")
        broke.cut = True
        raise broke from exc


def _told(kind: type[E], exc: httpx2.TransportError, who: str, setting: str) -> E:
    from lacre.transport import network_causes  # noqa: PLC0415 - only a program whose connection failed pays for it

    why = network_causes.explained(exc, who, setting)
    error = kind(why.said)
    error.cause, error.remedy = why.cause, why.helps
    error.add_note(why.helps)
    return error
