"""Runs a program of ours as it is, in a process of its own, and kills its background work by name.

    python -m parts.doomed SOCKET MODULE [ARGUMENT...]

The program knows nothing of this. A side thread listens on a socket. It finds a name in the register of
`lacre.runtime.tasks`, and throws an exception into what that coroutine waits for, or into that thread.
"""

from __future__ import annotations

import asyncio
import ctypes
import json
import os
import queue
import runpy
import shutil
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lacre.runtime import tasks
from parts.waiting import wait_until

ROOT = Path(__file__).resolve().parent.parent
PATIENCE = 120.0  # seconds; the machine may be busy


class Doom(Exception):
    """Nothing of ours expects it."""


def _throw(task: asyncio.Task[Any]) -> None:
    """Into the innermost await. What is running or about to run is tried again in a moment."""
    waited = task._fut_waiter  # type: ignore[attr-defined]
    while isinstance(waited, asyncio.Task):
        waited = waited._fut_waiter  # type: ignore[attr-defined]
    if waited is None or waited.done():
        if not task.done():
            task.get_loop().call_later(0.01, _throw, task)
        return
    waited.set_exception(Doom())


def _interrupt(entry: tasks.Thread) -> None:
    """Raises in the thread, and wakes it, for it takes notice only when it runs."""
    ctypes.pythonapi.PyThreadState_SetAsyncExc(ctypes.c_ulong(entry.ident or 0), ctypes.py_object(Doom))
    others = [other.task.get_loop() for other in tasks.alive() if not isinstance(other, tasks.Thread)]
    for kept in list(vars(entry._target.__self__).values()):  # type: ignore[attr-defined]
        if isinstance(kept, threading.Event):
            kept.set()
        elif isinstance(kept, threading.Condition):
            with kept:
                kept.notify_all()
        elif isinstance(kept, queue.Queue):
            with kept.not_empty:
                kept.not_empty.notify_all()
        elif isinstance(kept, asyncio.AbstractEventLoop) and kept not in others:  # a thread may know the loop of its owner
            kept.call_soon_threadsafe(kept.stop)


def _answer(said: dict[str, Any]) -> Any:
    if "kill" not in said:
        return [[entry.name, entry.restart is not None] for entry in tasks.alive()]
    for entry in tasks.alive():
        if entry.name == said["kill"]:
            if isinstance(entry, tasks.Thread):
                _interrupt(entry)
            else:
                entry.task.get_loop().call_soon_threadsafe(_throw, entry.task)
    return None


def _listen(path: str) -> None:
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(path)
        listener.listen()
        while True:
            connection, _ = listener.accept()
            with connection, connection.makefile("rw") as lines:
                lines.write(json.dumps(_answer(json.loads(lines.readline()))) + "\n")
                lines.flush()


@dataclass
class Doomed:
    """A program that runs like that. log: what it wrote to stdout and stderr."""

    process: subprocess.Popen[bytes]
    path: Path
    log: Path

    @classmethod
    def start(cls, log: Path, module: str, *arguments: str, environment: dict[str, str] | None = None) -> Doomed:
        path = Path(tempfile.mkdtemp(prefix="doomed-")) / "s"  # a socket's path has room for some hundred bytes
        env = {**(environment or os.environ), "PYTHONPATH": str(ROOT)}
        command = [sys.executable, "-m", "parts.doomed", str(path), module, *arguments]
        with log.open("ab") as output:
            process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=output, stderr=output, env=env)
        return cls(process, path, log)

    def register(self) -> dict[str, bool]:
        """The names of what lives, and whether each starts again after a death."""
        with suppress(ConnectionRefusedError):  # the socket is there a moment before anybody listens
            return dict(self._ask({}))
        return {}

    def until(self, true: Callable[[], Any]) -> None:
        wait_until(true, PATIENCE, self.said)

    def works(self, wanted: set[str]) -> bool:
        return self.path.exists() and wanted <= self.register().keys()

    def kill(self, name: str, *, until: Callable[[], Any]) -> None:
        """Throws until `until`: work that tries things again takes one throw for a failed try."""

        def tried() -> bool:
            if not until():
                with suppress(OSError):  # it is ending
                    self._ask({"kill": name})
                time.sleep(0.1)
            return bool(until())

        self.until(tried)

    def ended(self) -> bool:
        return self.process.poll() is not None

    def said(self) -> str:
        return self.log.read_text(errors="replace")

    def stop(self) -> int:
        """May be called twice."""
        if not self.ended():
            self.process.terminate()
        try:
            return self.process.wait(PATIENCE)
        finally:
            self.process.kill()
            self.process.wait()
            shutil.rmtree(self.path.parent, ignore_errors=True)

    def _ask(self, said: dict[str, Any]) -> Any:
        with socket.socket(socket.AF_UNIX) as connection:
            connection.settimeout(PATIENCE)
            connection.connect(str(self.path))
            with connection.makefile("rw") as lines:
                lines.write(json.dumps(said) + "\n")
                lines.flush()
                return json.loads(lines.readline() or "null")


if __name__ == "__main__":
    place, program, *rest = sys.argv[1:]
    threading.Thread(target=_listen, args=(place,), daemon=True).start()
    sys.argv = [program, *rest]
    runpy.run_module(program, run_name="__main__", alter_sys=True)
