"""Runs a gateway: serves HTTP with uvicorn, connects to the fabric, and ends properly.

Rules:
- HTTP is served from the start, so that `readyz` can say what is missing; the fabric may come later, and may go and come back.
- New rules are activated while requests are served: on SIGHUP, and when their files change. Certificates and CAs likewise: the
  gateway's own, those for NATS, of issuers and of the webhook, with its secret. Settings are read again on SIGHUP (see
  `admin.reloading`).
- On SIGTERM, SIGINT or an administrator's call, `readyz` says no at once. For `listen.drain_delay` seconds, new requests are
  still accepted; a second signal ends that.
- Then running streams have `listen.drain` seconds to finish, after which they are aborted. Their usage is settled, and outcomes
  are on disk, before the process ends.
"""

from __future__ import annotations

import asyncio
import contextlib
import gc
import logging.config
import os
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, Final

import structlog
import uvloop
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from lacre.errors import SettingsError
from lacre.runtime import tasks, watched_files
from lacre.runtime.watched_files import WatchedFiles
from lacre_fabric.keys.secret_files import read_ed25519s
from lacre_fabric.logs import PROCESSORS, Level, log_by
from lacre_fabric.nats import subjects
from lacre_fabric.nats.gateway import NatsGateway
from lacre_fabric.nats.kv import NatsBucket
from lacre_fabric.nats.roles import Credential
from lacre_fabric.work.contract import FabricUnavailable
from lacre_gateway.admin.listener import AdminListener
from lacre_gateway.admin.reloading import SettingsReload
from lacre_gateway.app import create_app
from lacre_gateway.audit.keeping import Keeper, LogTerms
from lacre_gateway.auth.jwks_remote import RemoteKeys
from lacre_gateway.gateway import Gateway, build
from lacre_gateway.http.certificate import Certificate, watched
from lacre_gateway.http.held_lines import LineLogger, held_stderr
from lacre_gateway.http.logs import standard_logging
from lacre_gateway.http.server import Server, allow_connections, bind, make_server
from lacre_gateway.policy.cedar import PolicyError
from lacre_gateway.settings import GatewaySettings

if TYPE_CHECKING:
    from lacre_gateway.console.console import OperatorsConsole

_FIRST_RETRY: Final = 0.25  # seconds, doubled with each failure
_LAST_RETRY: Final = 5.0
# New objects after which the collector looks for cycles among them. A request makes some hundreds, and hardly a cycle.
_COLLECT_AFTER: Final = 20_000
_GOES_ON: Final = tasks.Restart("unreadable files change nothing: the last good rules and certificates stay active")

_LOOKS_AGAIN: Final = tasks.Restart("each look at the queues is independent of the last one")
_KEEPS_ON: Final = tasks.Restart("what it rotates and erases is on the disk, and it can repeat both")


def serve(settings: GatewaySettings, read: Callable[[], GatewaySettings]) -> None:
    """Runs until SIGTERM or SIGINT. Raises SettingsError if it cannot start: a port is taken, a file is missing.

    read: the settings that are on the disk now, as this process uses them. Raises SettingsError.
    """
    level = Level(settings.log_level)
    with held_stderr() as lines, asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        logging.config.dictConfig(standard_logging("ext://sys.stderr"))
        # For the fabric's own loggers; the gateway's belongs to the app.
        structlog.configure(
            processors=[level, *PROCESSORS],
            wrapper_class=structlog.make_filtering_bound_logger(logging.INFO),  # above it, `level` decides
            logger_factory=structlog.PrintLoggerFactory(sys.stderr),
        )
        runner.run(tasks.run(_run(settings, read, level, lines)))


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


async def _run(settings: GatewaySettings, read: Callable[[], GatewaySettings], level: Level, lines: LineLogger) -> None:
    keys = WatchedFiles([settings.signing_key], partial(read_ed25519s, settings.signing_key))
    Credential.load(settings.nats.credentials)  # reports a wrong file at the start
    allow_connections(settings.listen.connections)
    link, log = _Link(), log_by(lines, level).bind(gateway=settings.instance)
    certificate = None if settings.listen.tls is None else watched(settings.listen.tls, log)
    context = None if certificate is None else lambda: certificate.value
    with ExitStack() as listeners:
        listener = listeners.enter_context(bind(settings.listen, shared=settings.shared))
        gateway = build(settings, keys.value[0], log, link.manifest, others=keys.value[1:])
        server = make_server(create_app(gateway), settings.listen, context)
        console = _console(gateway)
        admin = AdminListener(gateway, context, None if console is None else console.extend)
        gateway.doors["public"] = server.config.door
        parent = os.getppid() if settings.shared else None
        gateway.reloading = SettingsReload(gateway, admin, level, read, parent)
        gateway.authenticator.start()
        _on_signals(gateway, server)
        running = [
            tasks.start("drain", partial(_drained, gateway, server)),
            tasks.start("fabric", partial(_keep_connected, gateway, link)),
            tasks.start("queues", gateway.queues.watch, restart=_LOOKS_AGAIN),
            tasks.start("signing keys", partial(_keep_keys, gateway, keys), restart=_GOES_ON),
            tasks.start("audit logs", _keeper(gateway).run, restart=_KEEPS_ON),
            *reloading(gateway, partial(_watched, gateway, link, certificate)),
            *(() if console is None else console.start()),
        ]
        log.info("listening", host=listener.getsockname()[0], port=listener.getsockname()[1])
        admin.open()
        _settle_memory()
        try:
            await server.serve(sockets=[listener])
            await server.settle()
        finally:
            await admin.close()
            await tasks.together(*(each.close() for each in running))
            if console is not None:
                await console.close()
            await gateway.feed.close()
            await gateway.close()
            await link.close()
            log.info("stopped")


