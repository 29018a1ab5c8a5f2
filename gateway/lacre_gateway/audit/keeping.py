"""When a running gateway rotates its log, and which old logs it erases.

Rules:
- `lacre audit rotate` leaves a file beside the log. The gateway rotates, and then removes it.
- Erasure is the decision of the settings alone. Someone who can write to the disk could hide a change by asking for it.
- The gateway records an erasure, in the newest log, before it begins. It goes from the oldest log on.
- What it records, it signs. So it believes of an old log only what the newest log leads to, which it writes itself (`chain`).
- A full disk must not prevent the erasure that would make room. So a part of it is held in reserve, for the record of it.
- A clock that is far ahead must not erase everything. So the time for this is the newest one that an earlier process recorded,
  and the time that this process has run. After a long pause an erasure is late, until the next start.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from lacre.errors import LacreError
from lacre_fabric.logs import Log
from lacre_gateway.audit import chain, reserve, series
from lacre_gateway.audit import entries as kinds
from lacre_gateway.audit.chain import LinkedLog
from lacre_gateway.audit.entries import Event, parse
from lacre_gateway.audit.log import AuditLog
from lacre_gateway.audit.reader import CHECKPOINT, LogReader, Wrong

_DAY: Final = 86400.0
_LOOK: Final = 1.0  # seconds between two looks for the file
_SELDOM: Final = 60  # looks between two checks of ages
_TRY: Final = 0.1  # seconds between two looks for the new log
_TRIES: Final = 5  # looks at all logs, if the newest one changes meanwhile
_PATIENCE: Final = 5.0  # seconds for a rotation, before other logs are looked after


@dataclass(frozen=True, slots=True)
class LogTerms:
    """As `AuditKeeping` of the settings; None: for ever."""

    rotate_days: int | None = None
    rotate_entries: int | None = None
    keep_days: int | None = None


class Keeper:
    """Of one log. clock: seconds since the epoch."""

    def __init__(
        self,
        root: Path,
        audit: AuditLog,
        keeping: LogTerms,
        *,
        log: Log,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self._root, self._audit, self._keeping = root, audit, keeping
        self._log, self._clock = log, clock
        self._began = time.monotonic()
        self._rotating: str | None = None  # the origin of the log that ends, while a rotation is asked for
        self._known: tuple[str, Sequence[LinkedLog]] = "", ()  # the newest log's origin, and the old logs that it leads to

    async def run(self) -> None:
        """Until it is cancelled."""
        looks = 0
        while True:
            try:
                await self.look(seldom=looks % _SELDOM == 0)
            except (OSError, LacreError) as exc:
                self._log.warning("audit logs cannot be kept in order", reason=str(exc))
            looks += 1
            await asyncio.sleep(_LOOK)

    async def look(self, *, seldom: bool) -> None:
        """One look; a seldom one reads the ages of logs. Raises OSError, Wrong or SettingsError."""
        asked = await asyncio.to_thread((self._root / series.ASKED).exists)
        if self._rotating is not None or asked or (seldom and await asyncio.to_thread(self._old)):
            await self._rotate()
        if seldom and self._keeping.keep_days is not None:
            for part in await asyncio.to_thread(self._due):
                await self._erase(part)
        if seldom and self._audit.writable:  # last, because it must not take the room that an erasure needs
            await asyncio.to_thread(reserve.hold, self._root)

    async def _rotate(self) -> None:
        """Waits only so long: while the disk refuses the new log, an erasure may make room for it."""
        if self._rotating is None:
            self._rotating = self._audit.origin
            self._audit.rotate()
        end = time.monotonic() + _PATIENCE
        while self._audit.origin == self._rotating and time.monotonic() < end:
            await asyncio.sleep(_TRY)
        if self._audit.origin != self._rotating:
            self._rotating = None
            with contextlib.suppress(FileNotFoundError):
                (self._root / series.ASKED).unlink()

    def _old(self) -> bool:
        keeping = self._keeping
        if keeping.rotate_entries is not None and self._audit.size >= keeping.rotate_entries:
            return True
        if keeping.rotate_days is None:
            return False
        newest = LogReader(series.place(self._root, series.newest(self._root)), self._audit.public)
        return bool(self._clock() - parse(newest.entry(0))["time"] >= keeping.rotate_days * _DAY)

    def _due(self) -> list[LinkedLog]:
        """The old logs to erase, the oldest first; among them those whose erasure a crash cut short."""
        now = min(self._clock(), self._audit.recorded_before + time.monotonic() - self._began)
        due = []
        for part in self._old_logs():
            if (part.folder / "tile").exists():  # else it is erased, or was when a crash cut that short
                if now - series.last_time(part.reader()) >= (self._keeping.keep_days or 0) * _DAY:
                    due.append(part)
                elif part.erased:
                    raise Wrong(str(part.folder / series.PROOF), "it says that the log is erased, and that is not due")
                else:
                    break
            elif series.unfinished(part.folder):
                due.append(part)
        return due

    def _old_logs(self) -> Sequence[LinkedLog]:
        """All logs that another one continues, the oldest first. Raises Wrong or SettingsError."""
        for _ in range(_TRIES):
            if self._known[0] == self._audit.origin:
                return self._known[1]
            *old, newest = chain.parts(self._root, self._audit.public)
            if (newest.checkpoint.origin, newest.key) == (self._audit.origin, self._audit.public):
                self._known = self._audit.origin, old
            else:
                time.sleep(_TRY)  # a rotation may be under way
        raise Wrong(CHECKPOINT, f"the newest log in {self._root} is not the one that this gateway writes")

    async def _erase(self, part: LinkedLog) -> None:
        if (part.folder / "tile").exists():
            size, origin = part.checkpoint.size, part.checkpoint.origin
            recorded = self._audit.append(Event(time=round(self._clock(), 3), event=kinds.ERASED, target=origin, count=size))
            await asyncio.to_thread(reserve.give_up, self._root)  # after the entry: no other one may take the room first
            await recorded
            self._log.info("audit log erased", origin=origin, entries=size)
        await asyncio.to_thread(series.erase, part.folder, part.key)
