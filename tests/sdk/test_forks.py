"""Clients of a process that forks: each process has connections, locks and salts of its own, and nobody is accused for it."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest

from lacre.runtime.forks import Undivided
from parts.certificates import Ca
from parts.chat_app import ChatApp
from parts.forking import PROGRAMS
from parts.live import Gateway, beside
from parts.relay import Relay

TESTS = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def gateway() -> Iterator[Gateway]:
    with beside(Gateway(Relay(ChatApp()))) as gateway:
        yield gateway


@pytest.fixture(scope="module")
def secured(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Gateway, Path]]:
    """The same over TLS, and the file of the authority that it is known by."""
    folder = tmp_path_factory.mktemp("tls")
    ca = Ca(folder)
    with beside(Gateway(Relay(ChatApp())), ca.issue(folder, "gateway")) as gateway:
        yield gateway, ca.file


def seen(name: str, *arguments: str) -> Counter[str]:
    command = [sys.executable, "-P", "-W", "ignore::DeprecationWarning", "-m", "parts.forking", name, *arguments]
    environment = os.environ | {"PYTHONPATH": str(TESTS)}
    program = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment, start_new_session=True
    )
    try:
        told, complaints = program.communicate(timeout=60)
    except subprocess.TimeoutExpired:
        os.killpg(program.pid, signal.SIGKILL)  # and with it its children
        told, complaints = program.communicate()
        raise AssertionError(f"{name} hangs: {told} {complaints}") from None
    assert (program.returncode, complaints) == (0, "")
    return Counter(json.loads(told))


@pytest.mark.parametrize("name", [program.__name__ for program in PROGRAMS])
def test_in_the_clear(gateway: Gateway, tmp_path: Path, name: str) -> None:
    assert set(seen(name, gateway.url, *([str(tmp_path)] if name == "remembered" else []))) == {"ok"}


@pytest.mark.parametrize("name", ["plain", "threads", "leaving", "loops", "forked_in_a_task"])
def test_over_tls(secured: tuple[Gateway, Path], name: str) -> None:
    """Where the end of a connection is said aloud (`close_notify`), a child says nothing in its parent's name."""
    gateway, ca = secured
    assert set(seen(name, gateway.url, str(ca))) == {"ok"}


@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")  # newer Pythons warn of threads
def test_a_fork_waits_for_what_it_must_not_cut() -> None:
    """Libraries that are half loaded, or tables that are half made, would stay so in the child."""
    began, done = threading.Event(), threading.Event()

    def work() -> None:
        began.set()
        time.sleep(0.2)
        done.set()

    undivided = Undivided(work)
    thread = threading.Thread(target=undivided)
    thread.start()
    began.wait(10)
    pid = os.fork()
    if not pid:
        undivided()  # which is done here too, and not held by anyone
        os._exit(0 if done.is_set() else 1)
    assert os.waitpid(pid, 0)[1] == 0
    thread.join()
