"""Files for this user alone: 0600 from the start, written whole or not at all, refused if others can read them."""

from __future__ import annotations

import os
import shlex
import stat
import tempfile
from collections.abc import Callable
from io import FileIO
from pathlib import Path

from lacre.errors import SettingsError

_OTHERS = stat.S_IRWXG | stat.S_IRWXO


def opener(path: str, flags: int) -> int:
    """For `open`: a file that it makes is 0600."""
    return os.open(path, flags, 0o600)


def replace(path: Path, content: bytes | bytearray, discard: Callable[[Path], None] = Path.unlink) -> None:
    """Puts a file with this content at `path`, in one step; a crash leaves the old one or the new one. Raises OSError.

    discard: removes an unfinished file.
    """
    new = _begin(path, content, discard)
    try:
        new.replace(path)
    except BaseException:
        discard(new)
        raise
    sync_folder(path.parent)  # the rename itself must survive a crash


def create(path: Path, content: bytes | bytearray, discard: Callable[[Path], None] = Path.unlink) -> None:
    """As `replace`, but only if nothing is at `path`. Raises FileExistsError, or another OSError.

    Of several processes that start at once, one wins, and all others can then read the file whole.
    """
    new = _begin(path, content, discard)
    try:
        os.link(new, path)
    except BaseException:
        discard(new)
        raise
    new.unlink()
    sync_folder(path.parent)


def _begin(path: Path, content: bytes | bytearray, discard: Callable[[Path], None]) -> Path:
    """A file beside `path` that holds the content, on disk."""
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")  # 0600 from the start
    new = Path(name)
    try:
        with os.fdopen(handle, "wb", buffering=0) as file:  # a buffer of Python's would keep a copy
            write_all(file, content)
    except BaseException as exc:
        discard(new)
        if isinstance(exc, OSError) and exc.filename is None:
            exc.filename = str(path)  # a failed write does not name its file
        raise
    return new


def write_all(file: FileIO, content: bytes | bytearray) -> None:
    """All of it, and onto the disk. Raises OSError."""
    written = 0
    with memoryview(content) as view:
        while written < len(view):
            written += file.write(view[written:])
    os.fsync(file.fileno())


def sync_folder(path: Path) -> None:
    """Puts the names in a folder onto the disk, where the system can. Raises OSError."""
    if os.name == "nt":  # Windows cannot open a folder
        return
    folder = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


def check(path: Path, mode: int, others: int = _OTHERS) -> None:
    """mode: the file's, as `os.stat` gives it. others: the bits that may not be set. Raises SettingsError."""
    if mode & others:
        raise SettingsError(f"{path} can be read by others (mode {stat.S_IMODE(mode):04o}): chmod 600 {shlex.quote(str(path))}")
