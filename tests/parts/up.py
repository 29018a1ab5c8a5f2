"""`lacre up` as a process of its own, the way a person starts it."""

from __future__ import annotations

import os
import re
import selectors
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

LACRE = [sys.executable, "-P", "-m", "lacre"]  # as the installed command: without the current folder on its path
START = 60.0  # seconds
MARKS = {
    "nats-server": "nats-server",
    "lacre_gateway": "-m lacre_gateway ",
    "lacre_backend": "-m lacre_backend ",
}  # of a command


@dataclass
class Up:
    """A running `lacre up`. url and token: what it wrote into `env`."""

    process: subprocess.Popen[str]
    state: Path
    url: str
    token: str
    output: str = ""

    @classmethod
    def start(cls, state: Path, *arguments: str) -> Up:
        command = [*LACRE, "up", "--state", str(state), "--port", "0", *arguments]
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment(state))
        line = _line_with("ready lacre", process)
        url, token = read_env(state)
        assert line.split()[1] == url
        return cls(process, state, url, token)

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
        """The lines since it was ready, of a process that ended."""
        if self.process.stdout is not None and not self.process.stdout.closed:
            with self.process.stdout as output:
                self.output = output.read()
        return self.output.splitlines()

    def stop(self, number: signal.Signals = signal.SIGTERM) -> int:
        if self.process.poll() is None:
            self.process.send_signal(number)
        status = self.process.wait(30)
        self.said()
        return status


def environment(state: Path) -> dict[str, str]:
    """This process's environment, with a home for remembered manifests beside the state."""
    clean = {name: value for name, value in os.environ.items() if not name.startswith("LACRE_")}
    return clean | {"XDG_STATE_HOME": str(state.parent / "xdg")}


def read_env(state: Path) -> tuple[str, str]:
    text = (state / "env").read_text()
    found = dict(re.findall(r"^export (LACRE_\w+)='([^']*)'$", text, re.MULTILINE))
    return found["LACRE_URL"], found["LACRE_TOKEN"]


def descendants(pid: int) -> list[int]:
    found = []
    for child in Path(f"/proc/{pid}/task").glob("*/children"):
        for number in child.read_text().split():
            found += [int(number), *descendants(int(number))]
    return found


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def ticks(pid: int) -> int:
    """CPU time so far, in clock ticks (proc(5)): the worker that answers is the one that computes."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return int(fields[11]) + int(fields[12])


def wait_until_gone(pids: list[int], seconds: float) -> list[int]:
    """Those that are still there after `seconds`."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline and any(map(alive, pids)):
        time.sleep(0.05)
    return [pid for pid in pids if alive(pid)]


def _line_with(text: str, process: subprocess.Popen[str]) -> str:
    assert process.stdout is not None
    selector = selectors.DefaultSelector()
    selector.register(process.stdout, selectors.EVENT_READ)
    deadline, seen = time.monotonic() + START, ""
    while time.monotonic() < deadline and process.poll() is None:
        if selector.select(timeout=0.5):
            line = process.stdout.readline()
            seen += line
            if line.startswith(text):
                return line
    process.kill()
    raise AssertionError(f"`lacre up` did not become ready: {seen}{process.communicate()[0]}")