def _console(gateway: Gateway) -> OperatorsConsole | None:
    """A gateway without one loads nothing of it. Raises SettingsError."""
    if gateway.settings.console is None:
        return None
    try:
        from lacre_gateway.console.console import OperatorsConsole  # noqa: PLC0415 - only where the settings ask for it
    except ImportError as exc:
        raise SettingsError(f"[console] needs the package {exc.name}: install lacre[gateway]") from exc
    return OperatorsConsole(gateway)


def _settle_memory() -> None:
    """Objects that exist before serving stay until the process ends: the collector need not check them again."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(_COLLECT_AFTER)


def _on_signals(gateway: Gateway, server: Server) -> None:
    """The first SIGTERM or SIGINT begins the drain; a second one ends its delay."""

    def come() -> None:
        if gateway.draining:
            server.should_exit = True
        gateway.drain()

    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, come)


def _keeper(gateway: Gateway) -> Keeper:
    settings = gateway.settings
    terms = LogTerms(**settings.audit_logs.model_dump())
    return Keeper(settings.audit, gateway.audit, terms, log=gateway.log, clock=gateway.clock)


async def _keep_keys(gateway: Gateway, file: WatchedFiles[tuple[Ed25519PrivateKey, ...]]) -> None:
    """Signs with the key that the manifest names, also if its file came later than the manifest."""
    fault = ""
    while True:
        await asyncio.sleep(watched_files.EVERY)
        await asyncio.to_thread(file.look)
        if file.fault and file.fault != fault:
            gateway.log.error("signing key refused, the last good ones stay", reason=file.fault)
        fault, gateway.keys = file.fault, file.value
        if gateway.feed.ready:
            gateway.choose_key(gateway.feed.manifest)


async def _drained(gateway: Gateway, server: Server) -> None:
    await gateway.ending.wait()
    delay = gateway.settings.listen.drain_delay
    gateway.log.info("draining", seconds=delay)
    await asyncio.sleep(delay)
    server.should_exit = True
    await asyncio.Event().wait()  # until the process ends, which it does now


Files = Callable[[], Iterator[WatchedFiles[Any]]]


def reloading(gateway: Gateway, files: Files) -> list[tasks.Background]:
    """Activates changes: settings, rules and files such as certificates on SIGHUP. Files also by themselves, and rules if the
    settings name a folder of them.
    """
    hung_up = asyncio.Event()
    asyncio.get_running_loop().add_signal_handler(signal.SIGHUP, hung_up.set)

    async def on_signal() -> None:
        while await hung_up.wait():
            hung_up.clear()
            for each in files():
                await asyncio.to_thread(each.refresh)
            if gateway.reloading is not None:
                with contextlib.suppress(SettingsError):  # `reload` reports it, and likewise below
                    await gateway.reloading.reload()
            with contextlib.suppress(PolicyError):
                await gateway.reload()

    running = [
        tasks.start("reload", on_signal, restart=_GOES_ON),
        tasks.start("certificates", partial(watched_files.watch, files), restart=_GOES_ON),
    ]
    if gateway.settings.policies is not None:
        running.append(tasks.start("rules", partial(gateway.rules.watch, gateway.audit.append), restart=_GOES_ON))
    return running


def _watched(gateway: Gateway, link: _Link, own: Certificate | None) -> Iterator[WatchedFiles[Any]]:
    """The files of certificates, CAs and the webhook's secret that are in use now."""
    if own is not None:
        yield own
    if link.fabric is not None:
        yield link.fabric.connection.trust
    for issuer in gateway.authenticator.issuers:
        if isinstance(issuer.keys, RemoteKeys) and issuer.keys.trust is not None:
            yield issuer.keys.trust
    if gateway.webhook is not None:
        yield from gateway.webhook.files


async def _keep_connected(gateway: Gateway, link: _Link) -> None:
    """A connection comes back by itself. If NATS ended it for good, makes a new one with the credential that is there then."""
    while True:
        gateway.fabric = link.fabric = await _connect(gateway)
        gateway.budgets.bucket = NatsBucket(link.fabric.connection, subjects.BUDGETS_BUCKET)
        gateway.budgets.start()
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
            credential = Credential.load(nats.credentials)
            return await NatsGateway.connect(nats.servers, credential, gateway.settings.instance, nats.region)
        except (FabricUnavailable, SettingsError) as exc:
            gateway.log.warning("fabric not connected", reason=str(exc), seconds=delay)
            await asyncio.sleep(delay)
            delay = min(2 * delay, _LAST_RETRY)
