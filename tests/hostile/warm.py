"""One pytest that has read what the tests need, and forks for each run: a run costs what it tests, and no start.

Rules:
- The process that forks imports nothing of the tree but `tests/conftest.py`. Each run reads the product as it is then.
- Compiled files of the tree are valid by the hash of their source. A changed source is compiled again, and never kept.
- One run at a time. A request is a line of JSON: its number, the names of tests, and how long they may take together. The
  answer is a line with that number and the exit status. A caller whose patience ended earlier leaves an answer behind, which
  the next one passes over.
- Before the first request comes an answer of number 0 that nobody asked for: everything is imported.
- What a run leaves behind is killed after it: each run has a process group of its own.
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
AGAIN: Final = 5  # seconds to the next reminder: an event loop's callback swallows one
PATIENCE: Final = 90  # seconds for a run of one test with its fixtures, below what pytest gives the test that asked for it
LIMITS: Final = (f"--timeout={LIMIT}", "-o", "timeout_func_only=true")  # a busy machine is slow to set a test up
OPTIONS: Final = ("-q", "-x", "-p", "no:cacheprovider", *LIMITS)


class Warm:
    """Runs tests of the tree. Each run sees the sources as they are when it starts."""

    def __init__(self, channel: socket.socket, output: Path) -> None:
        self._requests, self._answers = channel.makefile("w"), channel.makefile("r")
        self._output = output
        self._asked = 0

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
                process.wait(2 * PATIENCE)

    def run(self, *tests: str, patience: float = PATIENCE) -> tuple[int, str]:
        """The exit status of pytest, -9 if it was killed, and what it printed. patience: seconds until it is killed."""
        before = self._output.stat().st_size
        self._asked += 1
        print(json.dumps([self._asked, tests, patience]), file=self._requests, flush=True)
        return self._answer(before)

    def _answer(self, before: int) -> tuple[int, str]:
        """To the last request. before: the size of the output when it was asked for."""
        number = status = -1
        while number != self._asked and (answer := self._answers.readline()):
            number, status = json.loads(answer)
        with self._output.open("rb") as output:
            output.seek(before)
            said = output.read().decode(errors="replace")
        if number != self._asked:
            raise RuntimeError(f"the process that forks has ended:\n{said[-2000:]}")
        return status, said


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
        # Two files: one for both directions would drop the requests that it has read when an answer is written.
        with self._channel.makefile("r") as requests, self._channel.makefile("w") as answers:
            print(json.dumps([0, 0]), file=answers, flush=True)
            for line in requests:
                number, tests, patience = json.loads(line)
                status = self._fork(config, tests, patience)
                if status is None:
                    return None  # in the fork: pytest goes on
                print(json.dumps([number, status]), file=answers, flush=True)
        return 0

    @pytest.hookimpl
    def pytest_timeout_set_timer(self, item: Any, settings: Any) -> bool:
        """In place of the plugin's own alarm, which rings once and may be swallowed."""

        def ring(_signal: int, _frame: object) -> None:
            __tracebackhide__ = True
            pytest.fail(f"Timeout (>{settings.timeout}s)")

        def cancel() -> None:
            signal.setitimer(signal.ITIMER_REAL, 0)
            signal.signal(signal.SIGALRM, signal.SIG_DFL)

        item.cancel_timeout = cancel  # what the plugin calls at the end
        signal.signal(signal.SIGALRM, ring)
        signal.setitimer(signal.ITIMER_REAL, settings.timeout, AGAIN)
        return True

    def _fork(self, config: pytest.Config, tests: list[str], patience: float) -> int | None:
        """The status of a run, and None inside it."""
        sys.stdout.flush()
        process = os.fork()
        if process == 0:
            os.setpgid(0, 0)
            self.forked = True
            config.args = tests
            return None
        with suppress(OSError):  # the fork does the same; whoever is first
            os.setpgid(process, process)
        poll = select.poll()
        watched = os.pidfd_open(process)
        poll.register(watched, select.POLLIN)
        if not poll.poll(patience * 1000):
            os.kill(process, signal.SIGKILL)
        os.close(watched)
        status = os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])
        with suppress(ProcessLookupError):  # nothing was left
            os.killpg(process, signal.SIGKILL)
        return status

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
