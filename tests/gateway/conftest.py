"""The gateway over a fabric in memory, with a worker that really opens and seals."""

from __future__ import annotations

import asyncio
import ssl
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path

import httpx2
import pytest
from fastapi import FastAPI

from lacre_gateway.http.server import Server, bind, make_server
from lacre_gateway.settings import Listen
from parts.fake_worker import FakeWorker
from parts.issuer import Issuer
from parts.stage import Stage
from parts.waiting import PATIENCE, until

REASONED = (401, 403, 429, 503)  # of an operator's questions: why was I refused?
PutUp = Callable[..., Awaitable[Stage]]


@pytest.fixture(scope="session")
def issuer() -> Issuer:
    """One for all tests: an RSA key takes its time."""
    return Issuer()


@pytest.fixture
async def put_up(tmp_path: Path, issuer: Issuer) -> AsyncIterator[PutUp]:
    """Makes a stage with a gateway of the test's own settings (`Stage.build_gateway`), which ends with the test.

    Whatever the test is about, each refusal must have its reason in the gateway's log.
    """
    stages: list[Stage] = []
    async with AsyncExitStack() as stack:

        async def put_up(**parts: str) -> Stage:
            stages.append(await stack.enter_async_context(Stage.on_air(tmp_path, issuer, **parts)))
            return stages[-1]

        yield put_up
    lines = [line for stage in stages for line in stage.logged() if line.get("event") == "request"]
    assert [line for line in lines if line["status"] in REASONED and not line.get("reason")] == []


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


@asynccontextmanager
async def served(
    app: FastAPI, context: Callable[[], ssl.SSLContext] | None = None, **listen: float | tuple[str, ...]
) -> AsyncIterator[tuple[Server, int]]:
    """The app on a port of its own. listen: members of the `[listen]` table. Leaving it is what SIGTERM does."""
    settings = Listen(port=0, **{"drain": 2, **listen})  # type: ignore[arg-type]
    with bind(settings) as listener:
        server = make_server(app, settings, context)
        serving = asyncio.create_task(server.serve(sockets=[listener]))
        await until(lambda: server.started or serving.done(), PATIENCE)
        assert server.started, serving.exception()
        try:
            yield server, listener.getsockname()[1]
        finally:
            server.should_exit = True
            await serving
            await server.settle()
