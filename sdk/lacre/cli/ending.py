"""How a command ends: all output written, an exit code that says what happened, and no traceback.

Rules:
- Exit code 0 means that everything was written to stdout.
- If the system refuses something (a file, a folder, a full disk), the error names it and says what helps.
- With `--json`, an error goes to stdout as JSON too, wherever it came from: no command does this itself.
- A reader that closes the pipe early (`| head`) is told nothing. The exit code is 1, because it did not get everything.
"""

from __future__ import annotations

import errno
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from itertools import takewhile
from typing import Final, NoReturn

from lacre.cli import surroundings
from lacre.cli.output import FAILED, error_members, exit_code, say_json, tell
from lacre.errors import LacreError, OutputError, SettingsError

INTERRUPTED: Final = 130  # as a shell says it


def run(command: Callable[[], object]) -> NoReturn:
    """Runs a command, and ends the process with its exit code."""
    surroundings.settle()
    code = FAILED
    try:
        code = _code(command)
        sys.stdout.flush()
    except LacreError as exc:
        code = _told(exc)
    except BrokenPipeError:
        code = FAILED
    except KeyboardInterrupt:  # before typer has begun, or after it has ended
        code = INTERRUPTED
    except OSError as exc:
        code = _told(explained(exc))
    _give_up_output()
    sys.exit(code)


def _told(error: LacreError) -> int:
    if wants_json(sys.argv[1:]) and not isinstance(error, OutputError):
        with suppress(OSError):  # the error's own exit code counts more
            say_json({"error": error_members(error)})
    tell(error)
    return exit_code(error)


def wants_json(arguments: Sequence[str]) -> bool:
    """Whether the command was called with `--json`. A command without this option refuses it before it does anything."""
    return "--json" in takewhile(lambda each: each != "--", arguments)


def _code(command: Callable[[], object]) -> int:
    try:
        command()
    except SystemExit as ended:  # typer's commands end this way, successful or not
        if isinstance(ended.code, str):
            print(ended.code, file=sys.stderr)  # noqa: T201 - as Python itself does
            return 1
        return ended.code or 0
    return 0


def _give_up_output() -> None:
    """Drops output that cannot be written: Python would try again at its exit, and change the exit code to 120."""
    try:
        sys.stdout.flush()
    except OSError:
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, 1)
        os.close(nowhere)


def explained(error: OSError) -> LacreError:
    """An operating system error as one of ours. It shows the file's name: the caller of the command chose it."""
    why = error.strerror or type(error).__name__
    if error.filename == surroundings.STDOUT:
        return OutputError(f"the output cannot be written ({why})")
    helps = _REMEDIES.get(error.errno or 0, "check that it exists, and that this user may read and write it")
    place = "a file cannot be used" if error.filename is None else f"{_shown(error.filename)} cannot be used"
    return SettingsError(f"{place} ({why}): {helps}")


_REMEDIES: Final[Mapping[int, str]] = {
    errno.ENOSPC: "free some space there, or name another folder",
    errno.EDQUOT: "free some space there, or name another folder",
    errno.EFBIG: "allow this process larger files (ulimit -f), or name another folder",
    errno.EROFS: "name a folder that can be written",
    errno.EMFILE: "allow this process more open files (ulimit -n)",
    errno.ENFILE: "end the processes that hold so many files open on this machine",
}


def _shown(name: object) -> str:
    return os.fsdecode(name) if isinstance(name, str | bytes) else str(name)
