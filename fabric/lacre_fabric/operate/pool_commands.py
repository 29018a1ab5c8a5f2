"""`lacre pool`: adds and removes pools of a deployment of separate processes, and lists them."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from typing import Annotated

import typer

from lacre.cli.output import AsJson, say_table
from lacre_fabric.operate.start_commands import State
from lacre_fabric.operate.state_commands import site_of

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


@pool_app.command("add")
def pool_add(
    name: Annotated[str, typer.Argument(help="The pool.")],
    state: State = None,
    model: Annotated[list[str] | None, typer.Option(help="A model that it serves; may be repeated.")] = None,
    accounts: Accounts = None,
    apply: Apply = None,
    wait: Wait = 60.0,
    offline: Annotated[
        bool,
        typer.Option("--offline", help="Change files only. You restart the servers and publish (Kubernetes)."),
    ] = False,
) -> None:
    """Add a pool to a running deployment, or models to a pool: keys, accounts, queues, manifest, bundle, chart values.

    The NATS servers read their accounts again while all other pools serve. After a failure, run it again.
    """
    from lacre_fabric.operate import pools

    site = site_of(state)
    files = pools.AccountFiles(tuple(accounts or ()), apply, wait)
    if offline:
        asyncio.run(pools.prepare(site, name, model or (), files))
        typer.echo(f"accounts: {', '.join(map(str, files.paths(site)))}; restart the NATS servers one after the other")
    else:
        asyncio.run(pools.add(site, name, model or (), files, typer.echo))
    typer.echo(f"chart values: {site.folder / 'chart' / 'pools.yaml'}")


@pool_app.command("remove")
def pool_remove(
    name: Annotated[str, typer.Argument(help="The pool.")],
    state: State = None,
    accounts: Accounts = None,
    apply: Apply = None,
    wait: Wait = 60.0,
    yes: Annotated[bool, typer.Option("--yes", help="Do not ask.")] = False,
) -> None:
    """Remove a pool from a running deployment, and destroy its keys. Its requests end; other pools do not notice."""
    from lacre_fabric.operate import pools

    site = site_of(state)
    if not yes:
        typer.confirm(f"destroy the keys of {name}, and end its requests?", abort=True)
    asyncio.run(pools.remove(site, name, pools.AccountFiles(tuple(accounts or ()), apply, wait), typer.echo))


@pool_app.command("list")
def pool_list(state: State = None, as_json: AsJson = False) -> None:
    """Show the pools, their models, and the ids of their keys."""
    site = site_of(state)
    keys = {pool: [key for one in site.generations(pool).live for key in one.ids] for pool in site.pools}
    if as_json:
        rows = {pool: {"models": list(models), "keys": keys[pool]} for pool, models in site.pools.items()}
        typer.echo(json.dumps(rows, indent=2))
        return
    told = [(pool, ", ".join(models), ", ".join(map(str, keys[pool]))) for pool, models in site.pools.items()]
    say_table(("pool", "models", "keys"), told)
