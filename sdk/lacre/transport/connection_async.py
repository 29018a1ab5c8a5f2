"""The connection to the gateway: runs the steps of a call over httpx2, and reads the answer's body piece by piece.

Rules:
- Redirects are never followed, and the answer's bytes are not decoded.
- A connection belongs to the process that made it: a fork makes its own, and never touches its parent's
  (`lacre.runtime.forks`).
- A wire belongs to one call. The link is shared by the calls of a client.

`lacre.exchange.call` decides what to send; `lacre.transport.sealed` passes on the answers.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from functools import partial
from typing import Any

import httpx2

from lacre.errors import LacreError
from lacre.exchange.steps import Done, Offload, Outer, Read, Send, Step, Steps, T, Together, Wait
from lacre.jose.dpop import ProofKey
from lacre.runtime.forks import Home, PerLoop, Sockets
from lacre.transport.backend import async_offload, async_sleep
from lacre.transport.connection import READ_HERE, beside, credentials, opened, outer_of, outer_request, patience_of
from lacre.transport.dialled import Dialled
from lacre.transport.mapped_errors import mapped
from lacre.transport.oauth import AsyncToken
from lacre.transport.single_flight import AsyncSingleFlight
from lacre.transport.token_sources_async import AsyncBearer


class AsyncLink:
    """The state that the calls of a client share on the network."""

    def __init__(self, outer: PerLoop[httpx2.AsyncClient], token: AsyncToken, key: ProofKey | None) -> None:
        self.outer = outer
        self.sockets = Sockets()
        self.bearer = AsyncBearer(token, outer, key)
        self.flight = AsyncSingleFlight()

    async def aclose(self) -> None:
        for client in self.outer.made():
            await client.aclose()


class AsyncWire:
    """Runs the steps of one call; holds the last response, whose body is read step by step."""

    def __init__(self, link: AsyncLink, extensions: Any) -> None:
        self._link = link
        self._extensions = extensions
        self._home = Home()
        self._token: str | None = None
        self._response: httpx2.Response | None = None
        self._chunks: AsyncIterator[bytes] | None = None

    async def run(self, steps: Steps[T]) -> T:
        """Runs `steps`, and returns their result. The last response's body is still open then."""
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
        self._home.check(READ_HERE)
        match step:
            case Send():
                return await self._send(step)
            case Read():
                with mapped():
                    return await self.read()
            case Wait():
                await self.close()
                await async_sleep(step.seconds)
            case Offload():
                await async_offload(step.do)
            case Together():
                if not step.beside:
                    await self.close()
                patience = patience_of(self._extensions, step.endurance)
                await self._link.flight.run(step.wanted, partial(self._aside, step.do), patience)
            case _:
                self._token, refused = await self._link.bearer.token(self._token), self._token
                return self._token != refused
        return None

    async def _aside(self, steps: Callable[[], Steps[None]]) -> None:
        aside = AsyncWire(self._link, beside(self._extensions))
        await aside.run(steps())
        await aside.close()

    async def _send(self, step: Send) -> Outer:
        await self.close()
        outer, bearer = opened(self._link.outer.get()), self._link.bearer
        token = await bearer.token() if step.sealed or step.named else None
        request = outer_request(outer, step, credentials(outer, step, token, bearer.key), self._extensions)
        Dialled(self._link.sockets.trace).awatch(request)
        with mapped():
            self._response = await outer.send(request, stream=True, follow_redirects=False)
        self._token, self._chunks = token, self._response.aiter_raw()
        return outer_of(self._response, token)

    async def read(self) -> bytes | None:
        self._home.check(READ_HERE)
        return None if self._chunks is None else await anext(self._chunks, None)

    async def close(self) -> None:
        if self._response is not None and self._home:
            await self._response.aclose()
