"""The `lacre` command. Its sub-commands come from the entry points in `lacre.commands`: those of an extra appear with it."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from contextlib import suppress
from datetime import UTC, datetime
from importlib.metadata import entry_points
from typing import Annotated, Any

from lacre._version import __version__
from lacre.client import Client, fetch_manifest
from lacre.errors import LacreError

try:
    import typer
    from rich.console import Console
    from rich.table import Table
except ModuleNotFoundError as exc:
    raise SystemExit("the lacre command needs an extra: pip install 'lacre[cli]'") from exc

GROUP = "lacre.commands"
out = Console(highlight=False, markup=False)  # what comes from elsewhere is text, and no markup of ours
err = Console(stderr=True, highlight=False)

app = typer.Typer(
    name="lacre",
    help="Sealed access to self-hosted language models.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
)
manifest_app = typer.Typer(name="manifest", help="The signed description of pools, models and keys.", no_args_is_help=True)
app.add_typer(manifest_app)

Url = Annotated[str | None, typer.Option(help="The connection string.", envvar="LACRE_URL", show_envvar=True)]


def _version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"lacre {__version__}")
        raise typer.Exit


@app.callback()
def root(
    version: Annotated[bool, typer.Option("--version", help="Print the version.", callback=_version, is_eager=True)] = False,
) -> None:
    """Options of the command itself."""


@app.command()
def chat(
    prompt: Annotated[str | None, typer.Argument(help="The question; without one, an interactive chat.")] = None,
    url: Url = None,
    pool: Annotated[str, typer.Option(help="The pool of workers.")] = "default",
    model: Annotated[str | None, typer.Option(help="The model; the pool's first by default.")] = None,
    system: Annotated[str | None, typer.Option(help="A system message.")] = None,
    max_tokens: Annotated[int, typer.Option(help="The longest answer, in tokens.")] = 512,
    temperature: Annotated[float | None, typer.Option(help="Sampling temperature.")] = None,
) -> None:
    """Stream a sealed answer. The token comes from LACRE_TOKEN."""
    params: dict[str, Any] = {"max_tokens": max_tokens, "model": model, "temperature": temperature}
    params = {name: value for name, value in params.items() if value is not None}
    turns = [{"role": "system", "content": system}] if system else []
    with Client(url, pool=pool) as client:
        if prompt is not None:
            _answer(client, [*turns, {"role": "user", "content": prompt}], params)
            return
        for question in _questions():
            asked = [*turns, {"role": "user", "content": question}]
            try:
                answer = _answer(client, asked, params)
            except KeyboardInterrupt:
                continue  # the answer is cut off, and forgotten with its question
            except LacreError as exc:
                if not sys.stdin.isatty():
                    raise
                _tell(exc)  # somebody is there to try again, or to ask something else
                continue
            turns = [*asked, {"role": "assistant", "content": answer}]


def _answer(client: Client, turns: list[dict[str, str]], params: dict[str, Any]) -> str:
    """Prints the answer as it comes; whatever ends it, the next output begins on a new line."""
    answer = ""
    try:
        for piece in client.chat_stream(turns, **params):
            answer += piece
            out.out(piece, end="")
            out.file.flush()
    finally:
        if answer:
            out.out()
    return answer


def _questions() -> Iterator[str]:
    """What somebody types, until end of file or Ctrl-C."""
    typed = sys.stdin.isatty()
    if typed:
        err.print("[dim]A sealed chat. Ctrl-C cuts an answer off, Ctrl-D ends the chat.[/dim]")
        with suppress(ImportError):
            import readline  # noqa: F401, PLC0415 - gives `input` its history and line editing
    while True:
        try:
            question = input("> " if typed else "").strip()
        except (EOFError, KeyboardInterrupt):
            if typed:
                out.out()
            return
        if question:
            yield question


@manifest_app.command("show")
def manifest_show(url: Url = None, as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False) -> None:
    """Fetch the manifest, verify it against the pinned root, and print it."""
    manifest = fetch_manifest(url)
    if as_json:
        typer.echo(json.dumps(manifest.members(), indent=2))
        return
    out.print(f"{manifest.issuer}, version {manifest.version}, valid until {_date(manifest.expires_at)}")
    table = Table("pool", "models", "key", "KEM", "seal until", "shapes")
    for name, pool in manifest.pools.items():
        for key in pool.keys:
            row = (name, ", ".join(pool.models), str(key.config.key_id), key.config.kem.label, _date(key.not_after))
            table.add_row(*row, ", ".join(pool.shapes))
    out.print(table)


def _date(seconds: float) -> str:
    return datetime.fromtimestamp(seconds, UTC).strftime("%Y-%m-%d %H:%M UTC")


def _tell(error: LacreError) -> None:
    err.print(f"error: {error}", style="red", markup=False, soft_wrap=True)


def main() -> None:
    """The console script."""
    for entry in entry_points(group=GROUP):
        entry.load()(app)
    try:
        app()
    except LacreError as exc:
        _tell(exc)
        sys.exit(1)
    except BrokenPipeError:
        sys.exit(1)
