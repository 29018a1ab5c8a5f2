"""Fetches a JSON document of an issuer: its metadata or its keys. Nothing is decided here.

Rules:
- https only; plain http for an issuer on this machine. No redirect is followed, because the issuer named the address.
- A document has a maximum size and time, and must not be compressed.
- A failure is a `FetchFailed` in our own words: nothing of the answer reaches a log, and of the address no query or user.
"""

from __future__ import annotations

import asyncio
import json
import re
import ssl
from dataclasses import dataclass
from typing import Any, Final

import httpx2

from lacre._version import __version__
from lacre.errors import LacreError
from lacre.runtime.hosts import without_secrets
from lacre.transport.fault_words import fault_in_words

MAX_DOCUMENT: Final = 256 * 1024  # bytes; a set of a hundred RSA keys with their certificates is smaller
TIME_LIMIT: Final = 5.0  # seconds for a whole document
MAX_FRESH: Final = 86400.0  # seconds: a longer lifetime that a document claims is cut to this
TRUST: Final = "the issuer's `ca`"
_ETAG: Final = re.compile(r'(?:W/)?"[!#-~]{0,256}"')  # RFC 9110 section 8.8.3, in ASCII
_MAX_AGE: Final = re.compile(r'max-age\s*=\s*"?([0-9]{1,9})"?', re.IGNORECASE)
_UNCACHED: Final = re.compile(r"\bno-(?:store|cache)\b", re.IGNORECASE)


class FetchFailed(LacreError):
    """A document could not be fetched, or is not JSON."""


@dataclass(frozen=True, slots=True)
class Fetched:
    """value: None if the known one is still valid (304). fresh: seconds that the document may be kept; None: it does not
    say.
    """

    value: Any | None
    etag: str | None
    fresh: float | None


def make_client(url: str, context: ssl.SSLContext | None = None) -> httpx2.AsyncClient:
    """For the documents of one issuer. A proxy from the environment is used only for other machines.

    context: the CAs that it trusts; None: the system's, or those that the environment names.

    Raises FetchFailed if the environment names certificates or a proxy that cannot be used.
    """
    try:
        return httpx2.AsyncClient(
            headers={"user-agent": f"lacre-gateway/{__version__}", "accept": "application/json", "accept-encoding": "identity"},
            timeout=TIME_LIMIT,
            follow_redirects=False,
            verify=True if context is None else context,
            trust_env=url.startswith("https:"),
        )
    except (OSError, ValueError, ImportError, httpx2.InvalidURL) as exc:  # ssl.SSLError is an OSError
        raise FetchFailed(
            f"no client for {without_secrets(url)} ({type(exc).__name__}): "
            "correct SSL_CERT_FILE, SSL_CERT_DIR and the *_PROXY variables"
        ) from exc


async def fetch(client: httpx2.AsyncClient, url: str, etag: str | None) -> Fetched:
    """etag: of the known document. Raises FetchFailed."""
    shown = without_secrets(url)
    try:
        async with asyncio.timeout(TIME_LIMIT):
            async with client.stream("GET", url, headers={} if etag is None else {"if-none-match": etag}) as response:
                if response.status_code == 304 and etag is not None:
                    return Fetched(None, etag, _freshness(response.headers))
                if response.status_code != 200:
                    raise FetchFailed(f"{shown} answered with status {response.status_code}")
                content = await _content(response, shown)
    except (TimeoutError, httpx2.TimeoutException) as exc:
        raise FetchFailed(
            f"{shown} took longer than {TIME_LIMIT:.0f} s: check the host, and that no firewall is in the way"
        ) from exc
    except (httpx2.HTTPError, httpx2.InvalidURL) as exc:
        raise FetchFailed(f"{shown} cannot be reached: {fault_in_words(exc, TRUST)}") from exc
    try:
        value = json.loads(content)
    except (ValueError, RecursionError) as exc:
        raise FetchFailed(f"{shown} is not JSON") from exc
    return Fetched(value, _tag(response.headers), _freshness(response.headers))


def _tag(headers: httpx2.Headers) -> str | None:
    """The entity tag, if well-formed: the next request sends it back."""
    tag = headers.get("etag", "")
    return tag if _ETAG.fullmatch(tag) else None


async def _content(response: httpx2.Response, shown: str) -> bytes:
    content = bytearray()
    async for piece in response.aiter_raw():
        content += piece
        if len(content) > MAX_DOCUMENT:
            raise FetchFailed(f"{shown} is longer than {MAX_DOCUMENT} bytes")
    return bytes(content)


def _freshness(headers: httpx2.Headers) -> float | None:
    """RFC 9111 section 4.2, from `Cache-Control` alone, minus the time in a cache on the way."""
    control = headers.get("cache-control", "")
    if _UNCACHED.search(control):
        return 0.0
    found = _MAX_AGE.search(control)
    if found is None:
        return None
    age = headers.get("age", "0")
    return min(MAX_FRESH, max(0.0, float(found[1]) - (float(age) if age.isdecimal() and len(age) < 10 else 0.0)))
