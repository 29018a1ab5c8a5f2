"""The connection to the gateway: does the steps of a call over httpx2, and reads the answer's body piece by piece.

Rules:
- Redirects are never followed, and the answer's bytes are read as they came.
- A connection belongs to the process that made it: a fork makes its own, and never touches its parent's
  (`lacre.runtime.forks`).
- A `Wire` belongs to one call. What the calls of a client share is in its `Link`.

`lacre.exchange.call` decides what to send; `lacre.transport.sealed` hands on what comes.
"""

from __future__ import annotations

import re
import time
from collections.abc import AsyncIterator, Callable, Iterator
from functools import partial
from typing import Any, Final, TypeVar

import httpx2

from lacre.errors import LacreError, UsageError
from lacre.evidence import audit_proof
from lacre.exchange.steps import Done, Offload, Outer, Read, Send, Step, Steps, T, Together, Wait
from lacre.jose import dpop
from lacre.jose.dpop import ProofKey
from lacre.runtime.forks import Home, PerLoop, PerProcess, Sockets
from lacre.transport.mapped_errors import mapped
from lacre.transport.network_causes import Dialled
from lacre.transport.oauth import AsyncToken, Token, checked
from lacre.transport.single_flight import AsyncSingleFlight, SingleFlight
from lacre.transport.token_sources import AsyncBearer, Bearer

POOL_BESIDE: Final = 2.0  # seconds for a free connection beside the one that a call holds: enough for a short request to end
_REQUEST_ID: Final = re.compile(r"[0-9A-Za-z-]{1,64}")  # ours has 32 hexadecimal digits
Outside = TypeVar("Outside", httpx2.Client, httpx2.AsyncClient)
_READ_HERE: Final = "this answer is read"


class Link:
    """What the calls of a sync client share on the network."""

    def __init__(self, outer: PerProcess[httpx2.Client], token: Token, key: ProofKey | None) -> None:
        self.outer = outer
        self.sockets = Sockets()
        self.bearer = Bearer(token, outer, key)
        self.flight = SingleFlight()

    def close(self) -> None:
        for client in self.outer.made():
            client.close()


class AsyncLink:
    """The async twin of `Link`."""

    def __init__(self, outer: PerLoop[httpx2.AsyncClient], token: AsyncToken, key: ProofKey | None) -> None:
        self.outer = outer
        self.sockets = Sockets()
        self.bearer = AsyncBearer(token, outer, key)
        self.flight = AsyncSingleFlight()

    async def aclose(self) -> None:
        for client in self.outer.made():
            await client.aclose()


class Wire:
    """Does the steps of one call; holds the last response, whose body is read step by step."""

    def __init__(self, link: Link, extensions: Any) -> None:
        self._link = link
        self._extensions = extensions
        self._home = Home()
        self._token: str | None = None
        self._response: httpx2.Response | None = None
        self._chunks: Iterator[bytes] = iter(())

    def run(self, steps: Steps[T]) -> T:
        """Does what `steps` asks, and returns their result. The last response's body is still open then."""
        try:
            step = next(steps)
            while True:
                try:
                    done = self.do(step)
                except LacreError as exc:
                    step = steps.throw(exc)
                else:
                    step = steps.send(done)
        except StopIteration as finished:
            result: T = finished.value
            return result
        except BaseException:
            self.close()
            raise

    def do(self, step: Step) -> Done:
        self._home.check(_READ_HERE)
        match step:
            case Send():
                return self._send(step)
            case Read():
                with mapped():
                    return self.read()
            case Wait():
                self.close()
                time.sleep(step.seconds)
            case Offload():
                step.do()
            case Together():
                if not step.beside:
                    self.close()
                patience = _patience(self._extensions, step.endurance)
                self._link.flight.run(step.wanted, partial(self._aside, step.do), patience)
            case _:
                self._token, refused = self._link.bearer.token(self._token), self._token
                return self._token != refused
        return None

    def _aside(self, steps: Callable[[], Steps[None]]) -> None:
        aside = Wire(self._link, _beside(self._extensions))
        aside.run(steps())
        aside.close()

    def _send(self, step: Send) -> Outer:
        self.close()
        outer, bearer = _opened(self._link.outer.get()), self._link.bearer
        token = bearer.token() if step.sealed else None
        request = outer_request(outer, step, credentials(outer, step, token, bearer.key), self._extensions)
        Dialled(self._link.sockets.trace).watch(request)
        with mapped():
            self._response = outer.send(request, stream=True, follow_redirects=False)
        self._token, self._chunks = token, self._response.iter_raw()
        return outer_of(self._response, token)

    def read(self) -> bytes | None:
        self._home.check(_READ_HERE)
        return next(self._chunks, None)

    def close(self) -> None:
        if self._response is not None and self._home:
            self._response.close()


