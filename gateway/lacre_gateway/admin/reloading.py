"""Replaces settings while the gateway serves: issuers, limits, models, tracing, the admin listener, and the level of the log.

Rules:
- Everything is read, checked and prepared before anything is replaced: key sets are read or fetched, ports are bound. If any of
  it fails, all of it is undone, and the last good settings stay.
- All of it takes over in one step between two requests. A request that runs keeps what it began with.
- Settings that need a restart stay as they are. They are named in the answer and in the log.
"""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import Callable, Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass
from typing import Final

from lacre.errors import SettingsError
from lacre.runtime import tasks
from lacre_fabric.logs import Level
from lacre_gateway.admin.listener import AdminListener
from lacre_gateway.audit.entries import SETTINGS_REFUSED, SETTINGS_RELOADED, Event
from lacre_gateway.auth.issuers import prepared
from lacre_gateway.auth.tokens import TrustedIssuer
from lacre_gateway.gateway import Changes, Gateway
from lacre_gateway.observe.tracing import Tracer
from lacre_gateway.settings import GatewaySettings

RELOADABLE: Final = ("issuers", "limits", "models", "tracing", "admin", "log_level")
# Of the limits. Leases of budgets are made for streams of this length.
_STAYS: Final = "longest_stream"
MAX_REASON: Final = 256  # characters of a refusal in the audit log


@dataclass(frozen=True, slots=True)
class _Coming:
    """New settings, and the parts that were prepared for them. admin: makes its listener take over."""

    settings: GatewaySettings
    changes: Changes
    issuers: Sequence[TrustedIssuer]
    tracer: Tracer | None
    admin: Callable[[], None]


class SettingsReload:
    """read: the settings file, as this process uses it. Raises SettingsError. parent: the process that started several ones."""

    def __init__(
        self, gateway: Gateway, admin: AdminListener, level: Level, read: Callable[[], GatewaySettings], parent: int | None
    ) -> None:
        self._gateway = gateway
        self._admin = admin
        self._level = level
        self._read = read
        self._parent = parent
        self._reloading = asyncio.Lock()
        self.restart: tuple[str, ...] = ()
        self.refused = ""

    async def reload(self, actor: str | None = None) -> Changes:
        """Activates the settings that are on the disk. actor: `<tenant>/<subject>` of the caller; None: a signal.

        If an actor asks one of several processes, the others are told as well. Raises SettingsError, and then all stays.
        """
        async with self._reloading:
            try:
                changes = await self._reload()
            except SettingsError as exc:
                self._refuse(str(exc), actor)
                raise
        self._tell(changes, actor)
        if actor is not None and self._parent is not None and os.getppid() == self._parent:
            os.kill(self._parent, signal.SIGHUP)  # it passes that on to all, and to this one again
        return changes

    async def _reload(self) -> Changes:
        fresh = await asyncio.to_thread(self._read)
        async with AsyncExitStack() as undo:
            coming = await self._prepare(fresh, undo)
            undo.pop_all()
        self._take(coming)
        return coming.changes

    async def _prepare(self, fresh: GatewaySettings, undo: AsyncExitStack) -> _Coming:
        """undo: gets what must be closed if the settings are not taken. Raises SettingsError."""
        gateway, now = self._gateway, self._gateway.settings
        effective = effective_of(now, fresh)
        issuers = await prepared(effective.issuers, now.issuers, gateway.authenticator.issuers, gateway.log, undo)
        tracer = gateway.tracer
        if effective.tracing != now.tracing:
            tracer = None if effective.tracing is None else Tracer(effective.tracing, effective.instance)
            if tracer is not None:
                undo.push_async_callback(tracer.close)
        admin = await self._admin.prepare(effective, undo)
        changed = [name for name in RELOADABLE if getattr(effective, name) != getattr(now, name)]
        if "issuers" not in changed and tuple(issuers) != gateway.authenticator.issuers:
            changed.append("issuers")  # the content of a key set
        return _Coming(effective, Changes(tuple(changed), need_restart(now, fresh)), issuers, tracer, admin)

    def _take(self, coming: _Coming) -> None:
        """Without a wait: no request sees one part of it."""
        gateway, settings = self._gateway, coming.settings
        old, gateway.tracer = gateway.tracer, coming.tracer
        gateway.settings = settings
        gateway.apply(settings.limits)
        self._level.set(settings.log_level)
        gateway.authenticator.replace(coming.issuers)
        if old is not None and old is not coming.tracer:
            tasks.detach("old tracer", old.close())
        coming.admin()
        self.restart, self.refused = coming.changes.restart, ""

    def _tell(self, changes: Changes, actor: str | None) -> None:
        gateway, changed = self._gateway, " ".join(changes.changed)
        gateway.log.info("settings reloaded", reason=changed or "nothing changed")
        if changes.restart:
            remedy = "restart the gateway for these settings"
            gateway.log.warning("settings need a restart", reason=" ".join(changes.restart), remedy=remedy)
        if changed or actor is not None:
            event = Event(time=round(gateway.clock(), 3), event=SETTINGS_RELOADED, actor=actor, target=changed or None)
            gateway.audit.append(event)

    def _refuse(self, reason: str, actor: str | None) -> None:
        gateway = self._gateway
        self.refused = reason
        gateway.log.error("settings refused, the last good ones stay", reason=reason)
        event = SETTINGS_REFUSED
        gateway.audit.append(Event(time=round(gateway.clock(), 3), event=event, actor=actor, reason=reason[:MAX_REASON]))


def effective_of(now: GatewaySettings, fresh: GatewaySettings) -> GatewaySettings:
    """The present settings with all that can be replaced from the new ones. Raises SettingsError if that does not fit.

    For example, the new admin listener may need the TLS that only a restart begins.
    """
    parts = {name: getattr(fresh, name) for name in RELOADABLE}
    parts["limits"] = fresh.limits.model_copy(update={_STAYS: getattr(now.limits, _STAYS)})
    return now.model_copy(update=parts).checked()


def need_restart(now: GatewaySettings, fresh: GatewaySettings) -> tuple[str, ...]:
    """The keys that differ and cannot be replaced in a running process."""
    names = [name for name in type(now).model_fields if name not in RELOADABLE and getattr(now, name) != getattr(fresh, name)]
    if getattr(now.limits, _STAYS) != getattr(fresh.limits, _STAYS):
        names.append(f"limits.{_STAYS}")
    return tuple(names)
