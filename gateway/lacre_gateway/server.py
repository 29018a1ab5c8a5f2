"""Runs a gateway: binds, serves HTTP with uvicorn, connects to the fabric, and ends in order.

Rules:
- HTTP is served from the first moment, so that `readyz` can say what is missing; the fabric may come up later, and go and come.
- Rules are taken up while requests are served: on SIGHUP, and when their files change.
- On SIGTERM or SIGINT no new request is taken, streams under way have `listen.drain` seconds to finish, then they are aborted.
  Outcomes are on disk before the process ends.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging.config
import signal
import socket
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final

import structlog
import uvicorn
import uvloop
from fastapi import FastAPI

from lacre.errors import SettingsError
from lacre_fabric.keyfiles import read_ed25519
from lacre_fabric.logs import PROCESSORS, make_log
from lacre_fabric.nats_gateway import NatsGateway
from lacre_fabric.roles import Credential
from lacre_fabric.work import FabricUnavailable
from lacre_gateway.app import create_app
from lacre_gateway.logs import standard_logging
from lacre_gateway.policy.cedar import PolicyError
from lacre_gateway.settings import Listen, Settings
from lacre_gateway.state import Gateway, build

_BACKLOG: Final = 2048  # connections that the kernel holds while the process is busy
_KEEP_ALIVE: Final = 75  # seconds; longer than a client's own limit, so that it is the client who closes
_ABORT_LIMIT: Final = 5.0  # seconds for aborted requests to cancel their work and record their outcome
_FIRST_RETRY: Final = 0.25  # seconds, doubled with each failure
_LAST_RETRY: Final = 5.0


def serve(settings: Settings) -> None:
    """Until SIGTERM or SIGINT. Raises SettingsError where it cannot start: a port that is taken, a file that is missing."""
    logging.config.dictConfig(standard_logging("ext://sys.stderr"))
    # For the fabric's own loggers; the gateway's belongs to the app.
    structlog.configure(processors=list(PROCESSORS), logger_factory=structlog.PrintLoggerFactory(sys.stderr))
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(_run(settings))


def bind(listen: Listen) -> socket.socket:
    """The listening socket. Raises SettingsError."""
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            listen.host, listen.port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        listener = socket.socket(family, kind, protocol)
        try:
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            listener.bind(address)
            listener.listen(_BACKLOG)  # from here on connections wait in the kernel until they are served
        except BaseException:
            listener.close()
            raise
    except OSError as exc:
        raise SettingsError(
            f"listen: cannot listen on {listen.host} port {listen.port} ({exc.strerror}): free it, or name another"
        ) from exc
    listener.setblocking(False)
    return listener


class Server(uvicorn.Server):
    """uvicorn would raise a signal again at the end, before our own parts are closed: `_run` handles them instead."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield

    async def settle(self) -> None:
        """Waits for the requests that the end of `serve` aborted."""
        if self.server_state.tasks:
            await asyncio.wait(self.server_state.tasks, timeout=_ABORT_LIMIT)


def make_server(app: FastAPI, listen: Listen) -> Server:
    return Server(
        uvicorn.Config(
            app,
            http="httptools",
            ws="none",
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
        )
    )


@dataclass(slots=True)
class _Link:
    """The connection to the fabric, once there is one."""

    fabric: NatsGateway | None = None

    async def manifest(self) -> bytes | None:
        if self.fabric is None:
            raise FabricUnavailable("not connected to NATS yet")
        return await self.fabric.connection.manifest()

    async def close(self) -> None:
        if self.fabric is not None:
            await self.fabric.close()


async def _run(settings: Settings) -> None:
    key = read_ed25519(settings.signing_key)
    Credential.load(settings.nats.credentials)  # a file that is wrong now is said now
    link, log = _Link(), make_log(sys.stderr)
    with bind(settings.listen) as listener:
        gateway = build(settings, key, log, link.manifest)
        server = make_server(create_app(gateway), settings.listen)
        for number in (signal.SIGTERM, signal.SIGINT):
            asyncio.get_running_loop().add_signal_handler(number, server.handle_exit, number, None)
        gateway.authenticator.start()
        running = [asyncio.create_task(_keep_connected(gateway, link)), *_reloading(gateway)]
        log.info("listening", host=settings.listen.host, port=listener.getsockname()[1])
        try:
            await server.serve(sockets=[listener])
            await server.settle()
        finally:
            for task in running:
                task.cancel()
            await asyncio.gather(*running, return_exceptions=True)
            await gateway.feed.close()
            await link.close()
            await gateway.close()
            log.info("stopped")


def _reloading(gateway: Gateway) -> list[asyncio.Task[None]]:
    """Takes up changed rules: on SIGHUP, and by itself where the operator named a folder of rules."""
    hung_up = asyncio.Event()
    asyncio.get_running_loop().add_signal_handler(signal.SIGHUP, hung_up.set)

    async def on_signal() -> None:
        while await hung_up.wait():
            hung_up.clear()
            with contextlib.suppress(PolicyError):  # told by `reload`
                await gateway.reload()

    tasks = [asyncio.create_task(on_signal())]
    if gateway.settings.policies is not None:
        tasks.append(asyncio.create_task(gateway.rules.watch(gateway.audit.append)))
    return tasks


async def _keep_connected(gateway: Gateway, link: _Link) -> None:
    """A connection comes back by itself. One that NATS ended for good is made anew, with the credential that is there then."""
    while True:
        gateway.fabric = link.fabric = await _connect(gateway)
        gateway.log.info("fabric connected")
        await gateway.revocations.start(gateway.connected)
        await gateway.feed.start()
        await link.fabric.connection.wait_lost()
        gateway.log.warning("fabric lost")
        await link.fabric.close()


async def _connect(gateway: Gateway) -> NatsGateway:
    """Tries until it is connected."""
    nats, delay = gateway.settings.nats, _FIRST_RETRY
    while True:
        try:
            return await NatsGateway.connect(nats.url, Credential.load(nats.credentials), gateway.settings.gateway)
        except (FabricUnavailable, SettingsError) as exc:
            gateway.log.warning("fabric not connected", reason=str(exc), seconds=delay)
            await asyncio.sleep(delay)
            delay = min(2 * delay, _LAST_RETRY)
