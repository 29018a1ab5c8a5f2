"""Prepares a command's surroundings: the standard streams, the terminal's size, the text of arguments.

Rules:
- A closed standard stream is filled in first, or a file or socket of ours would get its number. A closed stdin reads as empty.
  Writing to a closed stdout fails, as writing to a full disk does.
- A failed write to stdout is an error with an exit code. A failed write to stderr is ignored: the data counts.
- Input must be UTF-8. Output that stdout's encoding cannot express is escaped, so that no answer is lost.
- An impossible terminal size is ignored: with `COLUMNS=0`, rich prints nothing at all.
"""

from __future__ import annotations

import functools
import io
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, Final

from lacre.errors import SettingsError

# Below this, tables and help are unreadable. TERMINAL_WIDTH is typer's own, which fails on anything but a number.
MIN_SIZE: Final = {"COLUMNS": 20, "LINES": 2, "TERMINAL_WIDTH": 20}
MAX_SIZE: Final = 10_000  # columns or lines: no terminal has more, and rich pads lines to their full width
MAX_STDIN: Final = 64 * 2**20  # bytes: more than any request may hold; `yes | lacre ask` must not fill the memory
MAX_FILE: Final = 2**20  # bytes: requests, proofs, schemas and checkpoints have some thousand
STDOUT: Final = "<stdout>"  # in place of a file's name
_ERRORS: Final = "backslashreplace"  # as Python uses for stderr


class _Unfailing(io.TextIOWrapper):
    """A stderr whose failed writes are ignored: a message that nobody can read must not cost the answer."""

    def write(self, text: str) -> int:
        with suppress(OSError):
            super().write(text)
        return len(text)

    def flush(self) -> None:
        with suppress(OSError):
            super().flush()


class _Named(io.TextIOWrapper):
    """A stdout whose errors name it, as errors of files do."""

    def write(self, text: str) -> int:
        with _naming(STDOUT):
            return super().write(text)

    def flush(self) -> None:
        with _naming(STDOUT):
            super().flush()


@contextmanager
def _naming(name: str) -> Iterator[None]:
    try:
        yield
    except OSError as exc:
        exc.filename = name
        raise


def settle() -> None:
    """Makes the process's surroundings fit. Called once, at its start, before anything looks at them."""
    _settle_size(os.environ)
    closed = [number for number in range(3) if _fill(number)]
    if 0 in closed or sys.stdin is None:
        sys.stdin = open(0, encoding="utf-8", closefd=False)  # noqa: SIM115 - it stays open
    if 1 in closed or sys.stdout is None:
        sys.stdout = open(1, "w", encoding="utf-8", closefd=False)  # noqa: SIM115
    if isinstance(sys.stdout, io.TextIOWrapper):
        encoding, at_terminal = _encoding(sys.stdout), sys.stdout.isatty()
        sys.stdout = _Named(sys.stdout.detach(), encoding, _ERRORS, line_buffering=at_terminal)
    if 2 in closed or sys.stderr is None or isinstance(sys.stderr, io.TextIOWrapper):
        encoding = "utf-8" if sys.stderr is None else sys.stderr.encoding
        raw = io.FileIO(2, "w", closefd=False)
        sys.stderr = _Unfailing(io.BufferedWriter(raw), encoding, _ERRORS, line_buffering=True)


def _settle_size(variables: Any) -> None:
    for name, least in MIN_SIZE.items():
        said = variables.get(name)
        if said is None:
            continue
        fits = said.isascii() and said.isdecimal() and len(said) <= len(str(MAX_SIZE)) and least <= int(said) <= MAX_SIZE
        if not fits:
            del variables[name]


def _fill(number: int) -> bool:
    """Opens something under this number, if the standard stream is closed. Returns whether it was."""
    try:
        os.fstat(number)
    except OSError:
        # Opened for reading, so that writing to a closed stdout fails.
        handle = os.open(os.devnull, os.O_RDONLY if number < 2 else os.O_WRONLY)
        if handle != number:
            os.dup2(handle, number)
            os.close(handle)
        os.set_inheritable(number, True)
        return True
    return False


