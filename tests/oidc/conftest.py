"""The provider, and gateways that take its tokens."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest

from parts.chat_app import ChatApp
from parts.npm import install
from parts.oidc_provider import FOLDER, Provider
from parts.stage import LiveStage


@pytest.fixture(scope="session")
def packages() -> None:
    install(FOLDER)


@pytest.fixture
def provider(packages: None) -> Iterator[Provider]:
    provider = Provider.start()
    yield provider
    provider.stop()


@pytest.fixture
async def cluster(tmp_path: Path, provider: Provider) -> AsyncIterator[LiveStage]:
    issuers = f"""
        [[issuers]]
        issuer = "{provider.url}"
        audience = "lacre"
        algorithms = ["ES256", "RS256", "EdDSA"]
        [issuers.claims]
        tenant = "org.id"
        groups = "realm_access.roles"
    """
    async with LiveStage.on_air(tmp_path, ChatApp(), gateways=2, tables=issuers) as cluster:
        yield cluster
