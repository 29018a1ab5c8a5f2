from __future__ import annotations

from collections.abc import AsyncIterator, Iterator

import pytest

from parts.fabric import LiveFabric


@pytest.fixture(scope="session")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LiveFabric]:
    live = LiveFabric.start(tmp_path_factory.mktemp("nats"))
    yield live
    live.stop()


@pytest.fixture
async def nats(server: LiveFabric) -> AsyncIterator[LiveFabric]:
    """The server with empty queues."""
    await server.provision()
    connection = await server.connect("provisioner")
    for pool in ("a", "b"):
        await connection.jetstream.purge_stream(f"WORK_{pool}")
    await connection.close()
    yield server
