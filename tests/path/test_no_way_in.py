"""A worker that nobody can reach serves a pool: it dials out, and that is all that it needs."""

from __future__ import annotations

import socket
import subprocess
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from urllib.parse import urlsplit

import pytest

import lacre
from lacre_fabric.operate.leash import PYTHON, leashed
from parts.cut import way_to
from parts.network import Namespace, namespace
from parts.stage import LiveStage

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]

LISTENING = "0A"  # the state of a socket in /proc/PID/net/tcp (proc(5))
PROBE = "import socket, time; s = socket.create_server(('0.0.0.0', 7777)); print('up', flush=True); time.sleep(600)"


@pytest.fixture
def closed() -> Iterator[Namespace]:
    """With a probe in it that listens, so that it shows whether there is a way in."""
    with namespace() as made:
        probe = subprocess.Popen(leashed(made.inside(*PYTHON, "-c", PROBE)), stdout=subprocess.PIPE)
        try:
            assert probe.stdout is not None and probe.stdout.readline() == b"up\n"
            assert reached(made.address), "or what follows would prove nothing"
            made.close_the_way_in()
            assert not reached(made.address)
            yield made
            assert not reached(made.address)
        finally:
            probe.kill()
            probe.communicate()


def reached(address: str) -> bool:
    """Whether a connection to the probe comes about."""
    try:
        socket.create_connection((address, 7777), timeout=2).close()
    except OSError:
        return False
    return True


@pytest.fixture
async def workers(tmp_path: Path) -> AsyncIterator[LiveStage]:
    async with LiveStage.on_air(tmp_path, workers=1) as live:
        yield live


async def test_a_worker_that_nobody_can_reach_serves(
    closed: Namespace, workers: LiveStage, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    [worker] = workers.workers
    worker.stop()
    port = urlsplit(workers.server.url).port
    assert port is not None
    async with way_to(port, closed.host) as way:
        text = worker.settings.read_text()
        worker.settings.write_text(text.replace(workers.server.url, way.url))
        worker.heard = 0.0
        worker.start(closed.inside)
        await workers.heard()
        assert network(worker.process.pid) != network("self")
        assert listening(worker.process.pid) == {7777}, "the probe's, and none of the worker's"
        monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "xdg"))
        async with lacre.AsyncClient(workers.gateways[0].url, token=workers.token("developer")) as client:
            reply = await client.chat("Name three seas.", max_tokens=8)
        assert reply.receipt is not None and reply.receipt.completion_tokens > 0
        worker.stop()


def network(process: int | str) -> Path:
    return Path(f"/proc/{process}/ns/net").readlink()


def listening(pid: int) -> set[int]:
    """The TCP ports that are open in the network of the process."""
    lines = [line for name in ("tcp", "tcp6") for line in Path(f"/proc/{pid}/net/{name}").read_text().splitlines()[1:]]
    sockets = [line.split() for line in lines]
    return {int(local.rpartition(":")[2], 16) for _, local, _, state, *_ in sockets if state == LISTENING}
