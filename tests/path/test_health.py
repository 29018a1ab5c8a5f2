"""What a container's health check asks: the gateway on its port, the worker by its file."""

from __future__ import annotations

import asyncio
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from lacre_backend.health import READY, STALE, main, tell, wrong_with
from parts.stage.standing import end
from parts.up import Up
from parts.waiting import until

GATEWAY = ("lacre_gateway.probe", "gateway/gateway.toml")
WORKER = ("lacre_backend.health", "workers/default/worker.toml")


@pytest.fixture(scope="module")
def live(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Up]:
    with Up.start(tmp_path_factory.mktemp("health") / "state") as running:
        yield running
        for pid in running.children().values():
            os.kill(pid, signal.SIGCONT)


def ask(live: Up, who: tuple[str, str], *options: str) -> tuple[int, str]:
    module, settings = who
    command = [sys.executable, "-P", "-m", module, "--settings", str(live.state / settings), *options]
    done = subprocess.run(command, check=False, capture_output=True, text=True, timeout=30)
    return done.returncode, done.stderr


@pytest.mark.parametrize("who", [GATEWAY, WORKER], ids=["gateway", "worker"])
@pytest.mark.parametrize("options", [(), ("--ready",)], ids=["healthy", "ready"])
def test_what_runs_says_yes(live: Up, who: tuple[str, str], options: tuple[str, ...]) -> None:
    assert ask(live, who, *options) == (0, "")


def test_a_gateway_that_stands_still_says_no(live: Up) -> None:
    pid = live.children()["lacre_gateway"]
    os.kill(pid, signal.SIGSTOP)
    try:
        status, said = ask(live, GATEWAY)
    finally:
        os.kill(pid, signal.SIGCONT)
    assert status == 1
    assert "no answer" in said


def test_settings_that_do_not_hold_say_so(live: Up, tmp_path: Path) -> None:
    for module, _ in (GATEWAY, WORKER):
        path = tmp_path / f"{module}.toml"
        path.write_text("pool = 1\n")
        status, said = ask(live, (module, str(path)))
        assert status == 1
        assert str(path) in said


async def test_a_worker_that_stands_still_or_cannot_serve_says_no(tmp_path: Path) -> None:
    path, state = tmp_path / "health", READY
    assert "has not started" in str(wrong_with(path, time.time(), ready=False))
    telling = asyncio.create_task(tell(path, lambda: state))
    await until(path.exists)
    assert wrong_with(path, time.time(), ready=True) is None
    assert "been stuck" in str(wrong_with(path, time.time() + STALE + 1, ready=False))
    state = "draining"
    await until(lambda: path.read_text() == state)
    assert wrong_with(path, time.time(), ready=False) is None, "it is not to be restarted"
    assert wrong_with(path, time.time(), ready=True) == "draining"
    await end(telling)
    assert not path.exists(), "the next process must not seem ready before it is"


def test_the_servers_of_an_upstream_are_printed_and_the_first_line_decides(
    live: Up, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text = (live.state / WORKER[1]).read_text()
    own, health = tmp_path / "worker.toml", tmp_path / "health"
    own.write_text(re.sub(r'^health = ".*"$', f'health = "{health}"', text, flags=re.MULTILINE))
    line = "upstream http://127.0.0.1:1 down running=0 sent=0 unreachable=3 failed=0"
    for state, status in ((READY, 0), ("the upstream does not answer", 1)):
        health.write_text(f"{state}\n{line}")
        assert main(["--settings", str(own), "--ready"]) == status
        said = capsys.readouterr()
        assert said.out == f"{line}\n"
        assert said.err == ("" if status == 0 else f"{state}\n")
