"""Opens a file of the console in SQLite, also if the disk has none or a damaged one. Nothing depends on such a file."""

from __future__ import annotations

import sqlite3
from collections.abc import Callable
from pathlib import Path

from lacre_fabric.logs import Log

Prepare = Callable[[sqlite3.Connection], None]


def opened(
    path: Path, prepare: Prepare, damaged: Callable[[sqlite3.DatabaseError], None], log: Log, in_memory: str
) -> sqlite3.Connection:
    """The file; a new one if that one is damaged; or one in memory if there can be none. To be used in any thread.

    prepare: sets limits, and makes the tables. It raises sqlite3.DatabaseError for a damaged file, which `damaged` removes.
    in_memory: what the log calls it.
    """
    for _ in range(2):
        try:
            return _open(path, prepare)
        except sqlite3.DatabaseError as exc:
            damaged(exc)
        except OSError as exc:
            log.warning(in_memory, reason=f"{path}: {exc.strerror}")
            break
    database = sqlite3.connect(":memory:", check_same_thread=False)
    prepare(database)
    return database


def _open(path: Path, prepare: Prepare) -> sqlite3.Connection:
    """Raises sqlite3.DatabaseError or OSError."""
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    path.touch(mode=0o600)
    database = sqlite3.connect(path, check_same_thread=False)
    try:
        prepare(database)
    except BaseException:
        database.close()
        raise
    return database
