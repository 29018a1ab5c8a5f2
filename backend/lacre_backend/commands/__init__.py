"""`lacre worker` with `check`, `digests` and `tune`, and `lacre model`.

Rules: what a command needs is imported when it runs, so that `lacre --help` stays quick.
Open `check.py` first: it tries everything that a worker needs to serve. `tune.py` measures a model. `model.py`,
`weights.py`, `convert.py` and `measure.py` work on model files.
"""

from __future__ import annotations

import asyncio
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated

import typer

from lacre.cli.output import AsJson, say_json, say_table, waiting
from lacre_backend.commands import measure

commands = typer.Typer(no_args_is_help=True)
SettingsFile = Annotated[Path, typer.Option("--settings", help="The worker's settings file (TOML).")]


def register(app: typer.Typer) -> None:
    """Adds the commands if the packages that they need are installed."""
    if find_spec("nats") is not None and find_spec("llama_cpp") is not None and find_spec("pydantic") is not None:
        app.add_typer(commands, name="worker")
        app.add_typer(measure.commands, name="model")


@commands.callback(invoke_without_command=True)
def worker(
    context: typer.Context,
    settings: Annotated[Path | None, typer.Option(help="The worker's settings file (TOML).")] = None,
    node: Annotated[str | None, typer.Option(help="This worker's name in the pool, if others share the settings.")] = None,
) -> None:
    """Run a worker: it dials out to the fabric, opens sealed requests and answers them with its models."""
    if context.invoked_subcommand is not None:
        return
    if settings is None:
        raise typer.BadParameter("give the worker's settings file", param_hint="--settings")
    import uvloop

    from lacre_backend.serve import serve
    from lacre_backend.settings import load
    from lacre_fabric.logs import last_words
    from lacre_fabric.nats.subjects import check_name

    with last_words(), asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        found = load(settings)
        if node is not None:
            found = found.model_copy(update={"node": check_name("node", node)})
        runner.run(serve(found))


@commands.command("tune")
def worker_tune(settings: SettingsFile) -> None:
    """Measure on this machine how each model runs fastest, and write the choice and its figures into the settings."""
    from lacre_backend.commands.tune import run

    run(settings, typer.echo)


@commands.command("check")
def worker_check(settings: SettingsFile, as_json: AsJson = False) -> None:
    """Check everything that this worker needs, and print what to do about each fault. It serves nothing."""
    from dataclasses import asdict

    from lacre_backend.commands.check import examine
    from lacre_fabric.logs import only_errors

    only_errors()
    with waiting("trying everything"):
        reasons = examine(settings)
    if as_json:
        say_json({"ok": not reasons, "reasons": [asdict(reason) for reason in reasons]})
    else:
        for reason in reasons:
            typer.echo(f"failed {reason.kind}: {reason.detail}\n  to do: {reason.remedy}")
    if reasons:
        raise typer.Exit(1)
    if not as_json:
        typer.echo("ok: this worker can serve")


@commands.command("digests")
def worker_digests(
    settings: SettingsFile,
    as_json: AsJson = False,
    planned: Annotated[bool, typer.Option("--planned", hidden=True, help="Read `kms` and `models` as JSON on stdin.")] = False,
) -> None:
    """Print the digest of each model file in the settings, and the signer if the settings demand one. It serves nothing.

    With --json, in the form of the manifest.
    """
    from lacre_backend.commands.digests import PlannedModels, served_files
    from lacre_backend.settings import load

    with waiting("reading the models"):
        found = served_files(PlannedModels.read(sys.stdin.buffer, settings) if planned else load(settings))
    if as_json:
        say_json({"models": {name: entry.members() for name, entry in found.items()}}, indent=2)
    else:
        rows = [(name, ", ".join(entry.digests), ", ".join(entry.signers) or "none") for name, entry in found.items()]
        say_table(("model", "digest", "signer"), rows)
