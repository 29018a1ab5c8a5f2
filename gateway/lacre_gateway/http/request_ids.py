"""Random request ids: 128 bits, drawn from the system many at a time. Each draw lets go of the interpreter's lock.

An id names a request in subjects, logs and the audit log. It is no secret, but nobody may foresee one.
"""

from __future__ import annotations

import os
from typing import Final

_BYTES: Final = 16
_DRAWN: Final = 64  # ids at a time: a kilobyte


class RequestIds:
    """Used on one event loop, in one process: a fork would repeat ids."""

    def __init__(self) -> None:
        self._left: list[str] = []

    def next(self) -> str:
        """32 hex digits."""
        if not self._left:
            drawn, length = os.urandom(_BYTES * _DRAWN).hex(), 2 * _BYTES
            self._left = [drawn[at : at + length] for at in range(0, len(drawn), length)]
        return self._left.pop()
