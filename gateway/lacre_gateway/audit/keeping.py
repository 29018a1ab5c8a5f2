"""When a running gateway rotates its log, and which old logs it erases.

Rules:
- `lacre audit rotate` leaves a file beside the log. The gateway rotates, and then removes it.
- Erasure is the decision of the settings alone. Someone who can write to the disk could hide a change by asking for it.
- The gateway records an erasure, in the newest log, before it begins. It goes from the oldest log on.
- A full disk must not prevent the erasure that would make room. So a part of it is held in reserve, for the record of it.
- A clock that is far ahead must not erase everything. So the time for this is the newest one that an earlier process recorded,
  and the time that this process has run. After a long pause an erasure is late, until the next start.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from lacre.errors import LacreError
from lacre_fabric.logs import Log
from lacre_gateway.audit import entries as kinds
from lacre_gateway.audit import reserve, series
from lacre_gateway.audit.entries import Event, parse
from lacre_gateway.audit.log import AuditLog
from lacre_gateway.audit.reader import LogReader

_DAY: Final = 86400.0
_LOOK: Final = 1.0  # seconds between two looks for the file
_SELDOM: Final = 60  # looks between two checks of ages
_TRY: Final = 0.1  # seconds between two looks for the new log


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
        key: bytes,
        audit: AuditLog,
        keeping: LogTerms,
        *,
        log: Log,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self._root, self._key, self._audit, self._keeping = root, key, audit, keeping
        self._log, self._clock = log, clock
        self._began = time.monotonic()

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
        asked = self._root / series.ASKED
        if await asyncio.to_thread(asked.exists):
            await self._rotate()
            with contextlib.suppress(FileNotFoundError):
                asked.unlink()
        elif seldom and await asyncio.to_thread(self._old):
            await self._rotate()
        if seldom and self._keeping.keep_days is not None:
            for number in await asyncio.to_thread(self._due):
                await self._erase(number)
        if seldom and self._audit.writable:  # last, because it must not take the room that an erasure needs
            await asyncio.to_thread(reserve.hold, self._root)

    async def _rotate(self) -> None:
        origin = self._audit.origin
        self._audit.rotate()
        while self._audit.origin == origin:
            await asyncio.sleep(_TRY)

    def _old(self) -> bool:
        keeping, number = self._keeping, series.newest(self._root)
        if keeping.rotate_entries is not None and self._audit.size >= keeping.rotate_entries:
            return True
        if keeping.rotate_days is None:
            return False
        first = parse(self._reader(number).entry(0))
        return bool(self._clock() - first["time"] >= keeping.rotate_days * _DAY)

    def _due(self) -> list[int]:
        """The old logs to erase, the oldest first; among them those whose erasure a crash cut short."""
        now = min(self._clock(), self._audit.recorded_before + time.monotonic() - self._began)
        due = []
        for number in range(1, series.newest(self._root)):
            folder = series.place(self._root, number)
            if (folder / series.PROOF).exists():
                due.extend([number] if series.unfinished(folder) else [])
            elif now - series.last_time(self._reader(number)) >= (self._keeping.keep_days or 0) * _DAY:
                due.append(number)
            else:
                break
        return due

    def _reader(self, number: int) -> LogReader:
        return LogReader(series.place(self._root, number), series.key_of(self._root, number, self._key))

    async def _erase(self, number: int) -> None:
        folder = series.place(self._root, number)
        if not series.unfinished(folder):
            reader = await asyncio.to_thread(self._reader, number)
            origin, size = reader.checkpoint.origin, reader.size
            recorded = self._audit.append(Event(time=round(self._clock(), 3), event=kinds.ERASED, target=origin, count=size))
            await asyncio.to_thread(reserve.give_up, self._root)  # after the entry: no other one may take the room first
            await recorded
            self._log.info("audit log erased", origin=origin, entries=size)
        await asyncio.to_thread(series.erase, folder, series.key_of(self._root, number, self._key))
