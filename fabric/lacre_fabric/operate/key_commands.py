"""`lacre keys`: creates, rotates, replaces, moves, tends and lists the keys of a state folder."""

from __future__ import annotations

import asyncio
import logging
import sys
from datetime import UTC, datetime
from enum import StrEnum
from functools import partial
from typing import TYPE_CHECKING, Annotated

import typer

from lacre.cli.output import AsJson, say_json, say_table, waiting
from lacre.runtime import tasks
from lacre_fabric.operate.start_commands import RotateHours, State
from lacre_fabric.operate.state_commands import provisioner, site_of

if TYPE_CHECKING:  # imported in the command that needs it
    from collections.abc import Sequence

    from lacre_fabric.keys.generations import Generation
    from lacre_fabric.operate.rotation import Rotated
    from lacre_fabric.operate.site import Site

Pools = Annotated[list[str] | None, typer.Option(help="A pool; may be repeated. Default: all pools.")]
Grace = Annotated[
    float | None,
    typer.Option(help="Seconds that the old key stays in the manifest. Default: 13 hours.", min=0, metavar="SECONDS"),
]
KmsAddress = Annotated[
    str | None,
    typer.Option(help="For a new state: the address of the key that wraps the pools' keys (docs/kms.md).", metavar="ADDRESS"),
]
Wait = Annotated[float, typer.Option(help="Seconds to wait until the workers load the new key.", min=0)]
keys_app = typer.Typer(name="keys", help="The keys of a state folder, and those of its pools.", no_args_is_help=True)


@keys_app.command("init")
def keys_init(
    state: State = None,
    pool: Annotated[list[str] | None, typer.Option(help="A pool; may be repeated.")] = None,
    kms: KmsAddress = None,
) -> None:
    """Create missing root, signer, issuer, gateway and pool keys, and print the root key that applications pin."""
    from lacre.jose.jws import b64u
    from lacre_fabric.nats import subjects
    from lacre_fabric.operate.site import Site
    from lacre_fabric.operate.up import POOL, default_state
    from lacre_fabric.work.model_names import DEFAULT_MODEL

    for name in pool or ():
        subjects.check_name("pool", name)
    site = Site((state or default_state()).resolve(), dict.fromkeys(pool or [POOL], (DEFAULT_MODEL,)))
    if kms is not None:
        site.choose_kms(kms)
    site.create()
    typer.echo(f"root {b64u(site.root)}")


@keys_app.command("rotate")
def keys_rotate(
    state: State = None,
    pool: Pools = None,
    grace: Grace = None,
    wait: Wait = 30.0,
) -> None:
    """Create new pool keys and retire the old ones, without interrupting requests.

    The workers load the new key first. Then the manifest lists both. After the grace period the old key leaves the manifest and
    is destroyed, by `lacre up` or by the next `lacre keys tend`.
    """
    site = site_of(state)
    asyncio.run(_rotated(site, _chosen(site, pool), grace, wait, receipts=False))


class Replaced(StrEnum):
    """What `lacre keys replace` replaces."""

    RECEIPT = "receipt"
    GRANT = "grant"


@keys_app.command("replace")
def keys_replace(
    what: Annotated[Replaced, typer.Argument(help="receipt: of the pools; grant: of the gateways.")],
    state: State = None,
    pool: Pools = None,
    grace: Grace = None,
    wait: Wait = 30.0,
) -> None:
    """Replace a signing key without losing a request. The manifest names the old one too, until the grace period ends.

    receipt: each pool gets a new receipt key, and new pool keys with it. Every live worker must load them first.
    grant: the gateways get a new key for grants and audit checkpoints. Every live worker must read the manifest first.
    """
    site = site_of(state)
    if what is Replaced.GRANT:
        asyncio.run(_replaced_grant(site, grace, wait))
        return
    asyncio.run(_rotated(site, _chosen(site, pool), grace, wait, receipts=what is Replaced.RECEIPT))


async def _replaced_grant(site: Site, grace: float | None, wait: float) -> None:
    from lacre.jose.jws import b64u
    from lacre_fabric.operate.replacing import replace_grant
    from lacre_fabric.operate.rotation import GRACE

    async with provisioner(site) as connection:
        with waiting("waiting for the workers to read the manifest"):
            done = await replace_grant(site, connection, grace=GRACE if grace is None else grace, wait=wait)
    typer.echo(f"gateways: key {b64u(done.public)}" + (" (an earlier run replaced it)" if done.before else ""))
    typer.echo(f"  the old one leaves the manifest at {date(done.leave_at)}")
    typer.echo(f"  copy {site.grant_keys.file} to the gateways of other machines before that; they need no restart")


def _chosen(site: Site, pools: Sequence[str] | None) -> Sequence[str]:
    """Raises SettingsError."""
    from lacre.errors import SettingsError

    if unknown := set(pools or ()) - set(site.pools):
        raise SettingsError(f"unknown pool {', '.join(sorted(unknown))}: this state has {', '.join(sorted(site.pools))}")
    return pools or tuple(site.pools)