def _encoding(stream: io.TextIOWrapper) -> str:
    """The encoding to write in. A pipe in an ASCII locale carries any bytes, so it gets UTF-8.

    An ASCII terminal stays as it is: in UTF-8, some bytes would be control codes to it.
    """
    is_ascii = stream.encoding.lower().replace("_", "-") in ("ascii", "us-ascii", "ansi-x3.4-1968", "646")
    return "utf-8" if is_ascii and not stream.isatty() else stream.encoding


def read_stdin() -> str:
    """All of stdin; empty if it is a terminal or closed. Raises SettingsError."""
    return "" if sys.stdin.isatty() else stdin_text()


def stdin_text() -> str:
    """All of stdin, typed or piped. Raises SettingsError."""
    return utf8(_stdin(lambda stream: stream.read(MAX_STDIN + 1)), "stdin")


def stdin_lines() -> Iterator[str]:
    """The lines of stdin, as they come. Raises SettingsError."""
    number = 0
    while line := _stdin(lambda stream: stream.readline(MAX_STDIN + 1)):
        number += 1
        yield utf8(line, f"line {number} of stdin")


def _stdin(read: Callable[[Any], bytes]) -> bytes:
    stream = getattr(sys.stdin, "buffer", None)
    try:
        content = read(stream) if stream is not None else sys.stdin.read(MAX_STDIN + 1).encode("utf-8", "surrogateescape")
    except (OSError, ValueError) as exc:
        why = exc.strerror if isinstance(exc, OSError) else "it is closed"
        raise SettingsError(f"stdin cannot be read ({why}): pipe a text into it, or add </dev/null") from exc
    if len(content) > MAX_STDIN:
        raise SettingsError(f"stdin holds over {MAX_STDIN} bytes, more than a request may hold: send less text")
    return content


def read_file(path: Path, most: int = MAX_FILE) -> bytes:
    """A whole file that the command line names. Raises SettingsError, also for one of over `most` bytes: some have no end."""
    try:
        with path.open("rb") as file:
            content = file.read(most + 1)
    except OSError as exc:
        raise SettingsError(f"cannot read {path} ({exc.strerror}): name a file that this user may read") from exc
    if len(content) > most:
        raise SettingsError(f"{path} holds over {most} bytes: name another file")
    return content


def utf8(content: bytes, what: str) -> str:
    """The text. what: names the source in the error. Raises SettingsError, which shows none of the content."""
    try:
        return content.decode()
    except UnicodeDecodeError as exc:
        raise SettingsError(
            f"{what} is not UTF-8 (at byte {exc.start + 1}): convert it first; `iconv -f latin1 -t utf-8` does so for Latin-1"
        ) from None  # the cause's text would show the content


def argument(value: str, what: str) -> str:
    """An argument's text. Raises SettingsError if its bytes are not UTF-8.

    Python decodes arguments by the locale. Encoding them again gives the bytes that were typed.
    """
    if value.isascii():
        return value
    try:
        return utf8(os.fsencode(value), what)
    except UnicodeEncodeError:
        return value  # a default of our own, outside the locale's characters


def check_texts(command: Any) -> Any:
    """Makes a click command, and all below it, check its text arguments with `argument`. Paths may hold any bytes, but one."""
    for parameter in getattr(command, "params", ()):
        _refuse_empty_path(parameter)
    callback = command.callback
    if callback is not None:

        @functools.wraps(callback)
        def checked(*args: Any, **values: Any) -> Any:
            return callback(*args, **{name: _text(value, name) for name, value in values.items()})

        command.callback = checked
    for each in getattr(command, "commands", {}).values():
        check_texts(each)
    return command


def _refuse_empty_path(parameter: Any) -> None:
    """`--state "$UNSET"` must not mean the current folder, which is what an empty path is to Python."""
    process = parameter.process_value

    def checked(context: Any, value: Any) -> Any:
        found = process(context, value)
        for each, path in zip(_several(value), _several(found), strict=False):
            if each == "" and isinstance(path, Path):
                raise SettingsError(f"the argument {parameter.name} is an empty path: name a file or folder, or omit it")
        return found

    parameter.process_value = checked


def _several(value: Any) -> tuple[Any, ...]:
    return tuple(value) if isinstance(value, list | tuple) else (value,)


def _text(value: Any, name: str) -> Any:
    if isinstance(value, str):
        return argument(value, f"the argument {name}")
    if isinstance(value, list | tuple):
        return type(value)(_text(each, name) for each in value)
    return value
