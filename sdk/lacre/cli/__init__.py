"""The `lacre` command. Its sub-commands come from the entry points in `lacre.commands`: an extra brings its own.

Rules:
- Data goes to stdout. Messages to a person (progress, errors, the lock line) go to stderr.
- Text from a model, a gateway or a manifest never reaches a terminal with its control characters.
- No secret is printed, except those that `lacre proxy` and `lacre token issue` are made to print.
- No secret is taken from an argument, except by `lacre token check`, which then warns.

Open `ask.py` first: the smallest command. `output.py` prints, and `surroundings.py` maps errors of files and streams.
"""

from __future__ import annotations

from collections.abc import Callable
from importlib.metadata import entry_points
from typing import Annotated, Final, NoReturn

from lacre._version import __version__

try:
    import typer

    from lacre.cli import ask, chat, explain, login, manifest, proxy, receipt, status, usage
    from lacre.cli.ending import run
    from lacre.cli.manifest import manifest_app
    from lacre.cli.surroundings import check_texts
except ModuleNotFoundError as exc:
    raise SystemExit("the lacre command needs an extra: pip install 'lacre[cli]'") from exc

__all__ = ["app", "beginnings", "main", "manifest_app"]

GROUP = "lacre.commands"

app = typer.Typer(
    name="lacre",
    help="Sealed access to self-hosted language models.",
    epilog="Exit codes: 0 done, 1 failed, 2 command line, 3 refused, 4 network, 5 not verified, 6 protocol, 7 model's server.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
)
# What other packages do before each command that is theirs, or may be: they set up their log.
beginnings: Final[list[Callable[[], None]]] = []

app.command()(chat.chat)
app.command()(ask.ask)
app.command()(explain.explain)
app.command()(status.status)
app.command()(usage.usage)
app.command()(proxy.proxy)
app.command()(login.login)
app.command()(login.logout)
_OWN: Final = frozenset({"chat", "ask", "explain", "status", "usage", "proxy", "login", "logout", "receipt"})
app.add_typer(receipt.receipt_app)
app.add_typer(manifest.manifest_app)  # to which another package adds


def _version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"lacre {__version__}")
        raise typer.Exit


@app.callback()
def root(
    context: typer.Context,
    version: Annotated[  # noqa: ARG001 - its callback reads it
        bool, typer.Option("--version", help="Print the version.", callback=_version, is_eager=True)
    ] = False,
) -> None:
    """Options of the command itself."""
    for begin in () if context.invoked_subcommand in _OWN else beginnings:
        begin()


def main() -> NoReturn:
    """The console script."""
    run(_command)


def register() -> None:
    """Adds the sub-commands of the other installed packages."""
    for entry in entry_points(group=GROUP):
        entry.load()(app)


def _command() -> None:
    register()
    check_texts(typer.main.get_command(app))()