async def _rotated(site: Site, pools: Sequence[str], grace: float | None, wait: float, *, receipts: bool) -> None:
    """Rotates these pools, and tells of each. One that fails does not stop the others. Raises the first failure."""
    from lacre_fabric.operate.rotation import GRACE, Failures, retire, rotate

    failures = Failures()
    leaves = GRACE if grace is None else grace
    async with provisioner(site) as connection:
        with failures.kept():
            await retire(site, connection)
        for name in pools:
            with failures.kept(name):
                with waiting("waiting for the workers to load the new keys"):
                    rotated = await rotate(site, connection, name, grace=leaves, wait=wait, receipts=receipts)
                _tell(rotated)
                if receipts:
                    typer.echo("  with a new receipt key")
    failures.raised()


@keys_app.command("rewrap")
def keys_rewrap(
    to: Annotated[str, typer.Option(help="The address of the key to wrap with (docs/kms.md).", metavar="ADDRESS")],
    source: Annotated[
        str | None,
        typer.Option("--from", help="The address that wraps them now. Default: the state's.", metavar="ADDRESS"),
    ] = None,
    state: State = None,
) -> None:
    """Move the pools' keys and receipt keys to another key management service, or to unwrapped files.

    It changes nothing until it has opened every key. After an interruption, run it again: it skips the keys that are moved.
    """
    from lacre_fabric.operate.rewrapping import rewrap

    site = site_of(state)

    async def run() -> None:
        async with site.changing():
            for moved in rewrap(site, source or site.kms, to):
                typer.echo(f"{moved.path.relative_to(site.folder)}: {'already moved' if moved.before else 'moved'}")

    asyncio.run(run())
    typer.echo(f'Set kms = "{to}" in the workers\' settings, then restart the workers. Until then they keep their loaded keys.')


@keys_app.command("tend")
def keys_tend(
    state: State = None,
    rotate_hours: RotateHours = 24.0,
    grace: Grace = None,
    stay: Annotated[bool, typer.Option("--stay", help="Keep running until SIGTERM, and watch for clients that flood.")] = False,
) -> None:
    """Do what is due: create a pool key, destroy an old one, sign a new manifest, recreate lost queues. Run it hourly from cron
    if you do not use `lacre up`.
    """
    from lacre_fabric import logs
    from lacre_fabric.operate import behind, floods
    from lacre_fabric.operate.rotation import GRACE, KEPT_UP, Schedule, tend, upkeep
    from lacre_fabric.operate.stores import provision_site
    from lacre_fabric.operate.up import until_signalled

    if stay:
        logs.configure(sys.stderr)
    else:
        logs.of_command(logging.INFO)  # nobody watches a timer's command: its log tells of each rotation
    site = site_of(state)
    schedule = Schedule(every=rotate_hours * 3600 or None, grace=GRACE if grace is None else grace)

    async def run() -> None:
        async with provisioner(site) as connection:
            if stay:
                upkept = partial(upkeep, site, connection, schedule, provisioning=True)
                background = [tasks.start("upkeep", upkept, restart=KEPT_UP)]
                if site.credential_file("warden").exists():
                    watched = partial(floods.watch, site.servers, site.credential("warden"))
                    background.append(tasks.start("floods", watched, restart=floods.WATCHED))
                else:
                    floods.not_watched("the state folder has no credential `warden`")
                try:
                    await asyncio.Event().wait()
                finally:
                    for each in background:
                        await each.close()
            else:
                await behind.check(site, connection)
                await provision_site(site, connection)
                await tend(site, connection, schedule)

    asyncio.run(until_signalled(run()))


@keys_app.command("list")
def keys_list(state: State = None, as_json: AsJson = False) -> None:
    """Show the pools' keys and their next steps."""
    site = site_of(state)
    rows = [
        (name, config.key_id, config.kem.label, _state(generation))
        for name in site.pools
        for generation in site.generations(name).live
        for config in generation.configs
    ]
    if as_json:
        say_json([dict(zip(("pool", "key", "kem", "state"), row, strict=True)) for row in rows], indent=2)
        return
    say_table(("pool", "key", "KEM", "state"), [tuple(map(str, row)) for row in rows])


def _state(generation: Generation) -> str:
    if generation.listed_at is None:
        return "staged: waiting for the workers"
    if generation.retire_at is None:
        return f"current since {date(generation.listed_at)}"
    if generation.unlisted_at is None:
        return f"leaves the manifest at {date(generation.retire_at)}"
    return f"destroyed after {date(generation.unlisted_at + generation.drain)}"


def _tell(rotated: Rotated) -> None:
    new = ", ".join(f"{config.key_id} ({config.kem.label})" for config in rotated.listed)
    typer.echo(f"pool {rotated.pool}: key {new}")
    for generation in rotated.retiring:
        ids = ", ".join(map(str, generation.ids))
        typer.echo(f"  {ids}: {_state(generation)}")
    for node in sorted(rotated.lacking):
        typer.echo(f"  worker {node} has not loaded the new key: check that it reads the pool's keys", err=True)


def date(seconds: float) -> str:
    return datetime.fromtimestamp(seconds, UTC).strftime("%Y-%m-%d %H:%M:%S UTC")
