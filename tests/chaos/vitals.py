"""What processes hold: memory and descriptors, by process id, as the kernel counts them (proc(5))."""

from __future__ import annotations

import asyncio
import os
import subprocess
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final, Protocol

EVERY: Final = 2.0  # seconds between looks
SETTLED: Final = 20.0  # seconds of a process's life after which what it holds is what it needs
_PAGE: Final = os.sysconf("SC_PAGE_SIZE")


class Running(Protocol):
    process: subprocess.Popen[bytes]


@dataclass(slots=True)
class Life:
    """A process from its first look to its last. settled: bytes and descriptors once it had settled; now: at the last look."""

    name: str
    began: float
    settled: tuple[int, int] | None = None
    now: tuple[int, int] = (0, 0)
    seen: float = 0.0

    @property
    def watched(self) -> float:
        """Seconds after it had settled."""
        return max(0.0, self.seen - self.began - SETTLED)


@dataclass(slots=True)
class Vitals:
    """lives: by process id."""

    parts: Mapping[str, Running]
    lives: dict[int, Life] = field(default_factory=dict)

    def look(self) -> None:
        now = time.monotonic()
        for name, part in self.parts.items():
            if part.process.poll() is None and (held := _held(part.process.pid)) is not None:
                life = self.lives.setdefault(part.process.pid, Life(name, now))
                life.now, life.seen = held, now
                if life.settled is None and now - life.began >= SETTLED:
                    life.settled = held

    async def watch(self) -> None:
        while True:
            self.look()
            await asyncio.sleep(EVERY)

    def alive(self) -> list[Life]:
        """Those that are there at the last look."""
        pids = {part.process.pid for part in self.parts.values() if part.process.poll() is None}
        return [life for pid, life in self.lives.items() if pid in pids]


def _held(pid: int) -> tuple[int, int] | None:
    folder = Path(f"/proc/{pid}")
    try:
        return int((folder / "statm").read_text().split()[1]) * _PAGE, len(list((folder / "fd").iterdir()))
    except OSError:
        return None
