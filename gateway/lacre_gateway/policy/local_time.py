"""The weekday and the time of day in a rule set's time zone: `time.toml` of the set.

    zone = "Europe/Berlin"

Rules:
- The zone belongs to the rules: they reload together, their cases are tried in it, and the set's digest covers it.
- Without the file, local time is UTC.
- No clock here: the caller passes the time.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from datetime import UTC, datetime, tzinfo
from pathlib import Path
from typing import Annotated, Final, NamedTuple
from zoneinfo import ZoneInfo, ZoneInfoNotFoundError

from pydantic import AfterValidator
from pydantic_core import PydanticCustomError

from lacre_fabric import settings as files
from lacre_fabric.settings import Table

TIME_FILE: Final = "time.toml"
_MINUTE: Final = 60


class LocalTime(NamedTuple):
    """weekday: 1 is Monday, 7 is Sunday (ISO 8601). minute: of the hour."""

    weekday: int
    hour: int
    minute: int


@dataclass(slots=True)
class TimeZone:
    """A zone of the IANA database, and the last minute that was asked for."""

    name: str
    zone: tzinfo = field(repr=False)
    _minute: int = field(default=-1, repr=False)
    _local: LocalTime = field(default=LocalTime(4, 0, 0), repr=False)

    def at(self, time: float) -> LocalTime:
        """time: seconds since the epoch."""
        minute = int(time // _MINUTE)
        if minute != self._minute:
            there = datetime.fromtimestamp(minute * _MINUTE, self.zone)
            self._local, self._minute = LocalTime(there.isoweekday(), there.hour, there.minute), minute
        return self._local


UTC_ZONE: Final = TimeZone("UTC", UTC)


def _zone(name: str) -> str:
    try:
        ZoneInfo(name)
    except (ZoneInfoNotFoundError, ValueError, OSError) as exc:
        raise PydanticCustomError(
            "zone",
            'this machine knows no time zone {name}: write a name such as "Europe/Berlin"; if it is right, install `tzdata`',
            {"name": repr(name)},
        ) from exc
    return name


class _File(Table):
    zone: Annotated[str, AfterValidator(_zone)]


def parse(text: str, path: Path) -> TimeZone:
    """path: the file's place, for messages. Raises SettingsError."""
    name = files.parse(_File, text, path).zone
    return TimeZone(name, ZoneInfo(name))
