"""The gateway over a fabric in memory, with a worker that really opens and seals."""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack
from pathlib import Path

import httpx2
import pytest

from parts.fake_worker import FakeWorker
from parts.issuer import Issuer
from parts.stage import Stage

PutUp = Callable[..., Awaitable[Stage]]


@pytest.fixture(scope="session")
def issuer() -> Issuer:
    """One for all tests: an RSA key takes its time."""
    return Issuer()


@pytest.fixture
async def put_up(tmp_path: Path, issuer: Issuer) -> AsyncIterator[PutUp]:
    """Makes a stage with a gateway of the test's own settings (`Stage.build_gateway`), which ends with the test."""
    async with AsyncExitStack() as stack:

        async def put_up(**parts: str) -> Stage:
            return await stack.enter_async_context(Stage.on_air(tmp_path, issuer, **parts))

        yield put_up


@pytest.fixture
async def stage(put_up: PutUp) -> Stage:
    """A file with settings of its own puts another one in this one's place."""
    return await put_up()


@pytest.fixture
async def worker(stage: Stage) -> AsyncIterator[FakeWorker]:
    async with stage.fake_worker() as worker:
        yield worker


@pytest.fixture
async def client(stage: Stage) -> AsyncIterator[httpx2.AsyncClient]:
    async with stage.http() as client:
        yield client
