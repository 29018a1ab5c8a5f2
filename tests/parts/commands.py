"""`lacre` commands for tests: each is a process of its own, forked from a Python that has imported what commands import.

Rules:
- For tests of what a command does. Tests of a start, a terminal, signals or odd surroundings use `LACRE`, a whole Python.
- A command has the environment, the folder and the input that it is given, and nothing of an earlier command.
- The process that forks has one thread, and ends with this one. A command whose caller has left is killed.
"""

from __future__ import annotations

import atexit
import gc
import importlib
import json
import os
import pkgutil
import random
import runpy
import select
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from contextlib import suppress
from functools import cache
from importlib.metadata import entry_points
from importlib.util import find_spec
from pathlib import Path
from typing import Final

# A worker's modules are not among them: few commands import them, and they load the model's library.
PACKAGES: Final = ("lacre", "lacre_fabric", "lacre_gateway")
# Read by no command: OpenAI's library, which takes as long as all the rest, and what makes this process the command.
LEFT_OUT: Final = ("lacre.openai", "__main__")
MAX_REQUEST: Final = 131_072  # bytes: words and an environment


def run_lacre(
    *words: object, env: Mapping[str, str] | None = None, stdin: str = "", cwd: Path | None = None, seconds: float = 120
) -> subprocess.CompletedProcess[str]:
    """Runs `lacre WORDS`. env, cwd: this process's if omitted. Raises subprocess.TimeoutExpired."""
    done = run_lacre_bytes(*words, env=env, stdin=stdin.encode(), cwd=cwd, seconds=seconds)
    out, err = (said.decode().replace("\r\n", "\n") for said in (done.stdout, done.stderr))
    return subprocess.CompletedProcess(done.args, done.returncode, out, err)


def run_lacre_bytes(
    *words: object, env: Mapping[str, str] | None = None, stdin: bytes = b"", cwd: Path | None = None, seconds: float = 120
) -> subprocess.CompletedProcess[bytes]:
    command = ["lacre", *map(str, words)]
    request = json.dumps([command, dict(os.environ if env is None else env), str(cwd or Path.cwd())]).encode()
    assert len(request) <= MAX_REQUEST
    with tempfile.TemporaryFile() as given, tempfile.TemporaryFile() as output, tempfile.TemporaryFile() as errors:
        given.write(stdin)
        given.seek(0)
        ours, theirs = socket.socketpair()
        with ours:
            with theirs:
                socket.send_fds(_forking(), [request], [each.fileno() for each in (theirs, given, output, errors)])
            ours.settimeout(seconds)
            try:
                status = ours.recv(16)
            except TimeoutError as late:
                raise subprocess.TimeoutExpired(command, seconds) from late
        output.seek(0)
        errors.seek(0)
        assert status, f"the process that forks has ended: {command}"
        return subprocess.CompletedProcess(command, int(status), output.read(), errors.read())


@cache
def _forking() -> socket.socket:
    """The channel to the process that forks, which starts now."""
    ours, theirs = socket.socketpair(type=socket.SOCK_SEQPACKET)
    with theirs:
        clean = {name: value for name, value in os.environ.items() if not name.startswith("LACRE_")}
        command = [sys.executable, "-P", __file__, str(theirs.fileno())]
        process = subprocess.Popen(command, env=clean, pass_fds=[theirs.fileno()], stdin=subprocess.DEVNULL)

    def end() -> None:
        ours.close()
        process.wait(60)

    atexit.register(end)
    assert ours.recv(1), "the process that forks did not start"  # no command's patience pays for this
    return ours


# What follows runs in the process that forks, and in its forks.


def main() -> None:
    channel = socket.socket(fileno=int(sys.argv[1]))
    _import_all()
    channel.send(b"+")
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # nobody waits for those that attend a command
    while True:
        request, files, _, _ = socket.recv_fds(channel, MAX_REQUEST, 4)
        if not request:
            return
        if os.fork() == 0:
            channel.close()
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            _attend(request, files)
            return
        for file in files:
            os.close(file)


def _import_all() -> None:
    for entry in entry_points(group="lacre.commands"):
        entry.load()
    for package in (importlib.import_module(name) for name in PACKAGES if find_spec(name)):
        for module in pkgutil.walk_packages(package.__path__, f"{package.__name__}."):
            if not module.name.endswith(LEFT_OUT):
                with suppress(ImportError):  # it needs an extra that is not installed here
                    importlib.import_module(module.name)
    gc.collect()
    gc.freeze()
    assert len(list(Path("/proc/self/task").iterdir())) == 1, "a process that forks has one thread"


def _attend(request: bytes, files: list[int]) -> None:
    """Forks the command, and tells the caller how it ends. Returns in the command alone, when it has ended."""
    command = os.fork()
    if command == 0:
        _become(request, files)
        return
    caller = socket.socket(fileno=files[0])
    ended, poll = os.pidfd_open(command), select.poll()
    poll.register(ended, select.POLLIN)
    poll.register(caller, select.POLLIN)
    if ended not in dict(poll.poll()):
        os.kill(command, signal.SIGKILL)
    status = os.waitstatus_to_exitcode(os.waitpid(command, 0)[1])
    with suppress(OSError):
        caller.sendall(str(status).encode())
    os._exit(0)


def _become(request: bytes, files: list[int]) -> None:
    words, variables, folder = json.loads(request)
    for place, file in enumerate(files[1:]):
        os.dup2(file, place)
    for file in files:
        os.close(file)
    os.chdir(folder)
    os.environ.clear()
    os.environ.update(variables)
    time.tzset()
    random.seed()
    sys.argv = words
    runpy.run_module("lacre", run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    main()
