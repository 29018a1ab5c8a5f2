"""What `lacre up` keeps running: which children that die are started again, and when; and the token that a shell has."""

from __future__ import annotations

import asyncio
import stat
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import jwt
import pytest

from lacre.runtime import tasks
from lacre_fabric.operate import dev_issuer
from lacre_fabric.operate.site import Site
from lacre_fabric.operate.supervisor import FIRST_INTERVAL, LONGEST_INTERVAL, SETTLED, ChildDied, Supervisor
from lacre_fabric.operate.up import ENV_RENEWAL, keep_env
from parts.up import read_env
from parts.waiting import until

SLEEPS = [sys.executable, "-S", "-c", "import time; time.sleep(60)"]
DIES = [sys.executable, "-S", "-c", "print('no such model'); raise SystemExit(3)"]


@pytest.fixture
def told() -> list[str]:
    return []


@pytest.fixture
def supervisor(told: list[str]) -> Iterator[Supervisor]:
    supervisor = Supervisor(told.append)
    yield supervisor
    supervisor.stop()


async def test_a_child_that_all_depend_on_ends_the_watch(supervisor: Supervisor, tmp_path: Path) -> None:
    supervisor.start("worker", SLEEPS, tmp_path / "worker.log", again=True)
    supervisor.start("gateway", DIES, tmp_path / "gateway.log")
    with pytest.raises(ChildDied, match=r"gateway ended with status 3; .*\nno such model"):
        async with asyncio.timeout(20):
            await supervisor.watch()


async def test_a_worker_that_is_killed_is_started_again(supervisor: Supervisor, tmp_path: Path, told: list[str]) -> None:
    child = supervisor.start("worker", SLEEPS, tmp_path / "worker.log", again=True)
    watching = asyncio.create_task(supervisor.watch())
    child.process.kill()
    await until(lambda: len(told) == 2, 20)
    watching.cancel()
    assert told[0].startswith("worker ended with status -9 (Killed)") and told[0].endswith("restarts in 1 s")
    assert told[1] == "worker was restarted"
    supervisor.check()  # and lives


def test_intervals_grow_and_begin_anew_after_a_long_life(supervisor: Supervisor, tmp_path: Path, told: list[str]) -> None:
    """By a clock of its own. Nothing is given up: what killed it may be mended."""
    supervisor.start("worker", DIES, tmp_path / "worker.log", again=True)
    now, intervals = time.monotonic(), []
    for _ in range(8):
        _wait_until_dead(supervisor)
        supervisor.tend(now)
        intervals.append(float(told[-1].rpartition(" in ")[2].removesuffix(" s")))
        supervisor.tend(now + intervals[-1] - 0.01)
        assert "restarts in" in told[-1], "not before its time"
        now += intervals[-1]
        supervisor.tend(now)
        assert told[-1] == "worker was restarted"
    assert intervals == [1, 2, 4, 8, 16, 30, 30, 30]
    assert (intervals[0], intervals[-1]) == (FIRST_INTERVAL, LONGEST_INTERVAL)
    _wait_until_dead(supervisor)
    supervisor.tend(now + SETTLED)
    assert told[-1].endswith("in 1 s")
    assert "no such model" in told[-1], "each death shows the end of this run's log"


def _wait_until_dead(supervisor: Supervisor) -> None:
    deadline = time.monotonic() + 20
    while time.monotonic() < deadline:
        try:
            supervisor.check()
        except ChildDied:
            return
        time.sleep(0.01)
    raise AssertionError("it lives")


async def test_the_file_that_a_shell_sources_is_renewed(site: Site) -> None:
    """The token in it, while `lacre up` runs."""
    url = "http://127.0.0.1:8321"
    path = site.write_env(url)
    connection_string, first = read_env(site.folder)
    keeping = asyncio.create_task(keep_env(site, url, every=0.01))
    await until(lambda: read_env(site.folder)[1] != first)
    await tasks.end(keeping)
    again, second = read_env(site.folder)
    assert again == connection_string
    claims = [jwt.decode(token, options={"verify_signature": False}) for token in (first, second)]
    assert claims[0]["jti"] != claims[1]["jti"]
    assert claims[1]["exp"] >= claims[0]["exp"]
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert ENV_RENEWAL < dev_issuer.LIFETIME / 2  # what was sourced just before the renewal is good for a while yet
