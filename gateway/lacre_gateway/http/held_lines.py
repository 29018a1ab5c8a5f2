"""The lines about requests, several in one write. Each write lets go of the interpreter's lock and waits for it again.

Rules:
- A line is held for `HOLD` seconds at most, and only while others come. The first one after a pause leaves at the end of the
  loop's turn.
- Lines keep their order. Warnings and errors are not held, nor is anything else that this process writes to the stream. All of
  them pass on the held lines first.
- For `_CAREFUL` seconds after such text no line is held, because the process may be about to end by force. Only a process that
  is killed from outside, or by a signal of the system, loses its held lines.
- One write has at most `WHOLE` bytes of held lines. The processes of a gateway share a pipe, which keeps such a write in one
  piece.
- A blocked stream blocks the thread that writes, as it would without this class.
"""

from __future__ import annotations

import asyncio
import select
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr
from typing import Any, Final, TextIO, cast

HOLD: Final = 0.01  # seconds between two writes while lines come: about as many as a write may hold, at a core's full load
WHOLE: Final = select.PIPE_BUF  # bytes; log lines are ASCII
_CAREFUL: Final = 1.0  # seconds; longer than `lacre.runtime.tasks.GRACE`


class HeldLines:
    """In place of a text stream, for any thread. Other members than those below are the stream's."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream
        # The collector may run here, and what it ends may log a failure.
        self._lock = threading.RLock()
        self._held: list[str] = []
        self._size = 0
        self._due = False
        self._next = self._careful_until = 0.0

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def write(self, text: str) -> int:
        with self._lock:
            self._careful_until = time.monotonic() + _CAREFUL
            self._pass_on()
            return self._stream.write(text)

    def flush(self) -> None:
        with self._lock:
            self._pass_on()
            self._stream.flush()

    def hold(self, text: str) -> None:
        """Takes a whole line that may wait for others."""
        with self._lock:
            if self._size + len(text) > WHOLE:
                self._pass_on()
            self._held.append(text)
            self._size += len(text)
            now = time.monotonic()
            if now < self._careful_until:
                self.flush()
                return
            if self._due:
                return
            try:
                loop = asyncio.get_running_loop()
            except RuntimeError:  # another thread: no turn of its ends soon
                self.flush()
                return
            self._due = True
        if (wait := self._next - now) > 0:
            loop.call_later(wait, self._turn)
        else:
            loop.call_soon(self._turn)

    def _turn(self) -> None:
        with self._lock:
            self._due, self._next = False, time.monotonic() + HOLD
            self.flush()

    def _pass_on(self) -> None:
        held, self._held, self._size = self._held, [], 0
        if held:
            self._stream.write("".join(held))


class LineLogger:
    """For structlog: holds the lines of a level below `warning`."""

    def __init__(self, lines: HeldLines) -> None:
        self._lines = lines

    def info(self, line: str) -> None:
        self._lines.hold(line + "\n")

    def error(self, line: str) -> None:
        self._lines.write(line + "\n")
        self._lines.flush()

    debug = info
    warning = critical = error


@contextmanager
def held_stderr() -> Iterator[LineLogger]:
    """All of stderr passes through one `HeldLines` meanwhile. At the end everything is written."""
    lines = HeldLines(sys.stderr)
    try:
        with redirect_stderr(cast("TextIO", lines)):
            yield LineLogger(lines)
    finally:
        lines.flush()
