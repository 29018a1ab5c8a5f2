"""A worker's state in a file, because it has no port to ask.

    python -m lacre_backend.health --settings FILE [--ready]

It reads the file that the settings name as `health`. The worker rewrites it each second, from the loop that takes work. So an
old file means a process that is stuck. Without `--ready` only the age counts: use this to decide about a container's restart.
With `--ready` the worker must also be connected and not draining.

The first line is the state. A worker with an upstream adds a line for each of its servers, which the command prints.
"""

from __future__ import annotations

import argparse
import asyncio
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Final

from lacre.errors import SettingsError
from lacre_backend.settings import load

EVERY: Final = 1.0  # seconds
STALE: Final = 10.0  # seconds: a machine under load may be late, and must not be restarted for it
READY: Final = "ready"


async def tell(path: Path, state: Callable[[], str]) -> None:
    """Writes the result of `state` into the file each second, until cancelled. On a full disk the file gets old, and nothing
    else happens.
    """
    try:
        while True:
            with suppress(OSError):
                _write(path, state())
            await asyncio.sleep(EVERY)
    finally:
        _remove(path)


def _remove(path: Path) -> None:
    """Removes the file, so that the next process does not seem ready too early."""
    path.unlink(missing_ok=True)


def _write(path: Path, text: str) -> None:
    beside = path.with_name(f".{path.name}.new")
    beside.write_text(text)
    beside.replace(path)


def wrong_with(path: Path, now: float, *, ready: bool) -> str | None:
    """None if all is well; otherwise the fault. now: seconds since the epoch."""
    try:
        age, state = now - path.stat().st_mtime, path.read_text()
    except OSError as exc:
        return f"{path}: {exc.strerror}: the worker has not started"
    if age > STALE:
        return f"the worker has been stuck for {age:.0f} s"
    if ready and (said := state.partition("\n")[0]) != READY:
        return said
    return None


def details(path: Path) -> str:
    """The lines after the state. Empty if there is no file."""
    try:
        return path.read_text().partition("\n")[2]
    except OSError:
        return ""


def main(arguments: list[str] | None = None) -> int:
    """The exit status: 0 for healthy, 1 otherwise, with the reason on stderr."""
    parser = argparse.ArgumentParser(prog="lacre_backend.health", description="Check the state of the worker on this machine.")
    parser.add_argument("--settings", type=Path, required=True, help="the worker's settings file")
    parser.add_argument("--ready", action="store_true", help="also check that it can take work")
    chosen = parser.parse_args(arguments)
    more = ""
    try:
        path = load(chosen.settings).health
        wrong = "the settings name no file: add `health`" if path is None else wrong_with(path, time.time(), ready=chosen.ready)
        more = "" if path is None else details(path)
    except SettingsError as exc:
        wrong = str(exc)
    if more:
        print(more)  # noqa: T201 - the servers of an upstream, with their counts
    if wrong is not None:
        print(wrong, file=sys.stderr)  # noqa: T201 - the one line that says why
    return 0 if wrong is None else 1


if __name__ == "__main__":
    sys.exit(main())
