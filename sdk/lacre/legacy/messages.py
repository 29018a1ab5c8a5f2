"""Translates between httpx and httpx2: requests, responses, time limits and exceptions.

Only this file makes httpx's exceptions; every other error is Lacre's own.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Final

import httpx
import httpx2

from lacre import errors
from lacre.client import DEFAULT_TIMEOUT as SEALED_TIMEOUT
from lacre.runtime import arguments
from lacre.transport import sealed as transport

DEFAULT_TIMEOUT: Final = httpx.Timeout(**SEALED_TIMEOUT.as_dict())

EventHooks = Mapping[str, list[Callable[..., Any]]]


class Unreachable(errors.Unreachable, httpx.NetworkError):  # type: ignore[misc]  # `request` is httpx2's or httpx's
    """The client could not reach the gateway, or the connection broke before the answer. Both Lacre's and httpx's."""

    remedy = transport.Unreachable.remedy


class TimedOut(errors.TimedOut, httpx.TimeoutException):  # type: ignore[misc]  # as above
    """The gateway did not connect or answer in time. Both Lacre's and httpx's."""

    remedy = transport.TimedOut.remedy


@contextmanager
def of_request() -> Iterator[None]:
    with arguments.of_request():
        try:
            yield
        except httpx.InvalidURL as exc:
            raise httpx2.InvalidURL(str(exc)) from exc


def timeout_of(value: object) -> Any:
    """`timeout=` of httpx. Raises UsageError."""
    return value if isinstance(value, httpx.Timeout) else arguments.timeout(value)


def request_of(request: httpx.Request, content: bytes) -> httpx2.Request:
    return httpx2.Request(
        request.method, str(request.url), headers=request.headers.raw, content=content, extensions=dict(request.extensions)
    )


def response_of(answer: httpx2.Response, stream: httpx.SyncByteStream | httpx.AsyncByteStream) -> httpx.Response:
    return httpx.Response(answer.status_code, headers=answer.headers.raw, stream=stream, extensions=dict(answer.extensions))


@contextmanager
def mapped() -> Iterator[None]:
    """Turns httpx2's errors into httpx's too; both remain Lacre's."""
    try:
        yield
    except transport.TimedOut as exc:
        raise _as(TimedOut, exc) from exc
    except transport.Unreachable as exc:
        raise _as(Unreachable, exc) from exc


def _as(kind: type[TimedOut] | type[Unreachable], exc: errors.LacreError) -> errors.LacreError:
    mapped = kind(str(exc))
    mapped.__dict__.update((name, value) for name, value in vars(exc).items() if name != "_request")  # that is httpx2's
    return mapped
