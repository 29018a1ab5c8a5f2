"""The listener of the admin API. It may move, begin or end while the gateway serves.

If only its host changes, the old socket and the new one have the same port for a moment: an address such as `0.0.0.0` includes
the other one. Both are shared for that moment alone, so no other process can take the port by accident.
"""

from __future__ import annotations

import asyncio
import socket
import ssl
from collections.abc import Callable
from contextlib import AsyncExitStack
from dataclasses import dataclass
from functools import partial
from typing import Final

from fastapi import FastAPI

from lacre.errors import SettingsError
from lacre.runtime import tasks
from lacre_gateway.admin.api import create_admin
from lacre_gateway.gateway import Gateway
from lacre_gateway.http.server import Server, bind, make_server, share
from lacre_gateway.settings import GatewaySettings, Listen

PAST_DRAIN: Final = 2.0  # seconds: the time that a server needs to end after its drain
# Seconds to wait for a port: when ports of several processes move by one, each waits for the one before.
_BOUND_WITHIN: Final = 3.0
_AGAIN: Final = 0.1
_PLACE: Final = "admin"

Context = Callable[[], ssl.SSLContext]


@dataclass(slots=True)
class _Running:
    server: Server
    background: tasks.Background
    at: socket.socket


class AdminListener:
    """context: the gateway's own certificate, for addresses that are not on loopback. extend: adds routes to its app."""

    def __init__(self, gateway: Gateway, context: Context | None, extend: Callable[[FastAPI], None] | None = None) -> None:
        self._gateway = gateway
        self._context = context
        self._extend = extend
        self._app: FastAPI | None = None
        self._running: _Running | None = None

    def open(self) -> None:
        """Begins to serve, if the settings say so. Raises SettingsError."""
        listen = listen_of(self._gateway.settings)
        if listen is not None:
            self._begin(listen, bind(listen, place=_PLACE), encrypted=not _loopback(self._gateway.settings))

    async def prepare(self, settings: GatewaySettings, undo: AsyncExitStack) -> Callable[[], None]:
        """Binds what the new settings need. Returns what makes it take over, at once. Raises SettingsError."""
        listen, now = listen_of(settings), listen_of(self._gateway.settings)
        if settings.admin == self._gateway.settings.admin:
            return lambda: None
        if listen is None:
            return self._end
        if now is not None and (now.host, now.port) == (listen.host, listen.port):
            return lambda: None
        at = await _bound(listen, None if now is None or now.port != listen.port else self._running)
        undo.callback(at.close)
        return partial(self._move, listen, at, encrypted=not _loopback(settings))

    def _move(self, listen: Listen, at: socket.socket, *, encrypted: bool) -> None:
        self._end()
        self._begin(listen, at, encrypted=encrypted)

    def _begin(self, listen: Listen, at: socket.socket, *, encrypted: bool) -> None:
        gateway = self._gateway
        if self._app is None:
            self._app = create_admin(gateway)
            if self._extend is not None:
                self._extend(self._app)
        server = make_server(self._app, listen, self._context if encrypted else None)
        gateway.doors["admin"] = server.config.door
        self._running = _Running(server, tasks.start("admin API", partial(server.serve, sockets=[at])), at)
        gateway.log.info("listening", host=at.getsockname()[0], port=at.getsockname()[1])

    def _end(self) -> None:
        """The port is free at once, and running calls have the time of a drain: one of them may be the call that asked."""
        if (old := self._running) is None:
            return
        self._running = None
        self._gateway.doors.pop("admin", None)
        tasks.detach("old admin API", self._ended(old))

    async def _ended(self, old: _Running) -> None:
        old.server.should_exit = True
        try:
            await old.background.close(patience=self._gateway.settings.listen.drain + PAST_DRAIN)
        finally:
            old.at.close()

    async def close(self) -> None:
        if self._running is not None:
            await self._ended(self._running)
            self._running = None


def listen_of(settings: GatewaySettings) -> Listen | None:
    """Where the admin API is served; None: nowhere."""
    if settings.admin is None:
        return None
    return settings.listen.model_copy(update={"host": settings.admin.host, "port": settings.admin.port})


def _loopback(settings: GatewaySettings) -> bool:
    return settings.admin is None or settings.admin.loopback


async def _bound(listen: Listen, old: _Running | None) -> socket.socket:
    """old: the listener that has the same port on another host. Raises SettingsError."""
    if old is not None:
        share(old.at)
        try:
            at = bind(listen, shared=True, place=_PLACE)
        finally:
            share(old.at, shared=False)
        share(at, shared=False)
        return at
    deadline = asyncio.get_running_loop().time() + _BOUND_WITHIN
    while True:
        try:
            return bind(listen, place=_PLACE)
        except SettingsError:
            if asyncio.get_running_loop().time() >= deadline:
                raise
            await asyncio.sleep(_AGAIN)
