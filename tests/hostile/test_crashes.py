"""A fault in native code, against all who are answered by the same worker."""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from hostile.adversary import GatewayOwner, inner
from hostile.attacks import Verdict, attack
from hostile.shapes import chat
from lacre import problems
from lacre.wire.bhttp import encode_request
from lacre.wire.ohttp import seal_request
from lacre_backend.api.app import create_app
from lacre_backend.engine_process.engine import ProcessEngine
from lacre_backend.settings import ModelSettings
from parts.keys import MODEL, OTHER_MODEL
from parts.stage import Stage
from parts.tiny_model import tiny_model
from parts.waiting import until

pytestmark = pytest.mark.slow

PATIENCE = 120.0  # seconds; the machine may be busy
LONG = 400  # tokens


@pytest.fixture
def engines(tmp_path: Path) -> Iterator[tuple[ProcessEngine, ProcessEngine]]:
    """Two of one file, each with a process of its own."""
    path = tiny_model(tmp_path / "m.gguf")

    def one(name: str) -> ProcessEngine:
        return ProcessEngine(ModelSettings(path=path, name=name, context=1024, slots=2, threads=1))

    with closing(one(MODEL)) as first, closing(one(OTHER_MODEL)) as second:
        yield first, second


def asked(stage: Stage, **members: Any) -> bytes:
    return encode_request(inner(chat(stage, **members)))


@attack("crash the engine of a worker by a fault in native code", "client",
        "each model's engine has a process of its own", problems.WORKER_LOST,
        gain="the requests in that engine end; those in another engine do not")  # fmt: skip
async def test_an_engine(
    stage: Stage, gateway: GatewayOwner, verdict: Verdict, engines: tuple[ProcessEngine, ProcessEngine]
) -> None:
    """We know no such fault, so the test sends the signal that one would cause. tests/backend sees the engine restart."""
    struck, beside = engines
    await stage.worker(create_app(engines), models=[MODEL, OTHER_MODEL])
    sealed, _, _ = seal_request(stage.keys.pool.config, asked(stage, max_tokens=LONG))
    hostile = asyncio.create_task(gateway.run(sealed))
    message = asked(stage, model=OTHER_MODEL, max_tokens=LONG)
    honest = asyncio.create_task(gateway.submit(message, model=OTHER_MODEL, max_tokens=LONG))
    await until(lambda: bool(struck._streams), PATIENCE)
    pid, other = struck.pid, beside.pid
    assert pid is not None
    os.kill(pid, signal.SIGSEGV)
    verdict.said((await hostile).problem)
    assert ((await honest).status, beside.pid) == (200, other)
