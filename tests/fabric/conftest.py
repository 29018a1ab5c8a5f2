from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path

import pytest

from lacre_fabric.operate.nats_server import free_port
from lacre_fabric.operate.site import Site
from parts.fabric import LiveFabric, Parties
from parts.tended import POOL, TendedSite


@pytest.fixture(scope="session")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LiveFabric]:
    with LiveFabric.running(tmp_path_factory.mktemp("nats")) as live:
        yield live


@pytest.fixture
def unused_port() -> int:
    return free_port()


@pytest.fixture
async def nats(server: LiveFabric) -> AsyncIterator[LiveFabric]:
    """The server with empty queues."""
    await server.provision()
    connection = await server.connect("provisioner")
    for pool in ("a", "b"):
        await connection.jetstream.purge_stream(f"WORK_{pool}_lacre")
    await connection.close()
    yield server


@pytest.fixture
async def parties(nats: LiveFabric) -> AsyncIterator[Parties]:
    async with Parties.of(nats) as parties:
        yield parties


@pytest.fixture
async def own(tmp_path: Path) -> AsyncIterator[Parties]:
    """On a server of the test's own, which it may restart and configure anew."""
    with LiveFabric.running(tmp_path) as live:
        await live.provision()
        async with Parties.of(live) as parties:
            yield parties


@pytest.fixture(params=[(POOL,)])
async def tended(nats: LiveFabric, tmp_path: Path, request: pytest.FixtureRequest) -> AsyncIterator[TendedSite]:
    """Its pools are the fixture's parameter."""
    async with TendedSite.on(nats, tmp_path / "state", *request.param) as tended:
        yield tended


@pytest.fixture
def site(tmp_path: Path) -> Site:
    site = Site(tmp_path / "state", {"default": ("m",)})
    site.create()
    return site


@pytest.fixture
def crashed(tmp_path: Path) -> Callable[[str], int]:
    """How many steps on disk a process was ended at, and what was left worked. It forks, and so is a process of its own."""

    def steps(change: str) -> int:
        paths = os.pathsep.join([str(Path(__file__).parents[1]), *filter(None, [os.environ.get("PYTHONPATH")])])
        command = [sys.executable, "-m", "parts.crash", change, str(tmp_path)]
        done = subprocess.run(command, capture_output=True, text=True, check=False, env=os.environ | {"PYTHONPATH": paths})
        assert done.returncode == 0, done.stderr
        return int(done.stdout.splitlines()[-1])

    return steps
