"""How the command speaks: two consoles, progress, dates, errors and their exit codes."""

from __future__ import annotations

import re
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from typing import Annotated, Final

import typer
from rich.console import Console

from lacre import errors

out = Console(highlight=False, markup=False)  # what comes from elsewhere is text, and no markup of ours
err = Console(stderr=True, highlight=False)

Url = Annotated[str | None, typer.Option(help="The connection string.", envvar="LACRE_URL", show_envvar=True)]
PoolName = Annotated[str, typer.Option("--pool", help="The pool of workers.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON.")]

# By the branch of the error: docs/using.md has this table, and a test holds one against the other.
EXIT_CODES: Final[dict[type[errors.LacreError], int]] = {
    errors.RefusedError: 3,
    errors.NetworkError: 4,
    errors.VerificationError: 5,
    errors.ProtocolError: 6,
    errors.ApiError: 7,
}
FAILED: Final = 1

# C0 and C1 without tab and line feed: what moves a cursor, names a window or fills a clipboard.
_CONTROLS: Final = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")


def exit_code(error: errors.LacreError) -> int:
    return next((code for kind, code in EXIT_CODES.items() if isinstance(error, kind)), FAILED)


def tell(error: errors.LacreError) -> None:
    """The error, and what helps where the message does not say it yet."""
    message = printable(str(error))
    err.print(f"error: {message}", style="red", markup=False, soft_wrap=True)
    if error.remedy not in message:
        err.print(f"what helps: {printable(error.remedy)}", markup=False, soft_wrap=True)


def printable(text: str) -> str:
    """The text without what a terminal would obey."""
    return _CONTROLS.sub("�", text)


@contextmanager
def waiting(what: str) -> Iterator[None]:
    """Says what is waited for, to a person at a terminal, until it is over."""
    if err.is_terminal:
        with err.status(f"[dim]{what}[/dim]"):
            yield
    else:
        yield


def date(seconds: float) -> str:
    return datetime.fromtimestamp(seconds, UTC).strftime("%Y-%m-%d %H:%M UTC")


def ago(seconds: float) -> str:
    """A span of time in its largest unit."""
    for unit, size in (("d", 86400), ("h", 3600), ("min", 60)):
        if seconds >= 2 * size:
            return f"{seconds / size:.0f} {unit}"
    return f"{seconds:.0f} s"


def until(moment: float) -> str:
    """A date, and how far off it is."""
    left = moment - time.time()
    return f"{date(moment)} (in {ago(left)})" if left > 0 else f"{date(moment)} (past)"
