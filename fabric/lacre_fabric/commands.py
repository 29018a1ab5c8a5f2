"""The `lacre` sub-commands that provision and run a machine's Lacre: `up`, `demo`, `token`, `keys`, `manifest publish`."""

from __future__ import annotations

import asyncio
import signal
from collections.abc import Coroutine
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from lacre.cli import manifest_app

State = Annotated[Path | None, typer.Option(help="The state folder; $XDG_STATE_HOME/lacre where left out.")]

token_app = typer.Typer(name="token", help="Access tokens of the development issuer.", no_args_is_help=True)
keys_app = typer.Typer(name="keys", help="The keys of a state folder.", no_args_is_help=True)


def register(app: typer.Typer) -> None:
    """Adds the commands, where what they need is installed."""
    if find_spec("nats") is None or find_spec("pydantic") is None:
        return
    app.add_typer(token_app)
    app.add_typer(keys_app)
    manifest_app.command("publish")(manifest_publish)
    if find_spec("fastapi") is not None and find_spec("llama_cpp") is not None:
        app.command()(up)
        app.command()(demo)


def up(
    state: State = None,
    port: Annotated[int, typer.Option(help="The gateway's port; 0 picks a free one.", min=0, max=65535)] = 8321,
    model: Annotated[Path | None, typer.Option(help="A GGUF file; the default model where left out.")] = None,
) -> None:
    """Run a whole Lacre on this machine: keys, message server, gateway and one worker. Ctrl-C ends it."""
    from lacre_fabric.up import default_state, running

    folder = (state or default_state()).resolve()

    async def run() -> None:
        async with running(folder, port, model and model.resolve()) as (live, supervisor):
            typer.echo(f"ready {live.connection_string}")
            Console(stderr=True).print(f"[dim]In another shell:  . {live.site.folder / 'env'} && lacre chat[/dim]")
            await supervisor.watch()

    asyncio.run(_until_signalled(run()))


def demo(as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object as the last line.")] = False) -> None:
    """Start everything in a temporary state, and show one sealed chat from both sides."""
    from lacre_fabric import demo as show

    async def run() -> None:
        result = await show.demo(Console(stderr=as_json))
        if as_json:
            typer.echo(show.as_json(result))

    asyncio.run(_until_signalled(run()))


async def _until_signalled(coroutine: Coroutine[None, None, None]) -> None:
    """SIGINT and SIGTERM cancel it, so that it ends what it started."""
    task = asyncio.ensure_future(coroutine)
    loop = asyncio.get_running_loop()
    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, task.cancel)
    try:
        await task
    except asyncio.CancelledError:
        return


@token_app.command("issue")
def token_issue(
    subject: Annotated[str, typer.Argument(help="Whom it speaks for.")] = "developer",
    state: State = None,
    group: Annotated[list[str] | None, typer.Option(help="A group; may be repeated.")] = None,
    scope: Annotated[list[str] | None, typer.Option(help="A scope; may be repeated.")] = None,
    hours: Annotated[float, typer.Option(help="How long it is valid.", min=0.01, max=24 * 31)] = 24.0,
) -> None:
    """Print an access token. For one's own machine: a deployment has an OIDC provider."""
    from lacre_fabric import tokens
    from lacre_fabric.keyfiles import read_ed25519
    from lacre_fabric.up import default_state

    key = read_ed25519((state or default_state()) / "issuer.pem")
    typer.echo(tokens.issue(key, subject, groups=group or (), scopes=scope or (), lifetime=hours * 3600))


@keys_app.command("init")
def keys_init(
    state: State = None,
    pool: Annotated[list[str] | None, typer.Option(help="A pool; may be repeated.")] = None,
) -> None:
    """Make root, signer, issuer, gateway and pool keys where there are none, and print the root that applications pin."""
    from lacre.jws import b64u
    from lacre_fabric.site import Site
    from lacre_fabric.up import DEFAULT_MODEL, POOL, default_state

    site = Site((state or default_state()).resolve(), dict.fromkeys(pool or [POOL], (DEFAULT_MODEL,)))
    site.create()
    typer.echo(f"root {b64u(site.root)}")


def manifest_publish(state: State = None) -> None:
    """Sign the next version of the manifest and put it on the fabric, where gateways and workers take it up."""
    from lacre_fabric.connection import Connection
    from lacre_fabric.provisioning import publish_manifest
    from lacre_fabric.site import Site
    from lacre_fabric.up import default_state

    site = Site.load((state or default_state()).resolve())

    async def run() -> None:
        connection = await Connection.open(site.nats_url, site.credential("provisioner"))
        try:
            await publish_manifest(connection, site.sign_manifest())
        finally:
            await connection.close()

    asyncio.run(run())
    typer.echo("published")
