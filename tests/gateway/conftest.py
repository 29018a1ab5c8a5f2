"""The gateway over a fabric in memory, with a worker that really opens and seals."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path

import httpx2
import pytest

from parts.gateway import FakeWorker, Issuer, World


@pytest.fixture(scope="session")
def issuer() -> Issuer:
    """One for all tests: an RSA key takes its time."""
    return Issuer()


@pytest.fixture
async def world(tmp_path: Path, issuer: Issuer) -> AsyncIterator[World]:
    world = World(tmp_path, issuer)
    await world.publish(world.document())
    yield world
    await world.gateway.close()


@pytest.fixture
async def worker(world: World) -> AsyncIterator[FakeWorker]:
    async with world.worker() as worker:
        yield worker


@pytest.fixture
async def client(world: World) -> AsyncIterator[httpx2.AsyncClient]:
    async with client_of(world) as client:
        yield client


def client_of(world: World, *, address: str = "192.0.2.1") -> httpx2.AsyncClient:
    transport = httpx2.ASGITransport(world.app, client=(address, 40000))
    return httpx2.AsyncClient(transport=transport, base_url="http://gateway.test")
