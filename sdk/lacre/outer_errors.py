"""What goes wrong on the connection to the gateway, or to a token server. The one place that maps httpx2's exceptions.

An error here is both Lacre's and httpx2's, so that programs that know httpx2's handle it as theirs.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import httpx2

from lacre import errors


class Unreachable(errors.NetworkError, httpx2.NetworkError):
    """The gateway could not be reached, or the connection broke before its answer. Both Lacre's and httpx2's."""

    remedy = "Check the address in LACRE_URL, and that the gateway runs; then try again."


class TimedOut(errors.NetworkError, httpx2.TimeoutException):
    """The gateway did not connect or answer in time. Both Lacre's and httpx2's."""

    remedy = "Try again, or allow a longer `timeout=...`: a queue and a long prompt take their time."
    timed_out = True


@contextmanager
def mapped(who: str = "the gateway", setting: str = "LACRE_URL") -> Iterator[None]:
    try:
        yield
    except httpx2.TimeoutException as exc:
        late = TimedOut(f"{who} did not answer in time: try again, or allow a longer timeout")
        late.reached = not isinstance(exc, httpx2.ConnectTimeout | httpx2.PoolTimeout)
        raise late from exc
    except httpx2.TransportError as exc:
        gone = Unreachable(f"{who} cannot be reached: check the address in {setting} and that it runs")
        gone.reached = not isinstance(exc, httpx2.ConnectError | httpx2.ProxyError | httpx2.UnsupportedProtocol)
        raise gone from exc


@contextmanager
def mapped_stream() -> Iterator[None]:
    try:
        yield
    except httpx2.TimeoutException as exc:
        raise TimedOut("the answer stalled: what came so far is not the whole of it") from exc
    except httpx2.TransportError as exc:
        broke = errors.TruncatedStream("the connection broke in mid-answer: what came so far is not the whole of it")
        broke.cut = True
        raise broke from exc
