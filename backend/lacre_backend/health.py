"""How a worker is, in a file: it has no port that could be asked.

    python -m lacre_backend.health --settings FILE [--ready]

looks at the file that the settings name as `health`. The worker writes it anew each second, from the loop that takes work: a
file that has grown old means a process that stands still. Without `--ready` that alone counts, and is what to restart a
container by. With it the worker must also be connected, and not drain.
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
STALE: Final = 10.0  # seconds: a machine under load is late, and is not restarted for it
READY: Final = "ready"


async def tell(path: Path, state: Callable[[], str]) -> None:
    """Writes what `state` says into the file, each second, until cancelled. A full disk makes it old, and ends nothing."""
    try:
        while True:
            with suppress(OSError):
                _write(path, state())
            await asyncio.sleep(EVERY)
    finally:
        _remove(path)


def _remove(path: Path) -> None:
    """The next process must not seem ready before it is."""
    path.unlink(missing_ok=True)


def _write(path: Path, text: str) -> None:
    beside = path.with_name(f".{path.name}.new")
    beside.write_text(text)
    beside.replace(path)


def wrong_with(path: Path, now: float, *, ready: bool) -> str | None:
    """None where all is well; otherwise what is not. now: seconds since the epoch."""
    try:
        age, state = now - path.stat().st_mtime, path.read_text()
    except OSError as exc:
        return f"{path}: {exc.strerror}: the worker has not started"
    if age > STALE:
        return f"the worker has stood still for {age:.0f} s"
    if ready and state != READY:
        return state
    return None


def main(arguments: list[str] | None = None) -> int:
    """The exit status: 0 for yes, 1 for no, with a line on stderr that says why."""
    parser = argparse.ArgumentParser(prog="lacre_backend.health", description="Look how the worker on this machine is.")
    parser.add_argument("--settings", type=Path, required=True, help="the worker's settings file")
    parser.add_argument("--ready", action="store_true", help="ask whether it can take work")
    chosen = parser.parse_args(arguments)
    try:
        path = load(chosen.settings).health
        wrong = "the settings name no file: add `health`" if path is None else wrong_with(path, time.time(), ready=chosen.ready)
    except SettingsError as exc:
        wrong = str(exc)
    if wrong is not None:
        print(wrong, file=sys.stderr)  # noqa: T201 - the one line that says why
    return 0 if wrong is None else 1


if __name__ == "__main__":
    sys.exit(main())
