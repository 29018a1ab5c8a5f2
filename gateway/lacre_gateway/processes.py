"""Several gateway processes behind one port (`processes` in the settings), and the one that supervises them.

Rules:
- The kernel divides connections among them (SO_REUSEPORT). Each has its own audit log, its own name on the fabric, and its own
  admin listener; they share no memory.
- A process that dies is started again, after growing intervals if it keeps dying. One that cannot start the first time ends
  all: something is wrong with the settings, and it has said what.
- SIGTERM and SIGINT drain all of them; SIGHUP is passed on. If this process dies, they do too (see
  `lacre_fabric.operate.leash`).
"""

from __future__ import annotations

import asyncio
import signal
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

from lacre.errors import LacreError, SettingsError
from lacre_fabric.logs import Log, make_log
from lacre_fabric.operate.leash import PYTHON, leashed
from lacre_gateway.http.server import reserve
from lacre_gateway.settings import GatewaySettings

_WATCH: Final = 0.1  # seconds between checks of the processes
_STARTED: Final = 10.0  # seconds: a process that dies earlier, the first time, could not start
_FIRST_RETRY: Final = 0.25  # seconds, doubled with each death soon after a start
_LAST_RETRY: Final = 10.0
_GRACE: Final = 15.0  # seconds beyond the drain, after which a process that still runs is killed


class ProcessDied(LacreError):
    """One of the processes could not start."""


@dataclass(slots=True)
class _Process:
    """One of them. running: None between its death and its next start. again_at: on the monotonic clock."""

    number: int
    command: list[str]
    running: subprocess.Popen[bytes] | None = None
    started_at: float = 0.0
    again_at: float = 0.0
    delay: float = _FIRST_RETRY
    starts: int = field(default=0)

    def start(self) -> None:
        self.running = subprocess.Popen(leashed(self.command), stdin=subprocess.DEVNULL, start_new_session=True)
        self.started_at = time.monotonic()
        self.starts += 1

    def died(self) -> float:
        """Seconds until it is started again."""
        self.running = None
        lived = time.monotonic() - self.started_at
        self.delay = _FIRST_RETRY if lived > _LAST_RETRY else min(2 * self.delay, _LAST_RETRY)
        self.again_at = time.monotonic() + self.delay
        return self.delay

    def send(self, number: int) -> None:
        if self.running is not None and self.running.poll() is None:
            self.running.send_signal(number)


def serve_all(settings: GatewaySettings, file: Path) -> None:
    """Runs until SIGTERM or SIGINT, from the main thread. file: the settings file. Raises SettingsError or ProcessDied."""
    log = make_log(sys.stderr).bind(gateway=settings.gateway)
    _make_folder(settings.audit)
    with reserve(settings.listen, shared=True) as held:  # also picks the port, if the settings leave it open
        port = held.getsockname()[1]
        command = [*PYTHON, "-m", "lacre_gateway", "--settings", str(file), "--port", str(port), "--process"]
        processes = [_Process(number, [*command, str(number)]) for number in range(settings.processes)]
        patience = settings.listen.drain_delay + settings.listen.drain + _GRACE
        asyncio.run(_watch(processes, patience, log))


def _make_folder(path: Path) -> None:
    """Each process makes its own folder in it. Raises SettingsError."""
    try:
        path.mkdir(parents=True, exist_ok=True, mode=0o700)
    except OSError as exc:
        raise SettingsError(f"audit: cannot create {path} ({exc.strerror}): name a folder that this user owns") from exc


async def _watch(processes: list[_Process], patience: float, log: Log) -> None:
    ending = asyncio.Event()

    def tell(number: int) -> None:
        if number == signal.SIGTERM:
            ending.set()
        for process in processes:
            process.send(number)

    for got, told in ((signal.SIGTERM,) * 2, (signal.SIGINT, signal.SIGTERM), (signal.SIGHUP,) * 2):
        asyncio.get_running_loop().add_signal_handler(got, tell, told)
    try:
        for process in processes:
            process.start()
        while not ending.is_set():
            _look(processes, log)
            await asyncio.sleep(_WATCH)
    finally:
        if not ending.is_set():  # a second signal would end their drain
            tell(signal.SIGTERM)
        await _ended(processes, patience)
        log.info("stopped")


def _look(processes: list[_Process], log: Log) -> None:
    """Starts dead processes again. Raises ProcessDied if one could not start the first time."""
    for process in processes:
        if process.running is None:
            if time.monotonic() >= process.again_at:
                process.start()
        elif (status := process.running.poll()) is not None:
            early = process.starts == 1 and time.monotonic() - process.started_at < _STARTED
            if early and status > 0:
                raise ProcessDied(f"process {process.number} of the gateway ended with status {status}: read its last messages")
            delay = process.died()
            log.error("process died", process=process.number, status=status, seconds=delay)


async def _ended(processes: list[_Process], patience: float) -> None:
    """Waits for all; kills those that still run after `patience` seconds."""
    deadline = time.monotonic() + patience
    running = [process.running for process in processes if process.running is not None]
    while any(child.poll() is None for child in running) and time.monotonic() < deadline:
        await asyncio.sleep(_WATCH)
    for child in running:
        if child.poll() is None:
            child.kill()
        child.wait()
