"""One pytest that has read what the tests need, and forks for each run: a run costs what it tests, and no start.

Rules:
- The process that forks imports nothing of the tree but `tests/conftest.py`. Each run reads the product as it is then.
- Compiled files of the tree are valid by the hash of their source. A changed source is compiled again, and never kept.
- One run at a time. A request is a line of JSON, the names of tests. The answer is a line with the exit status.
- Before the first request comes an answer that nobody asked for: everything is imported.
"""

from __future__ import annotations

import compileall
import gc
import importlib
import json
import os
import select
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from py_compile import PycInvalidationMode
from typing import Any, Final

import pytest

LIMIT: Final = 10  # seconds for a test that a mutation sends round for ever, without its fixtures
PATIENCE: Final = 300  # seconds for a run
LIMITS: Final = (f"--timeout={LIMIT}", "-o", "timeout_func_only=true")  # a busy machine is slow to set a test up
OPTIONS: Final = ("-q", "-x", "-p", "no:cacheprovider", *LIMITS)


class Warm:
    """Runs tests of the tree. Each run sees the sources as they are when it starts."""

    def __init__(self, channel: socket.socket, output: Path) -> None:
        self._lines = channel.makefile("rw")
        self._output = output

    @classmethod
    @contextmanager
    def of(cls, tree: Path, rooms: Sequence[str]) -> Iterator[Warm]:
        """tree: a copy of the repository, which nobody else changes."""
        for name in (*rooms, "tests"):
            compileall.compile_dir(tree / name, quiet=2, invalidation_mode=PycInvalidationMode.CHECKED_HASH)
        ours, theirs = socket.socketpair()
        with ours, theirs, tempfile.NamedTemporaryFile() as output:
            command = [sys.executable, "-P", str(tree / "tests/hostile/warm.py"), str(theirs.fileno()), str(tree)]
            path = os.pathsep.join([str(tree), *(str(tree / room) for room in rooms)])
            environment = {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}
            process = subprocess.Popen(
                command, cwd=tree, env=environment | {"PYTHONPATH": path}, pass_fds=[theirs.fileno()],
                stdin=subprocess.DEVNULL, stdout=output, stderr=output,
            )  # fmt: skip
            theirs.close()
            try:
                warm = cls(ours, Path(output.name))
                warm._answer(0)
                yield warm
            finally:
                ours.shutdown(socket.SHUT_RDWR)
                process.wait(PATIENCE)

    def run(self, *tests: str) -> tuple[int, str]:
        """The exit status of pytest, and what it printed."""
        before = self._output.stat().st_size
        self._lines.write(json.dumps(tests) + "\n")
        self._lines.flush()
        return self._answer(before)

    def _answer(self, before: int) -> tuple[int, str]:
        """The next one. before: the size of the output when it was asked for."""
        answer = self._lines.readline()
        with self._output.open("rb") as output:
            output.seek(before)
            said = output.read().decode(errors="replace")
        if not answer:
            raise RuntimeError(f"the process that forks has ended:\n{said[-2000:]}")
        return int(answer), said


class Forks:
    """The plugin of that pytest: after its set-up, it waits for requests. Only a fork goes on to a session."""

    def __init__(self, channel: socket.socket, tree: Path) -> None:
        self._channel = channel
        self._tree = tree
        self.forked = False

    def pytest_cmdline_main(self, config: pytest.Config) -> int | None:
        sys.dont_write_bytecode = True
        self._read_others(config)
        gc.collect()
        gc.freeze()
        with self._channel.makefile("rw") as lines:
            print(0, file=lines, flush=True)
            for line in lines:
                status = self._fork(config, json.loads(line))
                if status is None:
                    return None  # in the fork: pytest goes on
                print(status, file=lines, flush=True)
        return 0

    def _fork(self, config: pytest.Config, tests: list[str]) -> int | None:
        """The status of a run, and None inside it."""
        sys.stdout.flush()
        process = os.fork()
        if process == 0:
            self.forked = True
            config.args = tests
            return None
        poll = select.poll()
        watched = os.pidfd_open(process)
        poll.register(watched, select.POLLIN)
        if not poll.poll(PATIENCE * 1000):
            os.kill(process, signal.SIGKILL)
        os.close(watched)
        return os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])

    def _read_others(self, config: pytest.Config) -> None:
        """A fork collects all tests, and so compiles them. Then this process imports the others' modules that it read."""
        reading, writing = os.pipe()
        process = os.fork()
        if process == 0:
            sys.dont_write_bytecode = False
            config.args, config.option.collectonly = ["tests/hostile"], True
            session = pytest.Session.from_config(config)
            config._do_configure()
            config.hook.pytest_sessionstart(session=session)
            session.perform_collect()
            with os.fdopen(writing, "w") as names:
                names.write("\n".join(name for name, module in list(sys.modules.items()) if self._is_others(module)))
            os._exit(0)
        os.close(writing)
        with os.fdopen(reading) as names:
            found = names.read().split("\n")
        os.waitpid(process, 0)
        for name in found:
            with suppress(Exception):  # a module under a name that it cannot be imported by
                importlib.import_module(name)

    def _is_others(self, module: Any) -> bool:
        file = getattr(module, "__file__", None)
        return bool(file) and not Path(file).is_relative_to(self._tree)


def main() -> int:
    channel, tree = socket.socket(fileno=int(sys.argv[1])), Path(sys.argv[2])
    return int(pytest.main([*OPTIONS], plugins=[Forks(channel, tree)]))


if __name__ == "__main__":
    sys.exit(main())
