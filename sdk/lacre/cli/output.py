"""What the command prints: data, tables, progress, dates, errors and their exit codes.

Rules:
- Data goes to stdout unchanged, by `write` and `say`. It never passes rich, which folds, colours and cuts.
- rich draws only at a terminal. The stream decides whether there is one; `FORCE_COLOR` does not.
- Work of over two seconds shows a bar or a spinner, on stderr. What a command writes to a pipe meanwhile goes to the pipe: rich
  would take it to the terminal.
"""

from __future__ import annotations

import csv
import io
import re
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime
from functools import cache
from typing import Annotated, Any, Final, TypeVar

import typer
from rich.cells import cell_len
from rich.console import Console
from rich.table import Table

from lacre import errors
from lacre.runtime.json_text import shown

_Item = TypeVar("_Item")
_COUNTED: Final = 256  # items between two looks of the bar: each look takes longer than an item
Url = Annotated[str | None, typer.Option(help="The connection string.", envvar="LACRE_URL", show_envvar=True)]
PoolName = Annotated[
    str | None,
    typer.Option(
        "--pool", help="The pool of workers. Default: as the manifest routes the model, or `default`.", metavar="POOL"
    ),
]
PinModel = Annotated[
    list[str] | None,
    typer.Option(
        metavar="NAME=DIGEST", help="Refuse answers by another file of this model; may be repeated. Default: LACRE_PIN_MODELS."
    ),
]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON.")]

# By the branch of the error: docs/command.md has this table, and a test compares them.
EXIT_CODES: Final[dict[type[errors.LacreError], int]] = {
    errors.RefusedError: 3,
    errors.NetworkError: 4,
    errors.VerificationError: 5,
    errors.ProtocolError: 6,
    errors.ApiError: 7,
}
FAILED: Final = 1
# Remedies that only point to the message.
_IN_THE_MESSAGE: Final = {kind.remedy for kind in (errors.LacreError, errors.UsageError, errors.SettingsError)}

# C0 and C1 without tab and line feed: they move the cursor, name a window or fill a clipboard.
_CONTROLS: Final = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")


_FORMULAS: Final = frozenset("=+-@\t\r")  # how a formula begins, to a spreadsheet


def pins(given: Sequence[str] | None) -> dict[str, str] | None:
    """The client's `pin_models`. None: those of LACRE_PIN_MODELS. Raises SettingsError."""
    from lacre.client.settings import pins_from

    return pins_from(given, "--pin-model") if given else None


def exit_code(error: errors.LacreError) -> int:
    return next((code for kind, code in EXIT_CODES.items() if isinstance(error, kind)), FAILED)


@cache
def out() -> Console:
    """The terminal on stdout. Text of others is never markup."""
    return Console(highlight=False, markup=False)


@cache
def err() -> Console:
    """For messages beside the data."""
    return Console(stderr=True, highlight=False)


def at_terminal() -> bool:
    """Whether stdout is a terminal."""
    return sys.stdout.isatty()


def write(text: str) -> None:
    """Writes data unchanged, but to a terminal without control characters. When this returns, the data has left the process."""
    sys.stdout.write(printable(text) if at_terminal() else text)
    sys.stdout.flush()


def say(text: str) -> None:
    """Writes data, and a line end."""
    write(text + "\n")


def say_json(value: Any, *, indent: int | None = None) -> None:
    """Writes JSON. What could control a terminal is escaped; if stdout is not UTF-8, everything beyond ASCII is."""
    ours = (sys.stdout.encoding or "").lower().replace("-", "") == "utf8"
    say(shown(value, indent=indent, ascii_only=not ours, default=_in_json))


def _in_json(value: object) -> str:
    """Values that JSON has no form for: bytes, as an SQL query may return, become hexadecimal."""
    return value.hex() if isinstance(value, bytes) else str(value)


