"""Remembers the newest manifest seen, for each lineage of roots, so that a client notices an older one.

`VersionFile` keeps it on disk: 0600, replaced atomically, under a lock between processes. `VersionMemory` keeps it in the
process, for places without a writable disk; then only the manifest's expiry limits a rollback.

Rules:
- `accept` verifies signatures and may wait for other processes: call it on a thread, never on an event loop.
- Nothing waits forever: if the lock stays taken, `accept` raises a `SettingsError` and accepts nothing.
"""

from __future__ import annotations

import json
import secrets
import threading
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Final, Protocol

from lacre.errors import LacreError, NewerFormat, SettingsError, UsageError
from lacre.jose.formats import Format
from lacre.jose.jws import b64u, b64u_decode
from lacre.runtime import arguments, file_locks, folders, forks, private_files
from lacre.trust.chain import Trusted, verify
from lacre.trust.rollback import Seen, newest, remember

SEEN: Final = Format("remembered manifest", "program (SDK, gateway or worker)")
LOCK_WAIT: Final = 10.0  # seconds to wait for others that hold the store; each needs some milliseconds
MAX_REMEMBERED: Final = 64 * 2**20  # bytes of the file: documents of the largest size for some fifty lineages
KEY_BYTES: Final = 32  # of `sticky_key`
_TAKEN: Final = "another process or thread has locked the stored manifests for too long: find it and end it"

Decide = Callable[[Sequence[Seen]], tuple[Trusted, tuple[Seen, ...]]]


class Memory(Protocol):
    """Keeps what was `Seen`. `update` is atomic: it gives `decide` all that is stored, and stores what `decide` returns."""

    def update(self, decide: Decide) -> Trusted: ...


def accept(document: bytes, root: bytes, memory: Memory, now: float) -> Trusted:
    """Verifies `document` against the pinned root and the manifests seen before, and remembers the newer one.

    Raises what `lacre.trust.chain.verify` raises, Rollback, and SettingsError if the memory cannot be used. now: seconds since
    the epoch. Takes milliseconds of processor time, and up to `LOCK_WAIT` for the memory.
    """
    candidate = verify(document, root, now)

    def decide(remembered: Sequence[Seen]) -> tuple[Trusted, tuple[Seen, ...]]:
        chosen = newest(candidate, remembered, now)
        return chosen, remember(chosen, remembered)

    return memory.update(decide)


def _decided(decide: Decide, before: Sequence[Seen]) -> tuple[Trusted, tuple[Seen, ...]]:
    arguments.function(decide, "decide")
    decision = decide(before)
    if not isinstance(decision, tuple) or len(decision) != 2 or not isinstance(decision[1], tuple):
        raise UsageError("decide must return the newest trusted manifest, and a tuple of manifests to remember")
    return decision


class VersionMemory:
    """In this process only. patience: seconds to wait for other threads."""

    def __init__(self, *, patience: float = LOCK_WAIT) -> None:
        self._patience = patience
        self._seen: tuple[Seen, ...] = ()
        self._lock = threading.Lock()
        forks.watch(self)

    def after_fork(self) -> None:
        self._lock = threading.Lock()

    def update(self, decide: Decide) -> Trusted:
        if not self._lock.acquire(timeout=self._patience):
            raise SettingsError(_TAKEN)
        try:
            trusted, self._seen = _decided(decide, self._seen)
        finally:
            self._lock.release()
        return trusted


class VersionFile:
    """In a folder of its own. Raises SettingsError if it cannot write there, or if a file there is not its own.

    patience: seconds to wait for other processes.
    """

    def __init__(self, folder: Path, *, patience: float = LOCK_WAIT) -> None:
        self._folder = folders.given(folder, "folder")
        self._patience = patience

    @classmethod
    def default(cls) -> VersionFile:
        """`manifests` in the state folder: `$XDG_STATE_HOME/lacre`, or `~/.local/state/lacre`. Raises SettingsError."""
        return cls(folders.state() / "manifests")

    def seen(self) -> tuple[Seen, ...]:
        """The stored entries, unverified. Reads only. Raises SettingsError if the file is damaged or cannot be read."""
        path = self._folder / "seen.json"
        try:
            return _read(path)
        except OSError as exc:
            raise SettingsError(f"cannot read {path}: {exc.strerror}") from exc

    def sticky_key(self) -> bytes:
        """The key that keeps this user with one pool of a route: the same for all programs of one folder. Raises SettingsError,
        also if others can read it.
        """
        path = self._folder / "route.key"
        try:
            if not path.exists():
                self._folder.mkdir(parents=True, exist_ok=True, mode=0o700)
                with suppress(FileExistsError):
                    private_files.create(path, secrets.token_bytes(KEY_BYTES))
            private_files.check(path, path.stat().st_mode)
            with path.open("rb") as file:
                key = file.read(KEY_BYTES + 1)
        except OSError as exc:
            raise SettingsError(f"cannot use {path} ({exc.strerror}): make it a file of this user, or remove it") from exc
        if len(key) != KEY_BYTES:
            raise SettingsError(f"{path} is damaged: remove it; the next request of each route draws its pool again")
        return key

    def update(self, decide: Decide) -> Trusted:
        path = self._folder / "seen.json"
        try:
            self._folder.mkdir(parents=True, exist_ok=True, mode=0o700)
            lock = path.with_suffix(".lock")
            with file_locks.held(lock, f"{lock}: {_TAKEN}", self._patience):
                before = _read(path)
                trusted, after = _decided(decide, before)
                if after != before:
                    _write(path, after)
        except OSError as exc:
            raise SettingsError(
                f"cannot keep the newest manifest in {self._folder} ({exc.strerror}): make it a writable folder with free "
                "space, name another one in XDG_STATE_HOME, or pass memory=lacre.VersionMemory()"
            ) from exc
        return trusted


def sticky_key(memory: Memory) -> bytes:
    """Of the folder; without one, of this process. Raises SettingsError."""
    return memory.sticky_key() if isinstance(memory, VersionFile) else secrets.token_bytes(KEY_BYTES)


def _read(path: Path) -> tuple[Seen, ...]:
    try:
        if path.stat().st_size > MAX_REMEMBERED:
            raise SettingsError(f"{path} has over {MAX_REMEMBERED} bytes: remove it; the next manifest counts as the first")
        values = json.loads(path.read_bytes())
        if not isinstance(values, list):
            raise ValueError
        return tuple(map(_parse, values))
    except FileNotFoundError:
        return ()
    except SettingsError:
        raise
    except NewerFormat as exc:
        raise SettingsError(f"{path}: {exc}") from exc
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError, LacreError) as exc:
        # Never forget silently: an attacker who can damage this file must not gain a rollback by that.
        raise SettingsError(f"{path} is damaged: remove it if you know why; the next manifest counts as the first") from exc


def _parse(value: dict[str, str]) -> Seen:
    SEEN.check(value)
    pin, *roots = map(b64u_decode, [value["pin"], *value["roots"]])
    return Seen(pin, tuple(roots), int(value["ver"]), b64u_decode(value["document"]))


def _form(seen: Seen) -> dict[str, object]:
    roots = [b64u(root) for root in seen.roots]
    return {"pin": b64u(seen.pin), "roots": roots, "ver": seen.version, "document": b64u(seen.document)}


def _write(path: Path, seen: Sequence[Seen]) -> None:
    private_files.replace(path, json.dumps([_form(one) for one in seen]).encode())
