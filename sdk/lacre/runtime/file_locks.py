"""Locks between processes. The kernel drops a lock when its process ends, so no lock outlives a crash."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Final

from lacre.errors import SettingsError

if TYPE_CHECKING:
    import filelock

_LOOK: Final = 0.01  # seconds between two tries to take the lock


def take(path: Path, busy: str, patience: float = 0.0) -> filelock.BaseFileLock:
    """The lock of the file at `path`, held until its `release()`.

    busy: the error's text if another process or thread holds it. patience: seconds to wait. Raises SettingsError, or OSError.
    """
    lock = attempt(path, patience)
    if lock is None:
        raise SettingsError(busy)
    return lock


def attempt(path: Path, patience: float = 0.0) -> filelock.BaseFileLock | None:
    """None if another process or thread holds the lock. Raises OSError."""
    import filelock  # noqa: PLC0415 - keeps `import lacre` fast

    # A soft lock would outlive its process, and someone would have to break it. Removing the file would break the lock.
    # thread_local: the thread that closes a log is not always the one that opened it.
    lock = filelock.FileLock(
        path, patience, 0o600, thread_local=False, poll_interval=_LOOK, fallback_to_soft=False, preserve_lock_file=True
    )
    try:
        lock.acquire()
    except filelock.Timeout:
        return None
    return lock


@contextmanager
def held(path: Path, busy: str, patience: float = 0.0) -> Iterator[None]:
    """As `take`, for a block."""
    lock = take(path, busy, patience)
    try:
        yield
    finally:
        lock.release()
