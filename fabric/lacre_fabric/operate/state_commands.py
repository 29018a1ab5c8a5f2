"""`lacre state`, and what every command of a state folder begins with: its site, and the provisioner's connection."""

from __future__ import annotations

import asyncio
import os
import sys
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from lacre.cli.output import waiting
from lacre.errors import SettingsError
from lacre_fabric.operate.start_commands import State

if TYPE_CHECKING:  # imported in the command that needs it
    from lacre_fabric.nats.connection import Connection
    from lacre_fabric.operate.site import Site

state_app = typer.Typer(name="state", help="A state folder: backup, restore, catch up with the fabric.", no_args_is_help=True)


@state_app.callback()
def state_group() -> None:
    """A state folder."""


PassphraseFile = Annotated[
    Path | None, typer.Option(help="A 0600 file with the passphrase. Default: ask for it.", metavar="FILE")
]
BackupKms = Annotated[
    str | None, typer.Option("--kms", help="Encrypt with a key of a KMS instead (docs/kms.md).", metavar="ADDRESS")
]


@state_app.command("backup")
def state_backup(
    file: Annotated[Path, typer.Argument(help="The new file.")],
    state: State = None,
    passphrase_file: PassphraseFile = None,
    kms: BackupKms = None,
    fabric: Annotated[bool, typer.Option(help="Include revocations and budgets, which NATS keeps.")] = True,
) -> None:
    """Write an encrypted backup: the state folder, and the revocations and budgets on the fabric. No audit logs."""
    from lacre_fabric.operate import behind, stores
    from lacre_fabric.operate.backup import Backup, encrypted, save

    site = site_of(state)
    passphrase = None if kms is not None else _passphrase(passphrase_file, confirm=True)

    async def run() -> Backup:
        if not fabric:
            async with site.changing():
                return Backup.of(site.folder, None)
        async with provisioner(site) as connection, site.changing():
            await behind.check(site, connection)
            return Backup.of(site.folder, await stores.entries(connection))

    with waiting("reading the state"):
        made = asyncio.run(run())
    with waiting("encrypting the backup"):
        save(file, encrypted(made.encode(), passphrase=passphrase, address=kms))
    kept = "without the fabric" if made.entries is None else f"{len(made.entries)} entries of the fabric"
    typer.echo(f"{file}: {len(made.files)} files, {kept}")


@state_app.command("restore")
def state_restore(
    file: Annotated[Path, typer.Argument(help="A file of `lacre state backup`.")],
    state: State = None,
    passphrase_file: PassphraseFile = None,
    kms: BackupKms = None,
) -> None:
    """Make a state folder from a backup. The folder must be empty or missing.

    Revocations and budgets come back to the fabric at the next `lacre up`, `keys tend` or `manifest publish`.
    """
    from lacre_fabric.operate import backup
    from lacre_fabric.operate.up import default_state

    folder = (state or default_state()).resolve()
    data = backup.read(file)
    passphrase = None if kms is not None else _passphrase(passphrase_file, confirm=False)
    with waiting("opening the backup"):
        found = backup.Backup.parse(backup.decrypted(data, passphrase=passphrase, address=kms))
    with waiting("writing the state"):
        backup.restore(found, folder)
    typer.echo(f"{folder}: {len(found.files)} files as of {_date(found.made_at)}")
    typer.echo("Run `lacre fabric check` next: it says whether the folder is behind the fabric.")


@state_app.command("settle")
def state_settle(
    state: State = None,
    keep_tokens: Annotated[
        bool, typer.Option("--keep-tokens", help="Go on accepting tokens issued before now, also if they had been revoked.")
    ] = False,
) -> None:
    """Accept that NATS lost revocations or budgets, so that gateways serve again.

    Tokens issued before now are refused, because their revocations may be lost. Budgets go on from what is there.
    """
    from lacre_fabric.operate import behind, stores
    from lacre_fabric.work.contract import FabricUnavailable

    site = site_of(state)
    decided = time.time()
    stores.decide(site.folder, 0.0 if keep_tokens else decided)

    async def run() -> None:
        async with provisioner(site) as connection:
            await behind.check(site, connection)
            await stores.provision_site(site, connection)

    try:
        with waiting("telling the fabric"):
            asyncio.run(run())
    except FabricUnavailable as exc:
        typer.echo(f"decided; it takes effect at the next `lacre up`, `keys tend` or `manifest publish` ({exc})")
    else:
        typer.echo("settled" if keep_tokens else f"settled: gateways refuse tokens issued before {_date(decided)}")


def _passphrase(file: Path | None, *, confirm: bool) -> str:
    from lacre_fabric.keys.secret_files import read_secret

    if file is None:
        if not _has_terminal():
            raise SettingsError("there is no terminal to ask for the passphrase: name its file with --passphrase-file")
        return str(typer.prompt("passphrase", hide_input=True, confirmation_prompt=confirm))
    try:
        return read_secret(file, "name a 0600 file").decode().strip("\r\n")
    except UnicodeDecodeError as exc:
        raise SettingsError(f"{file} is not UTF-8 text") from exc


def _has_terminal() -> bool:
    try:
        os.close(os.open("/dev/tty", os.O_RDWR | os.O_NOCTTY))
    except OSError:
        return sys.stdin.isatty()
    return True


def _date(seconds: float) -> str:
    return datetime.fromtimestamp(seconds, UTC).strftime("%Y-%m-%d %H:%M:%S UTC")


@state_app.command("catch-up")
def catch_up(
    state: State = None,
    seen: Annotated[
        list[Path] | None,
        typer.Option(help="A memory of manifests, or its copy, of a process that saw more than the gateway.", metavar="DIR"),
    ] = None,
) -> None:
    """Take the root statements, the version and the used key ids from the fabric, after the restore of an older folder.

    If the gateway of `site.json` serves a newer manifest than the fabric has, it takes that one. It takes only what this
    folder's root leads to. Private keys are on neither: it names those that are missing.
    """
    from lacre_fabric.operate import behind, catching_up

    site = site_of(state)
    root = site.authority.chain().roots[0]
    others = [document for memory in seen or () for document in catching_up.remembered(memory, root)]

    async def run() -> catching_up.CaughtUp:
        async with provisioner(site) as connection, site.changing():
            there = await behind.published(connection)
            known = [] if there is None else [there]
            try:
                known.append(await asyncio.to_thread(catching_up.served, site.base_url))
            except SettingsError as exc:
                typer.echo(f"not compared with the gateway: {exc}", err=True)
            for memory in catching_up.memories(site.folder):
                try:
                    others.extend(catching_up.remembered(memory, root))
                except SettingsError as exc:
                    typer.echo(f"not compared with {memory}: {exc}", err=True)
            newest = catching_up.newest(known, root)
            return catching_up.catch_up(site, newest or there, time.time(), others)

    with waiting("comparing with the fabric and the gateway"):
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