def say_table(headings: Sequence[str], rows: Iterable[Sequence[str]], *, styles: Sequence[str | None] = ()) -> None:
    """Writes a table: drawn at a terminal; in a pipe, one line for each row, never folded. styles: of the drawn rows."""
    cells = [tuple(" ".join(printable(cell).split()) for cell in row) for row in rows]
    if at_terminal():
        out().print(_drawn(headings, cells, styles))
        return
    lines = [tuple(headings), *cells] if any(headings) else cells
    widths = [max(map(cell_len, column)) for column in zip(*lines, strict=True)]
    for line in lines:
        padded = (cell + " " * (width - cell_len(cell)) for cell, width in zip(line, widths, strict=True))
        say("  ".join(padded).rstrip())


def say_csv(headings: Sequence[str], rows: Iterable[Sequence[str]]) -> None:
    """Writes CSV (RFC 4180). A cell that a spreadsheet would take for a formula gets an apostrophe: names may be foreign."""
    text = io.StringIO()
    lines = csv.writer(text)
    lines.writerow(headings)
    lines.writerows([f"'{cell}" if cell[:1] in _FORMULAS else cell for cell in row] for row in rows)
    write(text.getvalue())


def _drawn(headings: Sequence[str], rows: Sequence[Sequence[str]], styles: Sequence[str | None]) -> Table:
    table = Table() if any(headings) else Table(show_header=False, box=None, pad_edge=False)
    for heading in headings:
        table.add_column(heading, overflow="fold")  # rich's default cuts off long words
    for i, row in enumerate(rows):
        table.add_row(*row, style=styles[i] if i < len(styles) else None)
    return table


def tell(error: errors.LacreError) -> None:
    """Prints the error with its request id, by which the operator finds it, and the remedy unless the message has it."""
    message = printable(str(error))
    err().print(f"error: {message}", style="red", markup=False, soft_wrap=True)
    if error.remedy not in message and error.remedy not in _IN_THE_MESSAGE:
        err().print(f"what helps: {printable(error.remedy)}", markup=False, soft_wrap=True)


def error_members(error: errors.LacreError) -> dict[str, Any]:
    """For JSON. request_id: by which the gateway's operator finds the reason in the log; None if no gateway answered."""
    told = {"type": type(error).__name__, "message": str(error), "remedy": error.remedy}
    return {**told, "request_id": error.request_id}


def printable(text: str) -> str:
    """The text without the characters that control a terminal."""
    return _CONTROLS.sub("�", text)


@contextmanager
def waiting(what: str) -> Iterator[None]:
    """Tells a person at a terminal what the command waits for, until it is over."""
    if not sys.stderr.isatty():
        yield
        return
    from rich.live import Live
    from rich.spinner import Spinner

    with Live(Spinner("dots", f"[dim]{what}[/dim]"), console=err(), transient=True, redirect_stdout=at_terminal()):
        yield


def counting(what: str, items: Iterable[_Item], total: Callable[[], int]) -> Iterator[_Item]:
    """The items, and at a terminal a bar of how many there were. total: about how many there are; asked at a terminal only."""
    if not sys.stderr.isatty():
        yield from items
        return
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn("[dim]{task.description}[/dim]"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=err(), transient=True, redirect_stdout=at_terminal()) as progress:
        bar = progress.add_task(what, total=total())
        for number, item in enumerate(items, 1):
            yield item
            if number % _COUNTED == 0:
                progress.update(bar, completed=number)


def date(seconds: float) -> str:
    return datetime.fromtimestamp(seconds, UTC).strftime("%Y-%m-%d %H:%M UTC")


def ago(seconds: float) -> str:
    """A span of time in its largest unit."""
    for unit, size in (("d", 86400), ("h", 3600), ("min", 60)):
        if seconds >= 2 * size:
            return f"{seconds / size:.0f} {unit}"
    return f"{seconds:.0f} s"


def until(moment: float) -> str:
    """A date, and how far away it is."""
    left = moment - time.time()
    return f"{date(moment)} (in {ago(left)})" if left > 0 else f"{date(moment)} (past)"
