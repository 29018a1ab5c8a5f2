"""Starts child processes on a leash, watches them, and stops them in order.

A death is logged with its cause. A child started with `again` is restarted after growing intervals. When any other child dies,
all are stopped.
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

WATCH: Final = 0.1  # seconds between checks
# Seconds from a death to the restart: 1, 2, 4, … up to the longest. It never gives up: the cause may pass (memory) or be
# corrected (a file), and each death is reported. After `SETTLED` seconds of life the interval starts over.
FIRST_INTERVAL: Final = 1.0
LONGEST_INTERVAL: Final = 30.0
SETTLED: Final = 60.0
GRACE: Final = 10.0  # seconds from SIGTERM to SIGKILL
_TAIL: Final = 8  # lines of a dead child's log to show, of at most this many bytes:
_TAIL_BYTES: Final = 4096


log = structlog.get_logger("lacre.supervisor")


class ChildDied(LacreError):
    """A process that everything depends on ended."""


@dataclass(frozen=True, slots=True)
class Child:
    """A child process. log: its output file. since: the file's size at its start; earlier output is from earlier runs."""

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
    """How to restart a child. interval: seconds from its last death to the restart. due: time of the restart, while it is
    dead.
    """

    command: Sequence[str]
    interval: float = 0.0
    started: float = field(default_factory=time.monotonic)
    due: float | None = None

    def died(self, now: float) -> None:
        """A child that lived long enough starts over with the shortest interval."""
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
        """tell: gets a line for each death and restart."""
        self._children: list[Child] = []
        self._again: dict[str, _Again] = {}
        self._tell = tell

    def start(self, name: str, command: Sequence[str], log: Path, *, again: bool = False) -> Child:
        """Starts the command with its output in `log`. It has its own session, so the terminal's Ctrl-C does not reach it.

        again: whether `watch` restarts it when it dies.
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
        """Runs until a child dies that is not restarted. Raises ChildDied."""
        while True:
            self.tend(time.monotonic())
            await asyncio.sleep(WATCH)

    def tend(self, now: float) -> None:
        """Restarts children that are due. now: on the monotonic clock. Raises ChildDied for a child that is not restarted."""
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
                self._tell(f"{child.obituary()}\n{child.name} restarts in {again.interval:.0f} s")
            elif now >= again.due:
                self._start_again(place, again, now)

    def _start_again(self, place: int, again: _Again, now: float) -> None:
        child = self._children[place]
        try:
            self._children[place] = _started(child.name, again.command, child.log)
        except OSError as exc:  # no memory or process available: treat it as an immediate death
            again.died(now)
            log.error("child.not_started", kind=child.name, reason=exc.strerror, seconds=again.interval)
            return
        again.started, again.due = now, None
        log.warning("child.started_again", kind=child.name, number=self._children[place].process.pid)
        self._tell(f"{child.name} was restarted")

    def stop(self) -> None:
        """Stops the children, the last started first. Each gets time to finish."""
        for child in reversed(self._children):
            if child.process.poll() is None:
                child.process.terminate()
            try:
                child.process.wait(GRACE)
            except subprocess.TimeoutExpired:
                child.process.kill()
                child.process.wait()
        self._children.clear()