class AsyncWire:
    """The async twin of `Wire`."""

    def __init__(self, link: AsyncLink, extensions: Any) -> None:
        self._link = link
        self._extensions = extensions
        self._home = Home()
        self._token: str | None = None
        self._response: httpx2.Response | None = None
        self._chunks: AsyncIterator[bytes] | None = None

    async def run(self, steps: Steps[T]) -> T:
        try:
            step = next(steps)
            while True:
                try:
                    done = await self.do(step)
                except LacreError as exc:
                    step = steps.throw(exc)
                else:
                    step = steps.send(done)
        except StopIteration as finished:
            result: T = finished.value
            return result
        except BaseException:
            await self.close()
            raise

    async def do(self, step: Step) -> Done:
        self._home.check(_READ_HERE)
        match step:
            case Send():
                return await self._send(step)
            case Read():
                with mapped():
                    return await self.read()
            case Wait():
                await self.close()
                await _sleep(step.seconds)
            case Offload():
                await _in_thread(step.do)
            case Together():
                if not step.beside:
                    await self.close()
                patience = _patience(self._extensions, step.endurance)
                await self._link.flight.run(step.wanted, partial(self._aside, step.do), patience)
            case _:
                self._token, refused = await self._link.bearer.token(self._token), self._token
                return self._token != refused
        return None

    async def _aside(self, steps: Callable[[], Steps[None]]) -> None:
        aside = AsyncWire(self._link, _beside(self._extensions))
        await aside.run(steps())
        await aside.close()

    async def _send(self, step: Send) -> Outer:
        await self.close()
        outer, bearer = _opened(self._link.outer.get()), self._link.bearer
        token = await bearer.token() if step.sealed else None
        request = outer_request(outer, step, credentials(outer, step, token, bearer.key), self._extensions)
        Dialled(self._link.sockets.trace).awatch(request)
        with mapped():
            self._response = await outer.send(request, stream=True, follow_redirects=False)
        self._token, self._chunks = token, self._response.aiter_raw()
        return outer_of(self._response, token)

    async def read(self) -> bytes | None:
        self._home.check(_READ_HERE)
        return None if self._chunks is None else await anext(self._chunks, None)

    async def close(self) -> None:
        if self._response is not None and self._home:
            await self._response.aclose()


async def _in_thread(work: Callable[[], None]) -> None:
    from anyio import to_thread  # noqa: PLC0415 - what `import lacre` need not wait for

    await to_thread.run_sync(work)


async def _sleep(seconds: float) -> None:
    from anyio import sleep  # noqa: PLC0415 - what `import lacre` need not wait for

    await sleep(seconds)


def _patience(extensions: Any, endurance: float) -> float | None:
    """Seconds that a call waits for what another one fetches: what its own time limits and tries would allow it."""
    limits = extensions.get("timeout", {})
    allowed = [limits.get(name) for name in ("pool", "connect", "read")]
    return None if None in allowed else endurance + sum(allowed)


def _beside(extensions: Any) -> dict[str, Any]:
    """The time limits, but that of waiting for a free connection: this call itself may hold the only one."""
    limits = extensions.get("timeout", {})
    pool = limits.get("pool")
    return {"timeout": {**limits, "pool": POOL_BESIDE if pool is None else min(pool, POOL_BESIDE)}}


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


def _opened(outer: Outside) -> Outside:
    """A call may begin, or go on, after another thread or task has closed the client. Raises UsageError."""
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
    """token: the one that was sent."""
    headers = response.headers
    return Outer(
        status=response.status_code,
        content_type=headers.get("content-type", ""),
        retry_after=_seconds(headers.get("retry-after")),
        audit=headers.get(audit_proof.HEADER, ""),
        speaks_for={} if token is None else audit_proof.speaks_for(token),
        request_id=_request_id(headers.get("lacre-request-id")),
        token_expires=None if token is None else audit_proof.expires(token),
    )


def _request_id(told: str | None) -> str | None:
    return told if told is not None and _REQUEST_ID.fullmatch(told) else None


def _seconds(retry_after: str | None) -> float | None:
    """`Retry-After` in its delta-seconds form, the one that our gateway sends (RFC 9110 section 10.2.3)."""
    return float(retry_after) if retry_after is not None and retry_after.isdecimal() and len(retry_after) < 7 else None
