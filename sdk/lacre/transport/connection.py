"""The requests and answers of a connection to the gateway; `connection_async` and `connection_sync` send and read them."""

from __future__ import annotations

import re
from typing import Any, Final

import httpx2

from lacre.errors import UsageError
from lacre.evidence import audit_proof
from lacre.exchange.steps import Outer, Send
from lacre.jose import dpop
from lacre.jose.dpop import ProofKey
from lacre.transport.dial import Outside
from lacre.transport.oauth import checked
from lacre.wire.header import MANIFEST_VERSION

# seconds to wait for a second free connection beside the one that a call holds: enough for a short request to end
POOL_BESIDE: Final = 2.0
_REQUEST_ID: Final = re.compile(r"[0-9A-Za-z-]{1,64}")  # ours has 32 hexadecimal digits
MAX_VERSION_DIGITS: Final = 16  # a manifest's version is an integer that every JSON parser holds exactly
READ_HERE: Final = "this answer is read"


def patience_of(extensions: Any, endurance: float) -> float | None:
    """Seconds that a call waits for another call's fetch: as long as its own time limits and tries would allow."""
    limits = extensions.get("timeout", {})
    allowed = [limits.get(name) for name in ("pool", "connect", "read")]
    return None if None in allowed else endurance + sum(allowed)


def beside(extensions: Any) -> dict[str, Any]:
    """The time limits, without the one for a free connection: this call itself may hold the only one."""
    limits = extensions.get("timeout", {})
    pool = limits.get("pool")
    return {"timeout": {**limits, "pool": POOL_BESIDE if pool is None else min(pool, POOL_BESIDE)}}


def credentials(
    outer: httpx2.Client | httpx2.AsyncClient, step: Send, token: str | None, key: ProofKey | None
) -> list[tuple[str, str]]:
    """The headers that say who asks: the token, and with a key the proof of possession (RFC 9449 section 7.1)."""
    if token is None:
        return []
    if key is None:
        return [("authorization", f"Bearer {checked(token)}")]
    url = str(outer.base_url.join(step.path))
    proof = key.proof(step.method, url, token=checked(token), request=step.sealed)
    return [("authorization", f"DPoP {token}"), (dpop.HEADER, proof)]


def opened(outer: Outside) -> Outside:
    """A call may begin, or continue, after another thread or task has closed the client. Raises UsageError."""
    if outer.is_closed:
        raise UsageError("this client is closed: make another one")
    return outer


def outer_request(
    outer: httpx2.Client | httpx2.AsyncClient, step: Send, credentials: list[tuple[str, str]], extensions: Any
) -> httpx2.Request:
    """The request to the gateway, with the application's own timeouts."""
    headers = [*step.headers, ("accept-encoding", "identity"), *credentials]
    timeouts = {"timeout": extensions["timeout"]} if "timeout" in extensions else None
    return outer.build_request(step.method, step.path, headers=headers, content=step.body or None, extensions=timeouts)


def outer_of(response: httpx2.Response, token: str | None = None) -> Outer:
    """token: the one in the request."""
    headers = response.headers
    return Outer(
        status=response.status_code,
        content_type=headers.get("content-type", ""),
        retry_after=_seconds(headers.get("retry-after")),
        audit=headers.get(audit_proof.HEADER, ""),
        speaks_for={} if token is None else audit_proof.speaks_for(token),
        request_id=_request_id(headers.get("lacre-request-id")),
        token_expires=None if token is None else audit_proof.expires(token),
        manifest=_version(headers.get(MANIFEST_VERSION)),
    )


def _request_id(told: str | None) -> str | None:
    return told if told is not None and _REQUEST_ID.fullmatch(told) else None


def _version(told: str | None) -> int | None:
    return int(told) if told is not None and told.isascii() and told.isdecimal() and len(told) < MAX_VERSION_DIGITS else None


def _seconds(retry_after: str | None) -> float | None:
    """`Retry-After` in its delta-seconds form, the only one that our gateway sends (RFC 9110 section 10.2.3)."""
    return float(retry_after) if retry_after is not None and retry_after.isdecimal() and len(retry_after) < 7 else None
