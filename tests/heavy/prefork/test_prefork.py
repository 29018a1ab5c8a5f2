"""Services whose master loads the application, uses its clients, and forks: not one of two hundred calls fails."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Final

import httpx2
import pytest

from heavy.conftest import ROOT, Environment
from parts.chat_app import ChatApp
from parts.live import Gateway, beside
from parts.relay import Relay

HERE: Final = Path(__file__).parent
CALLS, WORKERS = 200, 4
START: Final = 120  # seconds for a master to load the application, and to fork


@pytest.fixture(scope="module")
def gateway() -> Iterator[Gateway]:
    with beside(Gateway(Relay(ChatApp()))) as gateway:
        yield gateway


@pytest.fixture
def surroundings(gateway: Gateway, tmp_path: Path) -> dict[str, str]:
    clean = {name: value for name, value in os.environ.items() if not name.startswith(("LACRE_", "CELERY", "GUNICORN"))}
    own = {"SERVICE_URL": gateway.url, "JOBS_FOLDER": str(tmp_path), "PYTHONPATH": f"{ROOT / 'sdk'}{os.pathsep}{HERE}"}
    return clean | own | {"XDG_STATE_HOME": str(tmp_path / "state")}


@contextmanager
def running(command: Sequence[str], surroundings: dict[str, str], files: Sequence[int] = ()) -> Iterator[subprocess.Popen[str]]:
    """The master, in a group of its own with all that it forks; the group ends with the block."""
    master = subprocess.Popen(
        command, env=surroundings, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, pass_fds=files,
        start_new_session=True, cwd=surroundings["JOBS_FOLDER"],
    )  # fmt: skip
    try:
        yield master
    finally:
        master.send_signal(signal.SIGTERM)
        try:
            master.communicate(timeout=30)
        except subprocess.TimeoutExpired:
            os.killpg(master.pid, signal.SIGKILL)
            master.communicate()


@pytest.mark.parametrize("kind", [("sync",), ("gthread", "--threads", "4")], ids=lambda kind: kind[0])
def test_gunicorn(environment: Environment, surroundings: dict[str, str], kind: Sequence[str]) -> None:
    """With `--preload`. A worker that is replaced in between is a fork of the same master."""
    with socket.create_server(("127.0.0.1", 0), backlog=256) as listener:
        command = [environment("prefork"), "-P", "-m", "gunicorn", "--preload", "--workers", str(WORKERS), "--timeout", "120"]
        bound = ["--bind", f"fd://{listener.fileno()}", "--worker-class", *kind, "web:app"]
        url = f"http://127.0.0.1:{listener.getsockname()[1]}"
        with (
            running([*command, *bound], surroundings, [listener.fileno()]),
            httpx2.Client(base_url=url, timeout=START, trust_env=False) as client,
            ThreadPoolExecutor(2 * WORKERS) as pool,
        ):

            def call(number: int) -> tuple[str, str]:
                pid, _, seen = client.get(f"/{number}", headers={"connection": "close"}).text.partition(" ")
                return pid, seen

            first = list(pool.map(call, range(CALLS // 2)))
            os.kill(int(first[0][0]), signal.SIGTERM)
            seen = [*first, *pool.map(call, range(CALLS // 2))]
    assert Counter(told for _, told in seen) == {"ok": CALLS}
    assert len({pid for pid, _ in seen}) > 1


def called(command: Sequence[str], surroundings: dict[str, str], calls: int) -> None:
    """The program tells of so many calls: each is good, and some were made in processes that replaced others."""
    done = subprocess.run(command, env=surroundings, capture_output=True, text=True, timeout=400, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    seen = json.loads(done.stdout)
    assert Counter(told for _, told in seen) == {"ok": calls}
    assert len({pid for pid, _ in seen}) > WORKERS


def test_celery(environment: Environment, surroundings: dict[str, str]) -> None:
    """With its pool of forked processes, which it replaces after some tasks."""
    python = environment("prefork")
    pool = ["--pool", "prefork", "--concurrency", str(WORKERS), "--max-tasks-per-child", "20", "--loglevel", "WARNING"]
    with running([python, "-P", "-m", "celery", "--app", "jobs", "worker", *pool], surroundings) as worker:
        called([python, "-P", str(HERE / "jobs.py"), str(CALLS)], surroundings, CALLS)
        assert worker.poll() is None


def test_multiprocessing(environment: Environment, surroundings: dict[str, str]) -> None:
    """A pool that is forked from a process whose clients were used, and that replaces its processes after some tasks."""
    called([environment("prefork"), "-P", str(HERE / "pooled.py"), str(CALLS), str(WORKERS)], surroundings, CALLS + 2)
