"""The pool's private keys of this worker: exactly those in the pool's key folder.

Rules:
- A key that appears in the folder is loaded before any client seals to it: presence announces the loaded keys.
- A key that disappears is destroyed here too: its secret is overwritten in this process's memory.
- A key may come with a receipt key of its own, `NUMBER.receipt`. It is then loaded with it, or not at all.
- A folder that cannot be read or has no key is a fault, not an order. Loaded keys stay, and the fault is logged.
- A loaded key stays when the KMS that wrapped it no longer releases it. The next start then fails. To end it at once, remove
  its file.
"""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

import structlog
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from lacre.errors import LacreError, SettingsError
from lacre.jose.jws import raw_public_key
from lacre.trust.manifest import fingerprint
from lacre.wire.opening import PrivateKey
from lacre_fabric.keys import pool_keys
from lacre_fabric.keys.kms import KmsError
from lacre_fabric.keys.kms.wrapping import Keeping
from lacre_fabric.work.presence import receipts_by

LOOK: Final = 1.0  # seconds between checks of the folder
AGAIN: Final = 30.0  # seconds until a KMS that refused a key is asked again: a permission may come late

log = structlog.get_logger("lacre.keys")

_Stamp = tuple[int, ...]  # of a key's files: another one means other content or permissions


@dataclass(frozen=True, slots=True)
class _Held:
    """A key, and the key that signs the receipts of requests for it, if it has its own."""

    key: PrivateKey
    receipts: Ed25519PrivateKey | None = field(default=None, repr=False)


@dataclass(frozen=True, slots=True)
class _Refused:
    """A file that could not be used, why, and until when (monotonic) it is not tried again unless it changes."""

    stamp: _Stamp
    kind: type[LacreError]
    until: float


class KeyRing:
    """The pool keys that this worker holds, loaded from their folder.

    Raises SettingsError if the folder has no key at the start, or one that cannot be read. Raises KmsError if the KMS does not
    unwrap one. again: seconds until a key that the KMS refused later is tried again.
    """

    def __init__(self, folder: Path, keeping: Keeping = pool_keys.AS_THEY_ARE, *, again: float = AGAIN) -> None:
        self._folder, self._keeping, self._again = folder, keeping, again
        self._stamps: dict[Path, _Stamp] = {}
        self._keys: dict[Path, _Held] = {}
        self._empty = False
        self._refused: dict[Path, _Refused] = {}
        for path, stamp in _stamps(folder).items():
            self._keep(path, stamp, _read(path, keeping))
        if not self._keys:
            raise SettingsError(f"{folder} holds no pool key: create one with `lacre keys init`")

    @property
    def keys(self) -> Mapping[int, PrivateKey]:
        return {held.key.config.key_id: held.key for held in self._keys.values()}

    @property
    def receipt_keys(self) -> Mapping[int, Ed25519PrivateKey]:
        """By the id of the key that they belong to. Keys without their own are not in it."""
        return {held.key.config.key_id: held.receipts for held in self._keys.values() if held.receipts is not None}

    def fingerprints(self) -> tuple[str, ...]:
        """What presence announces: each key, and each receipt key that belongs to it."""
        keys = [fingerprint(held.key.config) for held in self._keys.values()]
        return (*keys, *(receipts_by(key, public) for key, public in self.receipts().items()))

    def receipts(self) -> dict[str, bytes]:
        """The public part of the receipt key of each key that has its own, by the key's fingerprint."""
        return {
            fingerprint(held.key.config): raw_public_key(held.receipts)
            for held in self._keys.values()
            if held.receipts is not None
        }

    def reload(self) -> bool:
        """Checks the folder. Returns whether a key was loaded."""
        taken_up = [self._take_up(path, stamp, self._read(path)) for path, stamp in self._changes()]
        return any(taken_up)

    async def look(self) -> None:
        """As `reload`, but without blocking: a KMS is slow, and answers in progress continue meanwhile."""
        for path, stamp in self._changes():
            self._take_up(path, stamp, await asyncio.to_thread(self._read, path))

    def _changes(self) -> list[tuple[Path, _Stamp]]:
        """The files to read. Destroys keys whose files are gone."""
        stamps = _stamps(self._folder)
        if not stamps:
            if not self._empty:
                log.warning("keys.folder_empty", remedy="put the pool's keys back: loaded keys stay in use")
            self._empty = True
            return []
        self._empty = False
        for path in self._keys.keys() - stamps.keys():
            self._drop(path)
        now = time.monotonic()
        return [
            (path, stamp)
            for path, stamp in stamps.items()
            if self._stamps.get(path) != stamp and not self._set_aside(path, stamp, now)
        ]

    def _set_aside(self, path: Path, stamp: _Stamp, now: float) -> bool:
        refused = self._refused.get(path)
        return refused is not None and refused.stamp == stamp and now < refused.until

    async def watch(self) -> None:
        while True:
            await asyncio.sleep(LOOK)
            await self.look()

    def close(self) -> None:
        for path in tuple(self._keys):
            self._drop(path)

    def _read(self, path: Path) -> _Held | LacreError:
        try:
            return _read(path, self._keeping)
        except (SettingsError, KmsError) as exc:
            return exc

    def _take_up(self, path: Path, stamp: _Stamp, held: _Held | LacreError) -> bool:
        if isinstance(held, LacreError):
            self._set_back(path, stamp, held)
            return False
        self._drop(path)
        self._keep(path, stamp, held)
        return True

    def _set_back(self, path: Path, stamp: _Stamp, why: LacreError) -> None:
        """Schedules the next try of an unusable file: when it changes, or if a KMS is involved, after a while."""
        before = self._refused.get(path)
        if before is None or before.stamp != stamp or before.kind is not type(why):
            remedy = why.remedy if isinstance(why, KmsError) else "check that the worker may read the pool's keys"
            log.warning("key.unreadable", kind=type(why).__name__, remedy=remedy)
        wait = math.inf if self._keeping.kms is None else self._again
        if isinstance(why, KmsError) and why.retryable:
            wait = 0.0
        self._refused[path] = _Refused(stamp, type(why), time.monotonic() + wait)

    def _keep(self, path: Path, stamp: _Stamp, held: _Held) -> None:
        self._stamps[path], self._keys[path] = stamp, held
        self._refused.pop(path, None)
        log.info("key.taken_up", key_id=held.key.config.key_id)

    def _drop(self, path: Path) -> None:
        self._stamps.pop(path, None)
        held = self._keys.pop(path, None)
        if held is not None:
            held.key.destroy()
            log.info("key.destroyed", key_id=held.key.config.key_id)


def _read(path: Path, keeping: Keeping) -> _Held:
    """Raises SettingsError or KmsError."""
    own = pool_keys.receipt_file(path.parent, path.stem)
    receipts = pool_keys.read_receipt_key(own, keeping) if own.exists() else None
    return _Held(pool_keys.read(path, keeping), receipts)


def _stamps(folder: Path) -> dict[Path, _Stamp]:
    stamps = {}
    for path in pool_keys.files(folder):
        if (stamp := _stamp(path)) is not None:
            own = pool_keys.receipt_file(folder, path.stem)
            stamps[path] = (*stamp, *(_stamp(own) or ()))
    return stamps


def _stamp(path: Path) -> _Stamp | None:
    try:
        status = path.stat()
    except OSError:
        return None  # removed since the folder was listed, or not there
    return status.st_mtime_ns, status.st_ino, status.st_size, status.st_mode
