"""The connection to the gateway: does the steps of one exchange over httpx2, and reads the answer's body piece by piece.

Rules:
- Redirects are never followed, no cookie is sent, and the answer's bytes are read as they came.

`lacre.sealing` decides what to send; `lacre.transport` drives it.
"""

from __future__ import annotations

import time
from collections.abc import AsyncIterator, Callable, Iterator
from typing import Any

import httpx2

from lacre import audit, dpop
from lacre.credentials import checked
from lacre.dpop import ProofKey
from lacre.outer_errors import mapped
from lacre.steps import Done, Offload, Outer, Read, Send, Step, Wait
from lacre.token_sources import AsyncBearer, Bearer


class Wire:
    """Does the steps of one exchange; holds the last response, whose body is read step by step."""

    def __init__(self, outer: httpx2.Client, bearer: Bearer, extensions: Any) -> None:
        self._outer = outer
        self._bearer = bearer
        self._extensions = extensions
        self._token: str | None = None
        self._response: httpx2.Response | None = None
        self._chunks: Iterator[bytes] = iter(())

    def do(self, step: Step) -> Done:
        if isinstance(step, Send):
            return self._send(step)
        if isinstance(step, Read):
            with mapped():
                return self.read()
        if isinstance(step, Wait):
            self.close()
            time.sleep(step.seconds)
            return None
        if isinstance(step, Offload):
            step.do()
            return None
        self._token, refused = self._bearer.token(self._token), self._token
        return self._token != refused

    def _send(self, step: Send) -> Outer:
        self.close()
        token = self._bearer.token() if step.sealed else None
        request = outer_request(self._outer, step, credentials(self._outer, step, token, self._bearer.key), self._extensions)
        with mapped():
            self._response = self._outer.send(request, stream=True, follow_redirects=False)
        self._token, self._chunks = token, self._response.iter_raw()
        return outer_of(self._response, token)

    def read(self) -> bytes | None:
        return next(self._chunks, None)

    def close(self) -> None:
        if self._response is not None:
            self._response.close()


class AsyncWire:
    """The async twin of `Wire`."""

    def __init__(self, outer: httpx2.AsyncClient, bearer: AsyncBearer, extensions: Any) -> None:
        self._outer = outer
        self._bearer = bearer
        self._extensions = extensions
        self._token: str | None = None
        self._response: httpx2.Response | None = None
        self._chunks: AsyncIterator[bytes] | None = None

    async def do(self, step: Step) -> Done:
        if isinstance(step, Send):
            return await self._send(step)
        if isinstance(step, Read):
            with mapped():
                return await self.read()
        if isinstance(step, Wait):
            await self.close()
            await _sleep(step.seconds)
            return None
        if isinstance(step, Offload):
            await _in_thread(step.do)
            return None
        self._token, refused = await self._bearer.token(self._token), self._token
        return self._token != refused

    async def _send(self, step: Send) -> Outer:
        await self.close()
        token = await self._bearer.token() if step.sealed else None
        request = outer_request(self._outer, step, credentials(self._outer, step, token, self._bearer.key), self._extensions)
        with mapped():
            self._response = await self._outer.send(request, stream=True, follow_redirects=False)
        self._token, self._chunks = token, self._response.aiter_raw()
        return outer_of(self._response, token)

    async def read(self) -> bytes | None:
        return None if self._chunks is None else await anext(self._chunks, None)

    async def close(self) -> None:
        if self._response is not None:
            await self._response.aclose()


async def _in_thread(work: Callable[[], None]) -> None:
    from anyio import to_thread  # noqa: PLC0415 - what `import lacre` need not wait for

    await to_thread.run_sync(work)


async def _sleep(seconds: float) -> None:
    from anyio import sleep  # noqa: PLC0415 - what `import lacre` need not wait for

    await sleep(seconds)


def credentials(
    outer: httpx2.Client | httpx2.AsyncClient, step: Send, token: str | None, key: ProofKey | None
) -> list[tuple[str, str]]:
    """The headers that say who asks: the token, and with a key the proof that it is ours (RFC 9449 section 7.1)."""
    if token is None:
        return []
    if key is None:
        return [("authorization", f"Bearer {checked(token)}")]
    url = str(outer.base_url.join(step.path))
    proof = key.proof(step.method, url, token=checked(token), request=step.sealed)
    return [("authorization", f"DPoP {token}"), (dpop.HEADER, proof)]


def outer_request(
    outer: httpx2.Client | httpx2.AsyncClient, step: Send, credentials: list[tuple[str, str]], extensions: Any
) -> httpx2.Request:
    """The request to the gateway, with the application's own timeouts."""
    headers = [*step.headers, ("accept-encoding", "identity"), *credentials]
    timeouts = {"timeout": extensions["timeout"]} if "timeout" in extensions else None
    request = outer.build_request(step.method, step.path, headers=headers, content=step.body or None, extensions=timeouts)
    # One that the gateway set would tie requests together that were made with different tokens.
    request.headers.pop("cookie", None)
    return request


def outer_of(response: httpx2.Response, token: str | None = None) -> Outer:
    """token: the one that was sent."""
    headers = response.headers
    return Outer(
        status=response.status_code,
        content_type=headers.get("content-type", ""),
        retry_after=_seconds(headers.get("retry-after")),
        audit=headers.get(audit.HEADER, ""),
        speaks_for={} if token is None else audit.speaks_for(token),
    )


def _seconds(retry_after: str | None) -> float | None:
    """`Retry-After` in its delta-seconds form, the one that our gateway sends (RFC 9110 section 10.2.3)."""
    return float(retry_after) if retry_after is not None and retry_after.isdecimal() and len(retry_after) < 7 else None
