from __future__ import annotations

from collections.abc import AsyncIterator, Iterator

import pytest

from lacre_fabric.operate.nats_server import free_port
from parts.fabric import LiveFabric


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
