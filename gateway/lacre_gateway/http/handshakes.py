"""Accepts connections for TLS. A connection counts from the moment it is accepted, not from the end of its handshake.

A server of asyncio or uvloop does not report running handshakes: it limits their time, but not their number.

Rules:
- A handshake is a connection without a request: it takes a place in total and of its address, and the `Door` may cut it.
- A failure before the end of a handshake is the peer's affair, and is not logged.
- No error of `accept` ends the listener. If the process has no room for another connection, it tries again a little later.
"""

from __future__ import annotations

import asyncio
import contextlib
import socket
import ssl
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

from lacre.runtime import tasks
from lacre.runtime.listening import Door

AT_ONCE: Final = 64  # connections accepted in one turn of the loop, so that other work has its turn too
RETRY: Final = 0.5  # seconds after a failure to accept, such as too many open files


@dataclass(frozen=True, slots=True)
class Terms:
    """The terms of one listener. context: returns the one for a new connection. seconds: for a handshake.

    serve: makes the protocol of a connection, which calls `Handshake.leave` when it takes the place of the handshake.
    """

    door: Door
    context: Callable[[], ssl.SSLContext]
    seconds: float
    serve: Callable[[Handshake], asyncio.Protocol]


class Handshake:
    """One connection before its handshake has ended. address: the peer's."""

    def __init__(self, peer: socket.socket, address: str, terms: Terms) -> None:
        self._peer = peer
        self._address = address
        self._terms = terms
        self._begun = False
        self._task = tasks.detach("TLS handshake", self._shake())
        self._task.add_done_callback(self._ended)
        terms.door.enter(self, address)

    async def _shake(self) -> None:
        terms = self._terms
        self._begun = True  # from here on the loop owns the socket, and closes it
        with contextlib.suppress(OSError):  # ssl.SSLError is one, and so is a handshake that takes too long
            await asyncio.get_running_loop().connect_accepted_socket(
                lambda: terms.serve(self), self._peer, ssl=terms.context(), ssl_handshake_timeout=terms.seconds
            )

    def cut(self) -> None:
        """Makes room for another."""
        self.leave()
        self._task.cancel()

    def leave(self) -> None:
        """It no longer takes a place. Idempotent."""
        self._terms.door.leave(self, self._address)

    def _ended(self, _task: object) -> None:
        self.leave()
        if not self._begun:
            self._peer.close()


class TlsListener:
    """Takes the place of an `asyncio.Server`. listener: already listens, and does not block."""

    def __init__(self, listener: socket.socket, terms: Terms) -> None:
        self._loop = asyncio.get_running_loop()
        self._listener = listener
        self._terms = terms
        self._later: asyncio.TimerHandle | None = None
        self._watch()

    def _watch(self) -> None:
        self._later = None
        self._loop.add_reader(self._listener, self._accept)

    def _accept(self) -> None:
        for _ in range(AT_ONCE):
            try:
                peer, address = self._listener.accept()
            except (BlockingIOError, InterruptedError, ConnectionAbortedError):
                return
            except OSError:
                self._loop.remove_reader(self._listener)
                self._later = self._loop.call_later(RETRY, self._watch)
                return
            peer.setblocking(False)
            Handshake(peer, address[0], self._terms)

    def close(self) -> None:
        """Accepts no more connections."""
        self._loop.remove_reader(self._listener)
        if self._later is not None:
            self._later.cancel()

    async def wait_closed(self) -> None:
        """Nothing to wait for: connections belong to the server's own state."""
