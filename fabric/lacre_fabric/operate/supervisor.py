"""Child processes on a leash: started, watched, and ended in order.

When one dies, it is said which and why. A child that others can do without is started again, after growing intervals; when any
other child dies, all end.
"""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

import structlog

from lacre.errors import LacreError
from lacre_fabric.operate.leash import leashed

WATCH: Final = 0.1  # seconds between looks at the children
# Seconds from a death to the next start: 1, 2, 4, … up to the longest. What caused it may pass (memory) or be corrected (a
# file), and a person reads of each death, so nothing is given up. A child that lived for `SETTLED` counts as well.
FIRST_INTERVAL: Final = 1.0
LONGEST_INTERVAL: Final = 30.0
SETTLED: Final = 60.0
GRACE: Final = 10.0  # seconds from SIGTERM to SIGKILL
_TAIL: Final = 8  # lines of a dead child's log that are shown, of as many bytes at most:
_TAIL_BYTES: Final = 4096


log = structlog.get_logger("lacre.supervisor")


class ChildDied(LacreError):
    """A process that everything depends on ended by itself."""


@dataclass(frozen=True, slots=True)
class Child:
    """log: where it writes. since: the log's size when it was started; what is before that is an earlier run's."""

    name: str
    process: subprocess.Popen[bytes]
    log: Path
    since: int = 0

    def obituary(self) -> str:
        status = self.process.returncode
        how = f"status {status}" + (f" ({signal.strsignal(-status)})" if status < 0 else "")
        lines = self._last_lines()
        return f"{self.name} ended with {how}; " + (f"{self.log} ends with:\n{lines}" if lines else f"{self.log} says nothing")

    def _last_lines(self) -> str:
        try:
            with self.log.open("rb") as log:
                begin = max(self.since, log.seek(0, os.SEEK_END) - _TAIL_BYTES)
                log.seek(begin)
                lines = log.read().decode(errors="replace").splitlines()
        except OSError:
            return ""
        return "\n".join((lines if begin == self.since else lines[1:])[-_TAIL:])


@dataclass(slots=True)
class _Again:
    """How a child is started again. interval: seconds from its last death to its start. due: that time, while it is dead."""

    command: Sequence[str]
    interval: float = 0.0
    started: float = field(default_factory=time.monotonic)
    due: float | None = None

    def died(self, now: float) -> None:
        """A child that lived for long begins with the shortest interval again."""
        longer = min(2 * self.interval, LONGEST_INTERVAL) if now - self.started < SETTLED else 0.0
        self.interval = max(longer, FIRST_INTERVAL)
        self.due = now + self.interval


def _started(name: str, command: Sequence[str], log: Path) -> Child:
    with log.open("ab") as output:
        since = output.tell()
        process = subprocess.Popen(
            leashed(command), stdin=subprocess.DEVNULL, stdout=output, stderr=output, start_new_session=True
        )
    return Child(name, process, log, since)


class Supervisor:
    """Use it from the main thread: a child's leash is tied to the thread that started it."""

    def __init__(self, tell: Callable[[str], None] = lambda _line: None) -> None:
        """tell: gets a line for each child that died and is started again."""
        self._children: list[Child] = []
        self._again: dict[str, _Again] = {}
        self._tell = tell

    def start(self, name: str, command: Sequence[str], log: Path, *, again: bool = False) -> Child:
        """The command writes to `log`; a session of its own keeps the terminal's Ctrl-C from it. again: whether `watch` starts
        it again when it dies.
        """
        child = self.add(_started(name, command, log))
        if again:
            self._again[name] = _Again(command)
        return child

    def add(self, child: Child) -> Child:
        self._children.append(child)
        return child

    def check(self) -> None:
        """Raises ChildDied."""
        for child in self._children:
            if child.process.poll() is not None:
                raise ChildDied(child.obituary())

    async def watch(self) -> None:
        """Until a child dies that is not started again: raises ChildDied."""
        while True:
            self.tend(time.monotonic())
            await asyncio.sleep(WATCH)

    def tend(self, now: float) -> None:
        """Starts again what it is time for. now: by the monotonic clock. Raises ChildDied for what is never started again."""
        for place, child in enumerate(self._children):
            if child.process.poll() is None:
                continue
            again = self._again.get(child.name)
            if again is None:
                raise ChildDied(child.obituary())
            if again.due is None:
                again.died(now)
                status = child.process.returncode
                log.error("child.died", kind=child.name, status=status, seconds=again.interval, remedy=f"see {child.log}")
                self._tell(f"{child.obituary()}\n{child.name} is started again in {again.interval:.0f} s")
            elif now >= again.due:
                self._start_again(place, again, now)

    def _start_again(self, place: int, again: _Again, now: float) -> None:
        child = self._children[place]
        try:
            self._children[place] = _started(child.name, again.command, child.log)
        except OSError as exc:  # no memory or no process to be had: as if it had died at once
            again.died(now)
            log.error("child.not_started", kind=child.name, reason=exc.strerror, seconds=again.interval)
            return
        again.started, again.due = now, None
        log.warning("child.started_again", kind=child.name, number=self._children[place].process.pid)
        self._tell(f"{child.name} was started again")

    def stop(self) -> None:
        """Ends the children, the last started first, each with time to finish."""
        for child in reversed(self._children):
            if child.process.poll() is None:
                child.process.terminate()
            try:
                child.process.wait(GRACE)
            except subprocess.TimeoutExpired:
                child.process.kill()
                child.process.wait()
        self._children.clear()
