"""What this gateway did in each minute, for the drawings of the overview: numbers in one SQLite file beside the audit log.

Rules:
- The file has a maximum size and age. If it is full, the oldest minutes go.
- It proves nothing and nothing depends on it. A damaged file is set aside, and a missing disk leaves it in memory.
"""

from __future__ import annotations

import contextlib
import os
import sqlite3
import threading
from collections.abc import Callable, Sequence
from dataclasses import astuple, dataclass, fields
from pathlib import Path
from typing import Final

from lacre.errors import LacreError
from lacre_fabric.logs import Log
from lacre_gateway.console import sqlite_file
from lacre_gateway.observe.metrics import DURATIONS, Totals

MAX_PAGES: Final = 4096  # of 4 KiB: 16 MiB, more than a year's minutes need
_CUT: Final = 0.1  # of a full file: the share of the oldest minutes that goes
DAMAGED: Final = ".damaged"
_DAY_MINUTES: Final = 1440


@dataclass(frozen=True, slots=True)
class Minute:
    """at: its beginning, in minutes since the epoch. Requests that ended in it: answered, refused, and all others.

    half, most: of the answered ones, the milliseconds in which half of them, and 95 %, had their first byte; None without any.
    Tokens are of verified receipts. The rest is the highest that was seen.
    """

    at: int
    answered: int
    refused: int
    failed: int
    half: float | None
    most: float | None
    prompt: int
    cached: int
    completion: int
    queued: int
    busy: int
    slots: int
    workers: int


_NAMES: Final = tuple(field.name for field in fields(Minute))
_TABLE: Final = f"CREATE TABLE IF NOT EXISTS minutes (at INTEGER PRIMARY KEY, {', '.join(_NAMES[1:])})"
_ADD: Final = f"INSERT OR REPLACE INTO minutes VALUES ({', '.join('?' * len(_NAMES))})"  # noqa: S608 - our own names
_READ: Final = f"SELECT {', '.join(_NAMES)} FROM minutes WHERE at >= ? ORDER BY at"  # noqa: S608 - our own names


class MinuteStore:
    """Used in any thread. path: of the file; its folder is made. keep_days: how long minutes stay."""

    def __init__(self, path: Path, keep_days: int, log: Log) -> None:
        self._path = path
        self._keep = keep_days * _DAY_MINUTES
        self._log = log
        self._lock = threading.Lock()
        self._database = self._opened()

    def add(self, minute: Minute) -> None:
        """A file that cannot be written loses the minute, and says so in the log."""
        with self._lock:
            try:
                self._write(minute)
            except sqlite3.Error as exc:
                self._log.warning("minutes not written", reason=str(exc))
                if isinstance(exc, sqlite3.DatabaseError) and not isinstance(exc, sqlite3.OperationalError):
                    self._database.close()
                    self._database = self._opened()

    def since(self, at: int) -> list[Minute]:
        """The oldest first. Empty if the file cannot be read."""
        with self._lock:
            try:
                return [Minute(*row) for row in self._database.execute(_READ, (at,))]
            except sqlite3.Error as exc:
                self._log.warning("minutes not read", reason=str(exc))
                return []

    def close(self) -> None:
        with self._lock:
            self._database.close()

    def _write(self, minute: Minute) -> None:
        database = self._database
        try:
            with database:
                database.execute("DELETE FROM minutes WHERE at < ?", (minute.at - self._keep,))
                database.execute(_ADD, astuple(minute))
        except sqlite3.OperationalError:  # full
            with database:
                database.execute(
                    "DELETE FROM minutes WHERE at IN (SELECT at FROM minutes ORDER BY at LIMIT "
                    "(SELECT max(1, CAST(count(*) * ? AS INTEGER)) FROM minutes))", (_CUT,),
                )  # fmt: skip
            with database:
                database.execute(_ADD, astuple(minute))

    def _opened(self) -> sqlite3.Connection:
        return sqlite_file.opened(self._path, _prepare, self._set_aside, self._log, "minutes kept in memory")

    def _set_aside(self, damage: sqlite3.DatabaseError) -> None:
        aside = self._path.with_name(self._path.name + DAMAGED)
        self._log.warning("minutes set aside", reason=f"{self._path.name} is damaged ({damage}); it is kept as {aside.name}")
        with contextlib.suppress(OSError):
            os.replace(self._path, aside)  # noqa: PTH105 - replaces an older one


def _prepare(database: sqlite3.Connection) -> None:
    """Raises sqlite3.DatabaseError."""
    database.execute(f"PRAGMA max_page_count = {MAX_PAGES}")
    database.execute(_TABLE)
    if database.execute("PRAGMA quick_check").fetchone() != ("ok",):
        raise sqlite3.DatabaseError("its pages do not fit together")
    database.execute(_READ, (0,)).fetchone()


@dataclass(frozen=True, slots=True)
class PoolLoad:
    """Of all pools together, at one moment."""

    queued: int = 0
    busy: int = 0
    slots: int = 0
    workers: int = 0


class MinuteCount:
    """Turns samples into minutes. totals: of the gateway, which only grow. Pure: no clock, no file."""

    def __init__(self, totals: Callable[[], Totals], now: float) -> None:
        self._totals = totals
        self._before = totals()
        self._at = int(now // 60)
        self._load = PoolLoad()

    def sample(self, now: float, load: PoolLoad) -> Minute | None:
        """The minute before, once it is over."""
        at = int(now // 60)
        done = None if at == self._at else self.unfinished()
        if done is not None:
            self._at, self._load, self._before = at, PoolLoad(), self._totals()
        self._load = PoolLoad(*(max(pair) for pair in zip(astuple(self._load), astuple(load), strict=True)))
        return done

    def unfinished(self) -> Minute:
        """The minute so far."""
        before, now = self._before, self._totals()
        ended = {name: count - before.ended.get(name, 0) for name, count in now.ended.items()}
        answered, refused = ended.pop("answered", 0), ended.pop("refused", 0)
        first = [new - old for new, old in zip(now.first_byte, before.first_byte, strict=True)]
        return Minute(
            self._at, answered, refused, sum(ended.values()), within(first, 0.5), within(first, 0.95),
            now.prompt - before.prompt, now.cached - before.cached, now.completion - before.completion,
            self._load.queued, self._load.busy, self._load.slots, self._load.workers,
        )  # fmt: skip


def within(counts: Sequence[int], share: float) -> float | None:
    """The milliseconds in which this share of requests had their first byte, between the bounds of `DURATIONS`."""
    total, passed = sum(counts), 0
    if not total:
        return None
    for number, count in enumerate(counts):
        if passed + count >= share * total:
            low = DURATIONS[number - 1] if number else 0.0
            high = DURATIONS[number] if number < len(DURATIONS) else low
            return round(1000 * (low + (high - low) * (share * total - passed) / count), 1) if count else 1000 * high
        passed += count
    raise LacreError("the counts of first bytes do not add up")
