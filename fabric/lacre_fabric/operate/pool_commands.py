"""`lacre pool`: adds and removes pools of a deployment of separate processes, and lists them."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from lacre.cli.output import AsJson, say_json, say_table, waiting
from lacre.errors import SettingsError, UsageError
from lacre_fabric.operate.start_commands import State
from lacre_fabric.operate.state_commands import site_of

if TYPE_CHECKING:  # imported in the command that needs it
    from lacre_fabric.operate.account_reload import AccountFiles
    from lacre_fabric.operate.pool_state import PoolState
    from lacre_fabric.operate.site import Site

pool_app = typer.Typer(name="pool", help="The pools of a deployment: add, remove, list.", no_args_is_help=True)

Accounts = Annotated[
    list[Path] | None,
    typer.Option(
        help="A file that a NATS server includes; may be repeated. Default: the bundle's, or DIR/accounts.json.",
        metavar="FILE",
    ),
]
Apply = Annotated[
    str | None,
    typer.Option(help="A shell command that brings the written files to the servers. Runs twice.", metavar="COMMAND"),
]
Wait = Annotated[float, typer.Option(help="Seconds for every server to read the new accounts.", min=1)]


@pool_app.callback()
def pool_group() -> None:
    """The pools of a deployment."""


Offline = Annotated[
    bool,
    typer.Option("--offline", help="Change files only, and print the commands that bring them to a cluster (Kubernetes)."),
]


@pool_app.command("add")
def pool_add(
    name: Annotated[str, typer.Argument(help="The pool.")],
    state: State = None,
    model: Annotated[list[str] | None, typer.Option(help="A model that it serves; may be repeated.")] = None,
    upstream: Annotated[
        str | None,
        typer.Option(help="Its workers forward to this server and run no model, e.g. http://127.0.0.1:8000.", metavar="URL"),
    ] = None,
    allow: Annotated[
        list[str] | None,
        typer.Option(
            help="A request that passes to the upstream; may be repeated. Default: chats and completions.", metavar="ROUTE"
        ),
    ] = None,
    beyond_loopback: Annotated[
        bool, typer.Option("--beyond-loopback", help="The upstream is on another host: prompts cross the network.")
    ] = False,
    accounts: Accounts = None,
    apply: Apply = None,
    wait: Wait = 60.0,
    offline: Offline = False,
) -> None:
    """Add a pool to a running deployment, or models to a pool: keys, accounts, queues, manifest, bundle, chart values.

    The NATS servers read their accounts again while all other pools serve. After a failure, run it again.
    """
    from lacre_fabric.operate import chart_pools, pools
    from lacre_fabric.operate.account_reload import AccountFiles
    from lacre_fabric.operate.pool_upstreams import ALLOWED, UpstreamServer

    if upstream is None and (allow or beyond_loopback):
        raise UsageError("--allow and --beyond-loopback describe an upstream: name it with --upstream")
    site = site_of(state)
    server = None if upstream is None else UpstreamServer(upstream, tuple(allow or ALLOWED), beyond_loopback)
    files = AccountFiles(tuple(accounts or ()), apply, wait)
    if offline:
        with waiting("making keys and accounts"):
            coming = asyncio.run(pools.prepare(site, name, model or (), files, upstream=server))
        _tell_steps(site, chart_pools.added(coming, name, files.paths(site)[0]), files)
    else:
        with waiting("adding the pool"):
            asyncio.run(pools.add(site, name, model or (), files, typer.echo, upstream=server))
    typer.echo(f"chart values: {chart_pools.values_file(site)}")


@pool_app.command("remove")
def pool_remove(
    name: Annotated[str, typer.Argument(help="The pool.")],
    state: State = None,
    accounts: Accounts = None,
    apply: Apply = None,
    wait: Wait = 60.0,
    offline: Offline = False,
    force: Annotated[
        bool,
        typer.Option("--force", help="Also if it has live workers or queued requests, or if routes lead only there: they end."),
    ] = False,
    yes: Annotated[bool, typer.Option("--yes", help="Do not ask.")] = False,
) -> None:
    """Remove a pool from a running deployment, and destroy its keys. Other pools do not notice.

    Stop its workers first: they finish their requests. Otherwise it refuses.
    """
    from lacre_fabric.operate import chart_pools, pools
    from lacre_fabric.operate.account_reload import AccountFiles

    site = site_of(state)
    files = AccountFiles(tuple(accounts or ()), apply, wait)
    pools.site_without(site, name, again=offline)  # raises, before it asks
    if not yes:
        typer.confirm(f"destroy the keys of {name}?", abort=True)
    if offline:
        gone = asyncio.run(pools.withdraw(site, name, files, force=force))
        _tell_steps(site, chart_pools.removed(gone, name, files.paths(site)[0]), files)
    else:
        with waiting("removing the pool"):
            asyncio.run(pools.remove(site, name, files, typer.echo, force=force))


def _tell_steps(site: Site, steps: Sequence[str], files: AccountFiles) -> None:
    """What is to be done after the files. With bundles, there is no cluster."""
    from lacre_fabric.operate.account_reload import has_bundle

    if has_bundle(site):
        named = ", ".join(map(str, files.paths(site)))
        typer.echo(f"accounts: {named}; restart the NATS servers one after the other, then run `lacre manifest publish`")
        return
    typer.echo("# Run these in this order. Each may be run again.")
    for step in steps:
        typer.echo(step)


@pool_app.command("list")
def pool_list(state: State = None, as_json: AsJson = False) -> None:
    """Show the pools: models, key ids, live workers, their slots, queued requests."""
    from lacre_fabric.operate.pool_upstreams import of_site

    site = site_of(state)
    keys = {pool: [key for one in site.generations(pool).live for key in one.ids] for pool in site.pools}
    with waiting("asking the NATS servers"):
        upstreams, states = of_site(site.folder), asyncio.run(_states(site))
    if as_json:
        rows = {
            pool: {
                "models": list(models),
                "keys": keys[pool],
                **({"upstream": upstreams[pool].origin} if pool in upstreams else {}),
                **(asdict(states[pool]) if pool in states else {"workers": None, "queued": None}),
            }
            for pool, models in site.pools.items()
        }
        say_json(rows, indent=2)
        return
    rows_told = []
    for pool, models in site.pools.items():
        told = states.get(pool)
        workers = "?" if told is None else ", ".join(worker.name for worker in told.workers) or "none"
        slots = "?" if told is None else f"{told.busy} of {told.busy + told.free}"
        queued = "?" if told is None else "no queue" if told.queued is None else str(told.queued)
        rows_told.append((pool, ", ".join(models), ", ".join(map(str, keys[pool])), workers, slots, queued))
    say_table(("pool", "models", "keys", "workers", "slots busy", "queued"), rows_told)


async def _states(site: Site) -> Mapping[str, PoolState]:
    """Empty if NATS does not answer; then stderr says why."""
    from io import StringIO

    from lacre_fabric import logs
    from lacre_fabric.operate.account_reload import connected
    from lacre_fabric.operate.pool_state import observe
    from lacre_fabric.work.contract import FabricUnavailable

    logs.configure(StringIO())  # the line below says what matters
    try:
        async with connected(site, "provisioner") as connection:
            return await observe(connection, site.pools, site.regions)
    except (FabricUnavailable, SettingsError) as exc:
        typer.echo(f"workers and queues are not known: {exc}", err=True)
        return {}
