"""Values from files that others replace while a process runs, such as renewed certificates. Nothing here knows what they hold.

Rules:
- A value is read whole before it replaces the last one. Files that cannot be used change nothing: the last good value stays.
- Files count as changed if one of them is another file, or was written or renamed. Symbolic links are followed, so it is also a
  change if a link leads elsewhere (Kubernetes swaps the link `..data`).
- `look` waits until the files stay the same for one look: of a certificate and its key, one is often written before the other.
- Files that were refused are read again at each look, because time or a permission may cure them. The reason is told once.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Final, Generic, TypeVar

from lacre.errors import SettingsError

EVERY: Final = 1.0  # seconds between looks: a few calls of stat(2) each

T = TypeVar("T")
_File = tuple[int, int, int, int, int] | None
# Called with None after new files were taken, or with the reason why they were refused.
Tell = Callable[[str | None], None]


def _state(paths: Sequence[Path]) -> tuple[_File, ...]:
    return tuple(_file(path) for path in paths)


def _file(path: Path) -> _File:
    """None if it is missing or out of reach."""
    try:
        status = path.stat()
    except OSError:
        return None
    return status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns


class WatchedFiles(Generic[T]):
    """value: of the last files that could be used. fault: why newer files were refused; empty if there are none."""

    def __init__(self, paths: Iterable[Path], read: Callable[[], T], tell: Tell = lambda _reason: None) -> None:
        """read: raises SettingsError for files that cannot be used. It raises here too: there is no last good value yet."""
        self._paths = tuple(paths)
        self._read = read
        self._tell = tell
        self._lock = threading.RLock()  # a slow reader must not put an older value over a newer one
        self._seen = self._tried = _state(self._paths)  # before reading: a later change must not go unnoticed
        self.fault = ""
        self.value = read()

    def look(self) -> bool:
        """Takes new files once they have come to rest. Returns whether the value is a new one."""
        with self._lock:
            now = _state(self._paths)
            rests, self._seen = now == self._seen, now
            return rests and (now != self._tried or bool(self.fault)) and self._take(now)

    def refresh(self) -> bool:
        """Takes new files now, just before they are needed. Returns whether the value is a new one."""
        with self._lock:
            now = _state(self._paths)
            return now != self._tried and self._take(now)

    def _take(self, now: tuple[_File, ...]) -> bool:
        self._tried = now
        try:
            self.value = self._read()
        except SettingsError as exc:
            if str(exc) != self.fault:
                self.fault = str(exc)
                self._tell(self.fault)
            return False
        self.fault = ""
        self._tell(None)
        return True


async def watch(files: Callable[[], Iterable[WatchedFiles[T]]], *, every: float = EVERY) -> None:
    """Looks at all of them, forever. files: those to look at now. every: seconds."""
    while True:
        await asyncio.sleep(every)
        for each in tuple(files()):
            await asyncio.to_thread(each.look)  # a file may be on a network
