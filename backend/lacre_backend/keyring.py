"""The pool's private keys that this worker holds: what is in their folder, no more and no less.

Rules:
- A key that appears in the folder is taken up, before anybody seals to it: presence tells which keys are held.
- A key that disappears from it is destroyed here too: its secret is overwritten in this process's memory.
- A folder that cannot be read, or has no key at all, is a fault and no order: what is held is kept, and the log says so.
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from pathlib import Path
from typing import Final

import structlog

from lacre.errors import SettingsError
from lacre.manifest import fingerprint
from lacre.wire.opening import PrivateKey
from lacre_fabric import poolkeys

LOOK: Final = 1.0  # seconds between looks into the folder

log = structlog.get_logger("lacre.keys")

_Stamp = tuple[int, int, int, int]  # of a file: another one means other content, or other rights


class KeyRing:
    """Raises SettingsError where the folder holds no key, or one that cannot be read, to begin with."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._stamps: dict[Path, _Stamp] = {}
        self._keys: dict[Path, PrivateKey] = {}
        self._empty = False
        for path, stamp in _stamps(folder).items():
            self._keep(path, stamp, poolkeys.read(path))
        if not self._keys:
            raise SettingsError(f"{folder} holds no pool key: `lacre keys init` makes one")

    @property
    def keys(self) -> Mapping[int, PrivateKey]:
        return {key.config.key_id: key for key in self._keys.values()}

    def fingerprints(self) -> tuple[str, ...]:
        return tuple(fingerprint(key.config) for key in self._keys.values())

    def reload(self) -> bool:
        """Looks into the folder. Whether a key was taken up."""
        stamps = _stamps(self._folder)
        if not stamps:
            if not self._empty:
                log.warning("keys.folder_empty", remedy="put the pool's keys back: those that are held go on")
            self._empty = True
            return False
        self._empty = False
        taken_up = [path for path, stamp in stamps.items() if self._stamps.get(path) != stamp and self._take_up(path, stamp)]
        for path in self._keys.keys() - stamps.keys():
            self._drop(path)
        return bool(taken_up)

    async def watch(self) -> None:
        while True:
            await asyncio.sleep(LOOK)
            self.reload()

    def close(self) -> None:
        for path in tuple(self._keys):
            self._drop(path)

    def _take_up(self, path: Path, stamp: _Stamp) -> bool:
        self._stamps[path] = stamp  # a file that cannot be used is looked at again when it changed
        try:
            key = poolkeys.read(path)
        except SettingsError as exc:
            log.warning("key.unreadable", kind=type(exc).__name__, remedy="see that the worker may read the pool's keys")
            return False
        self._drop(path)
        self._keep(path, stamp, key)
        return True

    def _keep(self, path: Path, stamp: _Stamp, key: PrivateKey) -> None:
        self._stamps[path], self._keys[path] = stamp, key
        log.info("key.taken_up", key_id=key.config.key_id)

    def _drop(self, path: Path) -> None:
        self._stamps.pop(path, None)
        key = self._keys.pop(path, None)
        if key is not None:
            key.destroy()
            log.info("key.destroyed", key_id=key.config.key_id)


def _stamps(folder: Path) -> dict[Path, _Stamp]:
    stamps = {}
    for path in poolkeys.files(folder):
        try:
            status = path.stat()
        except OSError:
            continue  # gone between two looks
        stamps[path] = (status.st_mtime_ns, status.st_ino, status.st_size, status.st_mode)
    return stamps
