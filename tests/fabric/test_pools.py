"""A pool comes and goes while three message servers run and another pool serves."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from lacre_fabric.operate import pools
from lacre_fabric.operate.fabric_check import Severity, inspect
from lacre_fabric.operate.site import Site
from parts.fabric import answer, new_work, read
from parts.three_servers import Deployment, deployed, published
from parts.waiting import until

pytestmark = [pytest.mark.slow]


@pytest.fixture
async def deployment(tmp_path: Path) -> AsyncIterator[Deployment]:
    async with deployed(tmp_path) as deployment:
        yield deployment


async def test_a_pool_comes_and_goes_under_load(deployment: Deployment) -> None:
    await deployment.serve()
    lobbies = [await deployment.gateway(node) for node in range(3)]
    site = await pools.add(deployment.site, "b", ["m2"], deployment.files)
    assert await published(site) == {"a": ["m1"], "b": ["m2"]}
    assert Site.load(site.folder).pools == {"a": ["m1"], "b": ["m2"]}
    for node in range(3):
        worker = await deployment.worker("b", "m2", node)
        for lobby in lobbies:  # every gateway hears it, though nobody asked for this pool yet
            await until(lambda lobby=lobby: lobby.workers("b", "m2"), 10)
        dispatch = await lobbies[node - 1].dispatch(new_work("b", "m2"))
        await answer(worker)
        assert await read(dispatch) == [b"x", b"receipt"]
        await worker.close()
    found = await inspect(site.servers, site.pools, 3, site.credentials())
    assert [each for each in found if each.verdict is Severity.WRONG] == []

    site = await pools.remove(site, "b", deployment.files)
    assert await published(site) == {"a": ["m1"]}
    assert not (site.folder / "pools" / "b" / "receipt.pem").exists()
    assert not list(site.keys_folder("b").glob("*"))
    seen = len(deployment.ended)
    await until(lambda: len(deployment.ended) > seen + 20, 20)
    assert set(deployment.ended) == {"whole"}, [each for each in deployment.ended if each != "whole"][:5]
