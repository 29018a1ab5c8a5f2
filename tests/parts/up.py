"""`lacre up` as a process of its own, the way a person starts it."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import lacre
from parts.waiting import PATIENCE, wait_until

LACRE = [sys.executable, "-P", "-m", "lacre"]  # as the installed command: without the current folder on its path
READY = re.compile(r"^ready (lacre\S+)$", re.MULTILINE)
MARKS = {
    "nats-server": "nats-server",
    "lacre_gateway": "-m lacre_gateway ",
    "lacre_backend": "-m lacre_backend ",
}  # of a command


@dataclass
class Up:
    """A running `lacre up`. url and token: what it wrote into `env`. log: what it said."""

    process: subprocess.Popen[bytes]
    state: Path
    log: Path
    url: str = ""
    token: str = ""

    @classmethod
    def start(cls, state: Path, *arguments: str, as_shipped: bool = True, lacre: Sequence[str] = LACRE) -> Up:
        """as_shipped: serve the default model's shipped file, whose answers are the same everywhere. lacre: the command."""
        log = state.with_name(f"up-{time.monotonic_ns()}.log")
        command = [*lacre, "up", "--state", str(state), "--port", "0", *(["--as-shipped"] if as_shipped else []), *arguments]
        with log.open("wb") as output:
            up = cls(subprocess.Popen(command, stdout=output, stderr=output, env=environment(state)), state, log)
        try:
            wait_until(lambda: READY.search(log.read_text()) or up.process.poll() is not None, PATIENCE, log.read_text)
            found = READY.search(log.read_text())
            assert found, log.read_text()
        except BaseException:
            up.process.kill()
            raise
        up.url, up.token = read_env(state)
        assert found[1] == up.url
        return up

    def __enter__(self) -> Up:
        return self

    def __exit__(self, *_error: object) -> None:
        self.stop()

    def client(self, **options: Any) -> lacre.Client:
        return lacre.Client(self.url, **{"token": self.token, "memory": lacre.VersionMemory(), **options})

    def command(self, *arguments: str, **variables: str) -> str:
        """What a command says that works on its state, and succeeds."""
        done = run(*arguments, "--state", str(self.state), up=self, **variables)
        assert done.returncode == 0, done.stderr
        return done.stdout.strip()

    @property
    def base_url(self) -> str:
        found = re.match(r"lacre\+(http://[^?]+)\?", self.url)
        assert found
        return found[1]

    def children(self) -> dict[str, int]:
        """Every living descendant, by what it runs: `nats-server`, `lacre_gateway`, `lacre_backend`."""
        names = {}
        for pid in descendants(self.process.pid):
            command = Path(f"/proc/{pid}/cmdline").read_bytes().decode().replace("\0", " ")
            for name, mark in MARKS.items():
                if mark in command:  # and no child of a worker's own, such as its tokenizer
                    names[name] = pid
        return names

    def workers(self) -> list[int]:
        """The process of each living worker."""
        found = {pid: Path(f"/proc/{pid}/cmdline").read_bytes() for pid in descendants(self.process.pid)}
        return [pid for pid, command in found.items() if b"-m\0lacre_backend\0" in command and alive(pid)]

    def said(self) -> list[str]:
        """The lines since it was ready."""
        found = READY.search(self.log.read_text())
        return [] if found is None else found.string[found.end() + 1 :].splitlines()

    def stop(self, number: signal.Signals = signal.SIGTERM) -> int:
        if self.process.poll() is None:
            self.process.send_signal(number)
        return self.process.wait(30)


def environment(state: Path) -> dict[str, str]:
    """This process's environment, with homes for remembered manifests and for what is cached beside the state."""
    clean = {name: value for name, value in os.environ.items() if not name.startswith("LACRE_")}
    return clean | {"XDG_STATE_HOME": str(state.parent / "xdg"), "XDG_CACHE_HOME": str(state.parent / "cache")}


def run(
    *arguments: str, up: Up | None = None, state: Path = Path("/nonexistent/x"), stdin: str = "", **variables: str
) -> subprocess.CompletedProcess[str]:
    """A `lacre` command, as it is typed. up: which its environment names."""
    named = {} if up is None else {"LACRE_URL": up.url, "LACRE_TOKEN": up.token}
    env = environment(state if up is None else up.state) | named | variables
    return subprocess.run([*LACRE, *arguments], check=False, capture_output=True, text=True, timeout=120, env=env, input=stdin)


def read_env(state: Path) -> tuple[str, str]:
    text = (state / "env").read_text()
    found = dict(re.findall(r"^export (LACRE_\w+)='([^']*)'$", text, re.MULTILINE))
    return found["LACRE_URL"], found["LACRE_TOKEN"]


def descendants(pid: int) -> list[int]:
    found = []
    for child in Path(f"/proc/{pid}/task").glob("*/children"):
        with suppress(FileNotFoundError, ProcessLookupError):  # the thread or process has just ended
            for number in child.read_text().split():
                found += [int(number), *descendants(int(number))]
    return found


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def ticks(pid: int) -> int:
    """CPU time so far of a process and all below it, in clock ticks (proc(5)): the worker that answers is the one whose engine
    computes.
    """
    total = 0
    for each in (pid, *descendants(pid)):
        with suppress(FileNotFoundError, ProcessLookupError):  # it has just ended
            fields = Path(f"/proc/{each}/stat").read_text().rpartition(")")[2].split()
            total += int(fields[11]) + int(fields[12])
    return total


def engine_of(worker: int) -> int | None:
    """The process of a worker's engine; None while there is none."""
    for pid in descendants(worker):
        with suppress(FileNotFoundError, ProcessLookupError):
            if b"lacre_backend.engine_process.child" in Path(f"/proc/{pid}/cmdline").read_bytes() and alive(pid):
                return pid
    return None


def wait_until_gone(pids: list[int]) -> list[int]:
    """Those that do not end."""
    with suppress(AssertionError):
        wait_until(lambda: not any(map(alive, pids)), PATIENCE)
    return [pid for pid in pids if alive(pid)]
