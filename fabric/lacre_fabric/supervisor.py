"""Child processes on a leash: started, watched, and ended in order. When one dies, all end, and it is said which and why."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from lacre.errors import LacreError
from lacre_fabric.leash import leashed

WATCH: Final = 0.1  # seconds between looks at the children
GRACE: Final = 10.0  # seconds from SIGTERM to SIGKILL
_TAIL: Final = 8  # lines of a dead child's log that are shown, of as many bytes at most:
_TAIL_BYTES: Final = 4096


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


class Supervisor:
    """Use it from the main thread: a child's leash is tied to the thread that started it."""

    def __init__(self) -> None:
        self._children: list[Child] = []

    def start(self, name: str, command: Sequence[str], log: Path) -> Child:
        """The command writes to `log`; a session of its own keeps the terminal's Ctrl-C from it."""
        with log.open("ab") as output:
            since = output.tell()
            process = subprocess.Popen(
                leashed(command), stdin=subprocess.DEVNULL, stdout=output, stderr=output, start_new_session=True
            )
        return self.add(Child(name, process, log, since))

    def add(self, child: Child) -> Child:
        self._children.append(child)
        return child

    def check(self) -> None:
        """Raises ChildDied."""
        for child in self._children:
            if child.process.poll() is not None:
                raise ChildDied(child.obituary())

    async def watch(self) -> None:
        """Until a child dies: raises ChildDied."""
        while True:
            self.check()
            await asyncio.sleep(WATCH)

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
