"""`lacre state`, and what every command of a state folder begins with: its site, and the provisioner's connection."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import typer

from lacre_fabric.operate.start_commands import State

if TYPE_CHECKING:  # imported in the command that needs it
    from lacre_fabric.nats.connection import Connection
    from lacre_fabric.operate.site import Site

state_app = typer.Typer(name="state", help="A state folder: catch up with the fabric.", no_args_is_help=True)


@state_app.callback()
def state_group() -> None:
    """A state folder."""


@state_app.command("catch-up")
def catch_up(state: State = None) -> None:
    """Take the root statements, the version and the used key ids from the fabric, after the restore of an older folder.

    It takes only what this folder's root leads to. Private keys are not on the fabric: it names those that are missing.
    """
    from lacre_fabric.operate import behind, catching_up

    site = site_of(state)

    async def run() -> catching_up.CaughtUp:
        async with provisioner(site) as connection, site.changing():
            return catching_up.catch_up(site, await behind.published(connection), time.time())

    done = asyncio.run(run())
    typer.echo(f"version {done.version}, {done.statements} root statements added")
    for line in done.todo:
        typer.echo(f"  {line}", err=True)


def site_of(state: Path | None) -> Site:
    """state: None for the default folder. Raises SettingsError."""
    from lacre_fabric.operate.site import Site
    from lacre_fabric.operate.up import default_state

    return Site.load((state or default_state()).resolve())


@asynccontextmanager
async def provisioner(site: Site) -> AsyncIterator[Connection]:
    """Raises FabricUnavailable."""
    from lacre_fabric.nats.connection import Connection

    connection = await Connection.open(site.servers, site.credential("provisioner"))
    try:
        yield connection
    finally:
        await connection.close()
