"""Fixtures of the attacks. At the end of each test, whatever it did:

- no byte that the adversary saw holds the canary of the prompt;
- the attack was refused in the words of its mark, if they say that it is;
- nothing broke in a way that nobody foresaw.
"""

from __future__ import annotations

import logging
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest
import structlog

from hostile.adversary import Eyes, GatewayOwner, HostileFabric, HttpWire
from hostile.attacks import Attack, Verdict
from hostile.shapes import AsyncCaller, Caller, SyncCaller
from parts.issuer import Issuer
from parts.keys import MODEL, OTHER_MODEL, OTHER_POOL, POOL
from parts.stage import Stage


@pytest.fixture(autouse=True)
def verdict(request: pytest.FixtureRequest) -> Iterator[Verdict | None]:
    attack = getattr(request.function, "attack", None)
    if not isinstance(attack, Attack):
        yield None
        return
    verdict = Verdict(attack)
    yield verdict
    assert verdict.given is (attack.refused is not None), "a test ends its attack as its mark says"


@pytest.fixture
def eyes(caplog: pytest.LogCaptureFixture) -> Iterator[Eyes]:
    eyes = Eyes()
    eyes.watch_logs()
    yield eyes
    structlog.reset_defaults()
    unforeseen = [record.getMessage() for record in caplog.records if record.levelno >= logging.ERROR]
    assert not unforeseen


@pytest.fixture
def fabric(eyes: Eyes) -> HostileFabric:
    return HostileFabric(eyes)


@pytest.fixture
async def stage(fabric: HostileFabric, eyes: Eyes) -> AsyncIterator[Stage]:
    stage = Stage(fabric, served={POOL: (MODEL, OTHER_MODEL), OTHER_POOL: (MODEL,)})
    yield stage
    await stage.close()
    assert not eyes.has_seen(stage.canary), "plaintext left the process"


@pytest.fixture
def gateway(stage: Stage, eyes: Eyes, fabric: HostileFabric) -> GatewayOwner:
    """The adversary who owns the gateway and the fabric."""
    return GatewayOwner(stage, eyes, fabric)


@pytest.fixture(params=["async", "sync"])
async def caller(request: pytest.FixtureRequest, stage: Stage, gateway: GatewayOwner) -> Caller:
    """The application, with each of the SDK's clients in turn."""
    if request.param == "async":
        return AsyncCaller(stage.client(gateway))
    return SyncCaller(stage.sync_client(gateway))


@pytest.fixture(scope="session")
def issuer() -> Issuer:
    return Issuer()


@pytest.fixture
async def honest(tmp_path: Path, issuer: Issuer, stage: Stage, eyes: Eyes) -> AsyncIterator[Stage]:
    """An honest gateway whose fabric belongs to the adversary: it lets alice do what the shipped policies allow."""
    stage.build_gateway(tmp_path, issuer, limits="queue_limit = 20.0")
    await stage.publish()
    yield stage
    await stage.gateway.close()
    eyes.see(stage.log.getvalue(), *stage.raw_entries())


@pytest.fixture
def wire(honest: Stage, eyes: Eyes) -> HttpWire:
    """The client's connection to it."""
    return HttpWire(honest.app, eyes)
