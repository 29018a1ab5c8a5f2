"""Sockets of the gateway's listeners. `lacre.runtime.listening` bounds what an unknown client may send."""

from __future__ import annotations

import asyncio
import contextlib
import resource
import socket
import ssl
from collections.abc import Callable, Iterator
from typing import Final, cast

import uvicorn
from starlette.types import ASGIApp

from lacre.errors import SettingsError
from lacre.runtime.listening import BoundedConfig, Door
from lacre_gateway.http.connection import GatewayConnection, SealedRoute
from lacre_gateway.http.handshakes import Handshake, Terms, TlsListener
from lacre_gateway.settings import Listen

_BACKLOG: Final = 2048  # connections that the kernel holds while the process is busy
_BEGINS: Final = 4  # turns of the loop in which an accepted connection begins
_KEEP_ALIVE: Final = 75  # seconds; longer than a client's own limit, so that the client closes first
_ABORT_LIMIT: Final = 5.0  # seconds for aborted requests to cancel their work and record their outcome
OTHER_FILES: Final = 512  # descriptors for everything except callers' connections


def bind(listen: Listen, *, shared: bool = False, place: str = "listen") -> socket.socket:
    """The listening socket. shared: others listen on the same port. place: the table in the settings. Raises SettingsError."""
    listener = reserve(listen, shared=shared, place=place)
    listener.listen(_BACKLOG)  # from here on connections wait in the kernel until they are served
    listener.setblocking(False)
    return listener


def reserve(listen: Listen, *, shared: bool = False, place: str = "listen") -> socket.socket:
    """A socket that holds the address and does not listen. Raises SettingsError."""
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            listen.host, listen.port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        listener = socket.socket(family, kind, protocol)
        try:
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            if shared:
                share(listener)
            listener.bind(address)
        except BaseException:
            listener.close()
            raise
    except OSError as exc:
        raise SettingsError(
            f"{place}: cannot listen on {listen.host} port {listen.port} ({exc.strerror}): free it, or choose another port"
        ) from exc
    return listener


def share(listener: socket.socket, *, shared: bool = True) -> None:
    """Lets other sockets of this user have the same port, if they are shared too."""
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, shared)


def allow_connections(count: int) -> None:
    """Raises this process's limit of open files as far as this many connections need and the system allows."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = count + OTHER_FILES
    if soft != resource.RLIM_INFINITY and soft < wanted:
        allowed = wanted if hard == resource.RLIM_INFINITY else min(wanted, hard)
        resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, allowed), hard))


def room_for(count: int) -> int:
    """How many connections this process can hold, at most `count`: with more, `accept` would fail for every caller."""
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return count if soft == resource.RLIM_INFINITY else max(1, min(count, soft - OTHER_FILES))


class Config(BoundedConfig):
    """uvicorn's settings for one listener. sealed: what serves the sealed requests of the app: its attribute of this name."""

    def __init__(self, app: ASGIApp, listen: Listen, context: Callable[[], ssl.SSLContext] | None) -> None:
        self.context = context
        self.sealed: SealedRoute | None = getattr(app, "sealed", None)
        door = Door(
            head_timeout=listen.header_timeout,
            connections=room_for(listen.connections),
            per_address=listen.connections_per_address,
            held=listen.held_bytes,
            free=listen.trusted_proxies,
            encoded_slashes=False,
        )
        super().__init__(
            app,
            door,
            protocol=GatewayConnection,
            lifespan="off",
            loop="none",
            log_config=None,
            access_log=False,
            server_header=False,
            proxy_headers=bool(listen.trusted_proxies),
            forwarded_allow_ips=list(listen.trusted_proxies),
            timeout_graceful_shutdown=listen.drain,
            timeout_keep_alive=_KEEP_ALIVE,
            backlog=_BACKLOG,
            ssl_context_factory=None if context is None else lambda _config, _default: context(),
        )


class Server(uvicorn.Server):
    """uvicorn would raise a signal again at the end, before our own parts are closed. The caller handles signals instead."""

    config: Config

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """As uvicorn does, but for listening sockets; a TLS handshake has as much time as a head, and not a minute."""
        config, loop, context = self.config, asyncio.get_running_loop(), self.config.context
        self.servers = []
        for each in sockets or ():
            if context is None:
                self.servers.append(await loop.create_server(self.connection, sock=each, backlog=config.backlog))
            else:
                listener = TlsListener(each, Terms(config.door, context, config.door.head_timeout, self.connection))
                self.servers.append(cast("asyncio.Server", listener))
        self.started = True

    def connection(self, handshake: Handshake | None = None) -> GatewayConnection:
        """For a new connection. handshake: the one whose place it takes."""
        made = GatewayConnection(self.config, self.server_state, {}, asyncio.get_running_loop())
        made.handshake, made.sealed = handshake, self.config.sealed
        return made

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Stops accepting, and lets what was just accepted begin: asyncio would leave it open, half made."""
        for each in sockets or ():
            asyncio.get_running_loop().remove_reader(each)
        for _ in range(_BEGINS):
            await asyncio.sleep(0)
        await super().shutdown(sockets)

    async def _wait_tasks_to_complete(self) -> None:
        """Uvicorn asks the connections that it knows to end, and then waits. One that was accepted in that turn is known only
        now: nobody would ask it, and the drain would last its whole time.
        """
        for connection in list(self.server_state.connections):
            connection.shutdown()
        await super()._wait_tasks_to_complete()

    async def settle(self) -> None:
        """Waits for the requests that the end of `serve` aborted."""
        if self.server_state.tasks:
            await asyncio.wait(self.server_state.tasks, timeout=_ABORT_LIMIT)


def make_server(app: ASGIApp, listen: Listen, context: Callable[[], ssl.SSLContext] | None = None) -> Server:
    """context: returns the one for a new connection. None serves plain HTTP."""
    return Server(Config(app, listen, context))
