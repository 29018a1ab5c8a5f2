"""`lacre admin open`: a link to the operators' console, for the person at this terminal. `lacre admin drain-worker` and
`resume-worker`: have one worker take no work, or take work again.
"""

from __future__ import annotations

import re
import time
from contextlib import suppress
from typing import TYPE_CHECKING, Annotated, Final

import typer

from lacre_gateway.admin.api_commands import AsJson, with_api

if TYPE_CHECKING:
    from lacre_gateway.admin.calls import AdminApi

_LOADING: Final = 10.0  # seconds for a browser to start and to read its file
admin_app = typer.Typer(no_args_is_help=True, help="Administer a running gateway.")


def register(app: typer.Typer) -> None:
    app.add_typer(admin_app, name="admin")


@admin_app.command("open")
@with_api
def open_console(
    api: AdminApi,
    browser: Annotated[bool, typer.Option("--browser", help="Also open the link in this machine's browser.")] = False,
) -> None:
    """Print a link that opens the operators' console as the holder of the access token. It works once, for a minute."""
    from lacre import problems
    from lacre.cli.link_file import LinkFile
    from lacre.cli.output import say, waiting
    from lacre.errors import RefusedError, SettingsError
    from lacre_gateway.admin.reports import OpenLink

    try:
        link = api.post("/v1/console/links", {}, OpenLink)
    except RefusedError as exc:
        if exc.problem != problems.NOT_FOUND.type:
            raise
        raise SettingsError("this gateway has no console: add a table [console] to its settings, and restart it") from exc
    say(link.url)
    if not browser:
        return
    with suppress(KeyboardInterrupt), LinkFile("console", link.url, instead="leave --browser away") as file:
        if not file.open():
            typer.echo("warning: this machine has no browser: open the link in another one, within its minute", err=True)
            return
        with waiting("the browser opens"):
            time.sleep(_LOADING)


Node = Annotated[str, typer.Argument(help="The worker's name, as in `lacre top`.")]
PoolName = Annotated[str, typer.Option(help="Its pool.")]
Region = Annotated[str, typer.Option(help="Its region.")]


@admin_app.command("drain-worker")
@with_api
def drain_worker(
    api: AdminApi, node: Node, pool: PoolName = "default", region: Region = "lacre", as_json: AsJson = False
) -> None:
    """Have one worker take no more work. Its streams finish, and it waits for `resume-worker` or for the end of its process."""
    _order(api, "drain", pool, region, node, as_json=as_json)


@admin_app.command("resume-worker")
@with_api
def resume_worker(
    api: AdminApi, node: Node, pool: PoolName = "default", region: Region = "lacre", as_json: AsJson = False
) -> None:
    """Have a drained worker take work again."""
    _order(api, "resume", pool, region, node, as_json=as_json)


def _order(api: AdminApi, what: str, pool: str, region: str, node: str, *, as_json: bool) -> None:
    from lacre.cli.output import printable, say, say_json
    from lacre.errors import SettingsError
    from lacre_gateway.admin.reports import WORKER, WorkerOrdered

    named = {"pool": pool, "region": region, "node": node}
    for key, value in named.items():
        if re.fullmatch(WORKER, value) is None:
            kind = "worker" if key == "node" else key
            raise SettingsError(f"no {kind} has the name {value!r}: `lacre top` shows workers, pools and regions")
    done = api.post(f"/v1/workers/{what}", named, WorkerOrdered)
    if as_json:
        say_json(done.model_dump(mode="json"), indent=2)
        return
    state = f"drained: {done.busy} slots are still busy" if done.drained else "takes work again"
    say(f"worker {printable(done.node)} of pool {printable(done.pool)}: {state}")
    if done.drained and not done.others:
        typer.echo(f"warning: no other worker of pool {printable(done.pool)} takes work now", err=True)
