"""The SDK against a gateway and worker in memory; every byte is really sealed and opened."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator

import pytest

import lacre
from parts.chat_app import ChatApp
from parts.relay import Relay, connect, connect_async


@pytest.fixture
def app() -> ChatApp:
    return ChatApp()


@pytest.fixture
def relay(app: ChatApp) -> Relay:
    return Relay(app)


@pytest.fixture
def client(relay: Relay) -> Iterator[lacre.Client]:
    with connect(relay, token="t0ken") as client:
        yield client


@pytest.fixture
async def async_client(relay: Relay) -> AsyncIterator[lacre.AsyncClient]:
    async with connect_async(relay, token="t0ken") as client:
        yield client
