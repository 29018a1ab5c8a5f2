"""Remembers the newest manifest seen, for each lineage of roots, so that an older one is noticed.

`VersionFile` keeps it on disk: 0600, replaced atomically, under a lock between processes. `VersionMemory` keeps it in the
process, for where there is no disk to write: rollback is then bounded by the manifest's expiry alone.
"""

from __future__ import annotations

import fcntl
import json
import os
import tempfile
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Protocol

from lacre.errors import LacreError, SettingsError
from lacre.jws import b64u, b64u_decode
from lacre.lineage import Seen, newest, remember
from lacre.trust import Trusted, verify

Decide = Callable[[Sequence[Seen]], tuple[Trusted, tuple[Seen, ...]]]


class Memory(Protocol):
    """Where what was `Seen` is kept. `update` is atomic: `decide` gets all that is kept, and what it returns is kept."""

    def update(self, decide: Decide) -> Trusted: ...


def accept(document: bytes, root: bytes, memory: Memory, now: float) -> Trusted:
    """Verifies `document` against the pinned root and against what was seen before, and remembers the newer.

    Raises what `lacre.trust.verify` raises, and Rollback. now: seconds since the epoch.
    """
    candidate = verify(document, root, now)

    def decide(remembered: Sequence[Seen]) -> tuple[Trusted, tuple[Seen, ...]]:
        chosen = newest(candidate, remembered, now)
        return chosen, remember(chosen, remembered)

    return memory.update(decide)


class VersionMemory:
    """In this process only."""

    def __init__(self) -> None:
        self._seen: tuple[Seen, ...] = ()
        self._lock = threading.Lock()

    def update(self, decide: Decide) -> Trusted:
        with self._lock:
            trusted, self._seen = decide(self._seen)
        return trusted


class VersionFile:
    """In a folder of its own. Raises SettingsError where it cannot be written, or holds what was not written here."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    @classmethod
    def default(cls) -> VersionFile:
        """`$XDG_STATE_HOME/lacre/manifests` (`~/.local/state` where unset)."""
        home = os.environ.get("XDG_STATE_HOME") or Path.home() / ".local" / "state"
        return cls(Path(home) / "lacre" / "manifests")

    def update(self, decide: Decide) -> Trusted:
        path = self._folder / "seen.json"
        try:
            self._folder.mkdir(parents=True, exist_ok=True, mode=0o700)
            with _locked(path.with_suffix(".lock")):
                before = _read(path)
                trusted, after = decide(before)
                if after != before:
                    _write(path, after)
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


def _read(path: Path) -> tuple[Seen, ...]:
    try:
        values = json.loads(path.read_bytes())
        if not isinstance(values, list):
            raise ValueError
        return tuple(map(_parse, values))
    except FileNotFoundError:
        return ()
    except (ValueError, KeyError, TypeError, LacreError) as exc:
        # Never forgotten in silence: an attacker who can spoil this file must not win a rollback by it.
        raise SettingsError(f"{path} is damaged: remove it if you know why; the next manifest counts as the first") from exc


def _parse(value: dict[str, str]) -> Seen:
    pin, *roots = map(b64u_decode, [value["pin"], *value["roots"]])
    return Seen(pin, tuple(roots), int(value["ver"]), b64u_decode(value["document"]))


def _form(seen: Seen) -> dict[str, object]:
    roots = [b64u(root) for root in seen.roots]
    return {"pin": b64u(seen.pin), "roots": roots, "ver": seen.version, "document": b64u(seen.document)}


def _write(path: Path, seen: Sequence[Seen]) -> None:
    content = json.dumps([_form(one) for one in seen]).encode()
    with tempfile.NamedTemporaryFile(dir=path.parent, prefix=".", delete=False) as new:  # mkstemp: 0600 from the start
        try:
            new.write(content)
            new.flush()
            os.fsync(new.fileno())
            Path(new.name).replace(path)
        except BaseException:
            Path(new.name).unlink(missing_ok=True)
            raise
