"""The console of a running gateway: its routes, its files and its background work."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from pathlib import Path
from typing import Final

from fastapi import FastAPI

from lacre.errors import SettingsError
from lacre.runtime import tasks
from lacre_gateway.console import calls, doors, pages, record_pages, tenant_pages
from lacre_gateway.console.key_views import KeyViews
from lacre_gateway.console.minutes import MinuteStore
from lacre_gateway.console.policy_views import PolicyViews
from lacre_gateway.console.request_index import RequestIndex
from lacre_gateway.console.request_views import RequestViews
from lacre_gateway.console.sampling import GatewaySampler
from lacre_gateway.console.site import ConsoleSite
from lacre_gateway.console.views import BudgetBurn, Views
from lacre_gateway.gateway import Gateway

FOLDER: Final = "console"  # beside the audit log, with its name before it
_LOOKS_AGAIN: Final = tasks.Restart("each look is independent of the last one")
_READS_ON: Final = tasks.Restart("the index remembers its place in the log, and can be made again")


class OperatorsConsole:
    """Raises SettingsError."""

    def __init__(self, gateway: Gateway) -> None:
        console = gateway.settings.console
        if console is None:
            raise SettingsError("the settings have no table [console]")
        self.folder = folder_of(gateway.settings.audit)
        self.site = ConsoleSite(gateway, console)
        self.store = MinuteStore(self.folder / "minutes.sqlite3", console.keep_days, gateway.log)
        self.sampler = GatewaySampler(gateway, self.store)
        self.index = RequestIndex(self.folder / "requests.sqlite3", gateway.settings.audit, gateway.log)
        self.views = Views(self.store, self.sampler, BudgetBurn())
        self.requests = RequestViews(self.index, gateway.settings.audit)
        self.policies = PolicyViews(gateway.settings.audit, asyncio.Lock())
        self.keys = KeyViews(gateway.settings.audit, asyncio.Lock())

    def extend(self, app: FastAPI) -> None:
        """Adds its routes to the app of the admin listener."""
        doors.install(app, self.site)
        pages.install(app, self.site, self.views)
        tenant_pages.install(app, self.site, self.requests)
        record_pages.install(app, self.site, self.requests, self.policies, self.keys)
        calls.install(app, self.views, self.requests, self.policies, self.keys)

    def start(self) -> Sequence[tasks.Background]:
        return [
            tasks.start("console", self.sampler.run, restart=_LOOKS_AGAIN),
            tasks.start("console index", self.requests.keep_up, restart=_READS_ON),
        ]

    async def close(self) -> None:
        """After its background work ended."""
        await asyncio.to_thread(self.store.close)
        await asyncio.to_thread(self.index.close)


def folder_of(audit: Path) -> Path:
    return audit.with_name(f"{audit.name}-{FOLDER}")
