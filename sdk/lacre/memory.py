"""Remembers the newest manifest seen, per root lineage, so that an older one is noticed.

`VersionFile` keeps it on disk: 0600, replaced atomically, under a lock between processes. `VersionMemory` keeps it in the
process, for where there is no disk to write: rollback is then bounded by the manifest's expiry alone.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Protocol

from lacre.errors import LacreError, SettingsError
from lacre.jws import b64u, b64u_decode
from lacre.trust import Seen, Trusted, newest, verify


class Memory(Protocol):
    """Where `Seen` is kept. `update` is atomic: `decide` gets what is kept for the root, and what it returns is kept."""

    def update(self, root: bytes, decide: Callable[[Seen | None], tuple[Trusted, Seen]]) -> Trusted: ...


def accept(document: bytes, root: bytes, memory: Memory, now: float) -> Trusted:
    """Verifies `document` against the pinned root and against what was seen before, and remembers the newer.

    Raises what `lacre.trust.verify` raises, and Rollback. now: seconds since the epoch.
    """
    candidate = verify(document, root, now)

    def decide(seen: Seen | None) -> tuple[Trusted, Seen]:
        chosen = newest(candidate, seen, root, now)
        return chosen, Seen(chosen.manifest.version, chosen.document)

    return memory.update(root, decide)


class VersionMemory:
    """In this process only."""

    def __init__(self) -> None:
        self._seen: dict[bytes, Seen] = {}

    def update(self, root: bytes, decide: Callable[[Seen | None], tuple[Trusted, Seen]]) -> Trusted:
        trusted, self._seen[root] = decide(self._seen.get(root))
        return trusted


class VersionFile:
    """In a folder, one file for each pinned root. Raises SettingsError where the folder cannot be written."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    @classmethod
    def default(cls) -> VersionFile:
        """`$XDG_STATE_HOME/lacre/manifests` (`~/.local/state` where unset)."""
        home = os.environ.get("XDG_STATE_HOME") or Path.home() / ".local" / "state"
        return cls(Path(home) / "lacre" / "manifests")

    def update(self, root: bytes, decide: Callable[[Seen | None], tuple[Trusted, Seen]]) -> Trusted:
        path = self._folder / f"{hashlib.sha256(root).hexdigest()[:32]}.json"
        try:
            self._folder.mkdir(parents=True, exist_ok=True, mode=0o700)
            with _locked(path.with_suffix(".lock")):
                trusted, seen = decide(_read(path))
                _write(path, seen)
        except OSError as exc:
            raise SettingsError(
                f"cannot keep the newest manifest in {self._folder}: make it writable, or pass memory=lacre.VersionMemory()"
            ) from exc
        return trusted


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield
    finally:
        os.close(handle)  # and with it the lock


def _read(path: Path) -> Seen | None:
    try:
        value = json.loads(path.read_bytes())
        return Seen(int(value["ver"]), b64u_decode(value["document"]))
    except FileNotFoundError:
        return None
    except (ValueError, KeyError, TypeError, LacreError) as exc:
        # Never forgotten in silence: an attacker who can spoil this file must not win a rollback by it.
        raise SettingsError(f"{path} is damaged: remove it if you know why; the next manifest counts as the first") from exc


def _write(path: Path, seen: Seen) -> None:
    content = json.dumps({"ver": seen.version, "document": b64u(seen.document)}).encode()
    with tempfile.NamedTemporaryFile(dir=path.parent, prefix=".", delete=False) as new:  # mkstemp: 0600 from the start
        try:
            new.write(content)
            new.flush()
            os.fsync(new.fileno())
            Path(new.name).replace(path)
        except BaseException:
            Path(new.name).unlink(missing_ok=True)
            raise
