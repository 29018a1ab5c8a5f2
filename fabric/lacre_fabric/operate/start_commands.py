"""`lacre up` and `lacre demo`: everything on this machine."""

from __future__ import annotations

import asyncio
import os
import shlex
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Annotated, Final

import typer
from rich.console import Console

from lacre.cli.output import printable, waiting

MAX_WORKERS: Final = 16  # for `lacre up`: each worker keeps its models and caches in this machine's memory

State = Annotated[Path | None, typer.Option(help="The state folder. Default: $XDG_STATE_HOME/lacre.")]
RotateHours = Annotated[float, typer.Option(help="Hours between rotations of the pools' keys; 0: never.", min=0)]
OpeningKms = Annotated[
    str | None,
    typer.Option(
        help="The address of the key that opens sealed models and wraps the pools' keys (docs/kms.md). Default: the state's.",
        metavar="ADDRESS",
    ),
]
AsShipped = Annotated[
    bool, typer.Option("--as-shipped", help="Serve the default model's own file, not the type that is the fastest here.")
]


def up(
    state: State = None,
    port: Annotated[int, typer.Option(help="The gateway's port; 0 picks a free one.", min=0, max=65535)] = 8321,
    model: Annotated[
        list[Path] | None,
        typer.Option(
            help="A GGUF file, plain or sealed, or the default model's name; may be repeated. Default: what this state served "
            "last, or the default model."
        ),
    ] = None,
    signer: Annotated[
        list[Path] | None,
        typer.Option(help="A public key (PEM) that must have signed the models; may be repeated: one of them suffices."),
    ] = None,
    adapter: Annotated[
        list[str] | None,
        typer.Option(help="A LoRA adapter of the model, served as MODEL:NAME; may be repeated.", metavar="NAME=FILE"),
    ] = None,
    projector: Annotated[
        Path | None,
        typer.Option(
            help="A GGUF file with which the model reads images. Default: what this state served last.", metavar="FILE"
        ),
    ] = None,
    routes: Annotated[
        Path | None, typer.Option(help="A file with all routes of models to pools (docs/routes.md). Default: those so far.")
    ] = None,
    workers: Annotated[int, typer.Option(help="The number of workers that serve the models.", min=1, max=MAX_WORKERS)] = 1,
    rotate_hours: RotateHours = 24.0,
    kms: OpeningKms = None,
    as_shipped: AsShipped = False,
) -> None:
    """Run a complete Lacre on this machine: keys, NATS server, gateway and workers. Ctrl-C stops it.

    A worker that dies is restarted.
    """
    from lacre_fabric.operate.rotation import Schedule
    from lacre_fabric.operate.up import default_state, running, until_signalled

    folder = (state or default_state()).resolve()
    schedule = Schedule(every=rotate_hours * 3600 or None)
    files = [_unresolved(path) for path in model or []]
    adapters = dict(_adapter(each) for each in adapter or [])

    def tell(line: str) -> None:
        with suppress(OSError):  # nobody reads the output; keep running
            typer.secho(printable(line), dim=True, err=True)  # one unbroken line, so that it can be copied

    async def run() -> None:
        with ExitStack() as starting:
            starting.enter_context(waiting("starting a NATS server, a gateway and workers"))
            signers = [key.resolve() for key in signer or []]
            everything = running(
                folder,
                port,
                files,
                signers=signers,
                adapters=adapters,
                projector=None if projector is None else _unresolved(projector),
                routes=None if routes is None else _unresolved(routes),
                schedule=schedule,
                kms=kms,
                workers=workers,
                as_shipped=as_shipped,
                tell=tell,
            )
            async with everything as (live, supervisor):
                starting.close()
                typer.echo(f"ready {live.connection_string}")
                tell(f"In another shell:  . {shlex.quote(str(live.site.folder / 'env'))} && lacre chat")
                if live.console is not None:
                    at = "" if state is None else f" --state {shlex.quote(str(folder))}"
                    issue = f"(umask 077; lacre token issue root --scope lacre:admin{at} > token)"
                    tell(f"The operators' console:  {issue} && lacre admin open --token-file token{at}")
                await supervisor.watch()

    asyncio.run(until_signalled(run()))


def _unresolved(path: Path) -> Path:
    """Absolute, with its symbolic links: in some model stores the link has the model's name and the target only a digest."""
    return Path(os.path.normpath(path.absolute()))


def _adapter(said: str) -> tuple[str, Path]:
    from lacre.errors import SettingsError

    name, _, file = said.partition("=")
    if not name or not file:
        raise SettingsError(f"--adapter {said}: write NAME=FILE, for example legal=legal.gguf")
    return name, _unresolved(Path(file))


def demo(
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object as the last line.")] = False,
    web: Annotated[
        bool,
        typer.Option("--web", help="Print the link of the chat page instead, and run until Ctrl-C. Needs extra `proxy`."),
    ] = False,
    as_shipped: AsShipped = False,
) -> None:
    """Start everything in a temporary state, and show one sealed chat from both sides."""
    from lacre_fabric.operate import demo as show
    from lacre_fabric.operate.up import until_signalled

    async def run() -> None:
        if web:
            await show.page(Console(), as_shipped=as_shipped)
            return
        result = await show.demo(Console(stderr=as_json), as_shipped=as_shipped)
        if as_json:
            typer.echo(show.as_json(result))

    if (number := asyncio.run(until_signalled(run()))) is not None:
        raise typer.Exit(128 + number)  # as shells report a signal
