# Generated from connection_async.py by tools/unasync.py: do not edit.
"""The connection to the gateway: runs the steps of a call over httpx2, and reads the answer's body piece by piece.

Rules:
- Redirects are never followed, and the answer's bytes are not decoded.
- A connection belongs to the process that made it: a fork makes its own, and never touches its parent's
  (`lacre.runtime.forks`).
- A wire belongs to one call. The link is shared by the calls of a client.

`lacre.exchange.call` decides what to send; `lacre.transport.sealed` passes on the answers.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import httpx2

from lacre.errors import LacreError
from lacre.exchange.steps import Done, Offload, Outer, Read, Send, Step, Steps, T, Together, Wait
from lacre.jose.dpop import ProofKey
from lacre.runtime.forks import Home, PerProcess, Sockets
from lacre.transport.backend import offload, sleep
from lacre.transport.connection import READ_HERE, beside, credentials, opened, outer_of, outer_request, patience_of
from lacre.transport.dialled import Dialled
from lacre.transport.mapped_errors import mapped
from lacre.transport.oauth import Token
from lacre.transport.single_flight import SingleFlight
from lacre.transport.token_sources_sync import Bearer


class Link:
    """The state that the calls of a client share on the network."""

    def __init__(self, outer: PerProcess[httpx2.Client], token: Token, key: ProofKey | None) -> None:
        self.outer = outer
        self.sockets = Sockets()
        self.bearer = Bearer(token, outer, key)
        self.flight = SingleFlight()

    def close(self) -> None:
        for client in self.outer.made():
            client.close()


class Wire:
    """Runs the steps of one call; holds the last response, whose body is read step by step."""

    def __init__(self, link: Link, extensions: Any) -> None:
        self._link = link
        self._extensions = extensions
        self._home = Home()
        self._token: str | None = None
        self._response: httpx2.Response | None = None
        self._chunks: Iterator[bytes] | None = None

    def run(self, steps: Steps[T]) -> T:
        """Runs `steps`, and returns their result. The last response's body is still open then."""
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
        self._home.check(READ_HERE)
        match step:
            case Send():
                return self._send(step)
            case Read():
                with mapped():
                    return self.read()
            case Wait():
                self.close()
                sleep(step.seconds)
            case Offload():
                offload(step.do)
            case Together():
                if not step.beside:
                    self.close()
                patience = patience_of(self._extensions, step.endurance)
                self._link.flight.run(step.wanted, partial(self._aside, step.do), patience)
            case _:
                self._token, refused = self._link.bearer.token(self._token), self._token
                return self._token != refused
        return None

    def _aside(self, steps: Callable[[], Steps[None]]) -> None:
        aside = Wire(self._link, beside(self._extensions))
        aside.run(steps())
        aside.close()

    def _send(self, step: Send) -> Outer:
        self.close()
        outer, bearer = opened(self._link.outer.get()), self._link.bearer
        token = bearer.token() if step.sealed or step.named else None
        request = outer_request(outer, step, credentials(outer, step, token, bearer.key), self._extensions)
        Dialled(self._link.sockets.trace).watch(request)
        with mapped():
            self._response = outer.send(request, stream=True, follow_redirects=False)
        self._token, self._chunks = token, self._response.iter_raw()
        return outer_of(self._response, token)

    def read(self) -> bytes | None:
        self._home.check(READ_HERE)
        return None if self._chunks is None else next(self._chunks, None)

    def close(self) -> None:
        if self._response is not None and self._home:
            self._response.close()
