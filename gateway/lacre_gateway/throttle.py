"""Slows down whoever keeps knocking with no valid token, by address. slowapi keeps the counts, in this process.

Nothing is counted for callers who authenticate: their limits go by subject, in `limits`.
"""

from __future__ import annotations

import ipaddress
import time
from typing import Final

from limits import parse
from slowapi import Limiter

from lacre import problems
from lacre_gateway.refusal import Refusal

_BUCKET: Final = "failed-auth"
# A household or a server gets a whole /64 (RFC 6177): its single addresses are free to change.
_IPV6_PREFIX: Final = 64


class FailureThrottle:
    """Fixed one-minute windows of failed authentications per address."""

    def __init__(self, per_minute: int) -> None:
        self._limit = parse(f"{per_minute}/minute")
        limiter = Limiter(key_func=_no_request, storage_uri="memory://", strategy="fixed-window")
        self._counts = limiter.limiter

    def check(self, address: str) -> None:
        """Raises Refusal (429) for an address that failed too often."""
        key = _network(address)
        if not self._counts.test(self._limit, _BUCKET, key):
            reset = self._counts.get_window_stats(self._limit, _BUCKET, key).reset_time
            raise Refusal(problems.RATE_LIMITED, retry_after=reset - time.time())

    def failed(self, address: str) -> None:
        self._counts.hit(self._limit, _BUCKET, _network(address))


def _no_request() -> str:
    """Slowapi asks for a way to name the caller of a Starlette request; here the caller is named directly."""
    return ""


def _network(address: str) -> str:
    try:
        parsed = ipaddress.ip_address(address.partition("%")[0])
    except ValueError:
        return address
    if isinstance(parsed, ipaddress.IPv6Address):
        if parsed.ipv4_mapped is not None:
            return str(parsed.ipv4_mapped)
        return str(ipaddress.ip_network((parsed, _IPV6_PREFIX), strict=False))
    return str(parsed)
