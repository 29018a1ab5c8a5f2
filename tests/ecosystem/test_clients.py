"""The vendors' own packages through `lacre proxy`, feature by feature: see asking.py."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator

import pytest

from ecosystem.asking import with_a_real_model, with_a_scripted_engine
from ecosystem.clients import LIGHT, Client
from ecosystem.conftest import settings
from parts.stage import Proxy, ScriptedStage
from parts.up import Up

pytestmark = [pytest.mark.anyio, pytest.mark.slow, pytest.mark.timeout(600)]


@pytest.fixture(scope="module")
async def live(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[ScriptedStage]:
    async with ScriptedStage.speaking(tmp_path_factory.mktemp("stage")) as live:
        yield live


@pytest.fixture(scope="module")
def proxy(up: Up, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Proxy]:
    given = settings(up)
    with Proxy.running(given["LACRE_URL"], given["LACRE_TOKEN"], tmp_path_factory.mktemp("xdg")) as proxy:
        yield proxy


@pytest.mark.parametrize("client", LIGHT, ids=lambda client: client.environment)
async def test_with_a_scripted_engine(live: ScriptedStage, client: Client) -> None:
    await with_a_scripted_engine(live, client)


@pytest.mark.parametrize("client", LIGHT, ids=lambda client: client.environment)
async def test_with_a_real_model(proxy: Proxy, client: Client) -> None:
    await with_a_real_model(proxy, client)
