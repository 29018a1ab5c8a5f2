"""When each scope's cache was last used, and which are too old.

Rules:
- Pure: the caller gives the time. Only the decode thread uses it.
"""

from __future__ import annotations

from typing import Final

SCOPE_LIFE: Final = 3600.0  # seconds: the SDK changes its salt every hour
_LOOK: Final = 60.0  # seconds between checks while there is work
_AFTER: Final = 1.0  # seconds past a scope's end, so that a check then certainly finds it


class ScopeAges:
    """Times are seconds of one monotonic clock."""

    def __init__(self) -> None:
        self._used: dict[bytes, float] = {}
        self._look = 0.0  # time of the next check

    def use(self, scope: bytes, now: float) -> None:
        self._used[scope] = now

    def due(self, now: float) -> bool:
        """Whether it is time to check, while there is work."""
        return now >= self._look

    @property
    def expires(self) -> float | None:
        """When the oldest scope is too old. None if there is none."""
        return min(self._used.values()) + SCOPE_LIFE + _AFTER if self._used else None

    def expired(self, now: float) -> list[bytes]:
        """The scopes that are too old. They are forgotten here."""
        self._look = now + _LOOK
        old = [scope for scope, used in self._used.items() if now - used > SCOPE_LIFE]
        for scope in old:
            del self._used[scope]
        return old
