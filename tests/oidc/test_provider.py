"""Tokens of a real OpenID provider, through real gateway processes: taken, while it rotates its keys, and after it is gone."""

from __future__ import annotations

import asyncio
import collections
import json
import shutil
from dataclasses import dataclass, field
from typing import Self

import jwt
import pytest

import lacre
from parts.oidc_provider import FOLDER, NODE, SECRET, Provider
from parts.stage import LiveStage

ALGORITHMS = ("ES256", "RS256", "EdDSA")
CLIENTS = 6  # two for each algorithm

pytestmark = [pytest.mark.skipif(NODE is None or shutil.which("npm") is None, reason="node and npm are not installed")]


@dataclass
class Load:
    """Clients that ask one question after another until it is left, each with a new token as long as the provider gives any."""

    cluster: LiveStage
    provider: Provider
    done: collections.Counter[str] = field(default_factory=collections.Counter)  # by the key that signed the token
    failed: list[Exception] = field(default_factory=list)
    issuing: bool = True
    tokens: dict[str, str] = field(default_factory=dict)
    memory: lacre.VersionMemory = field(default_factory=lacre.VersionMemory)

    async def __aenter__(self) -> Self:
        self._stopped = asyncio.Event()
        self._tasks = [asyncio.create_task(self._ask(number)) for number in range(CLIENTS)]
        return self

    async def __aexit__(self, *_exc: object) -> None:
        self._stopped.set()
        await asyncio.gather(*self._tasks)

    async def _ask(self, number: int) -> None:
        algorithm = ALGORITHMS[number % len(ALGORITHMS)]
        gateway = self.cluster.gateways[number // len(ALGORITHMS) % len(self.cluster.gateways)]

        async def token() -> str:
            if self.issuing:
                self.tokens[algorithm] = await self.provider.token(algorithm)
            return self.tokens[algorithm]

        async with lacre.AsyncClient(gateway.url, token=token, memory=self.memory, shape="none") as client:
            while not self._stopped.is_set():
                try:
                    reply = await client.chat("Count.", max_tokens=8)
                    assert reply.text == "one two three"
                    self.done[jwt.get_unverified_header(self.tokens[algorithm])["kid"]] += 1
                except Exception as exc:  # noqa: BLE001 - whatever it is, it is a failed request
                    self.failed.append(exc)

    async def until(self, kids: set[str], requests: int) -> None:
        """Until each of these keys has signed the tokens of so many more requests."""
        before = self.done.copy()
        async with asyncio.timeout(90):
            while not self.failed and any(self.done[kid] < before[kid] + requests for kid in kids):
                await asyncio.sleep(0.02)
        assert self.failed == []


@pytest.mark.slow
@pytest.mark.timeout(300)
async def test_rotation_under_load_and_life_after_it(cluster: LiveStage, provider: Provider) -> None:
    async with Load(cluster, provider) as load:
        first = set(provider.kids)
        await load.until(first, 10)
        await asyncio.to_thread(provider.tell, "rotate")
        second = set(provider.kids) - first
        await load.until(second, 10)
        await asyncio.to_thread(provider.tell, "retire")
        assert set(provider.kids) == second
        await load.until(second, 5)
        await asyncio.to_thread(provider.tell, "rotate")
        third = set(provider.kids) - second
        await load.until(third, 10)
        load.issuing = False
        await asyncio.sleep(0.5)
        provider.stop()
        await load.until(third, 20)
    assert load.failed == []
    assert set(load.done) == first | second | third and len(third) == len(ALGORITHMS)


async def test_a_token_that_nobody_has_seen_is_taken_after_the_provider_is_gone(cluster: LiveStage, provider: Provider) -> None:
    """It is verified with the keys that were fetched: no remembered verdict helps."""
    tokens = [await provider.token(algorithm) for algorithm in ALGORITHMS]
    provider.stop()
    for gateway in cluster.gateways:
        for token in tokens:
            async with lacre.AsyncClient(gateway.url, token=token, memory=lacre.VersionMemory(), shape="none") as client:
                assert (await client.chat("Count.", max_tokens=8)).text == "one two three"


async def test_a_bound_token(cluster: LiveStage, provider: Provider) -> None:
    """The provider binds it by the SDK's own proof, and the gateway takes it with another, from whoever has the key."""
    key, thief = lacre.ProofKey.generate(), lacre.ProofKey.generate()
    token = await provider.token("ES256", key.proof("POST", f"{provider.url}/token"))
    assert jwt.decode(token, options={"verify_signature": False})["cnf"] == {"jkt": key.thumbprint}
    url, memory = cluster.gateways[0].url, lacre.VersionMemory()
    async with lacre.AsyncClient(url, token=token, dpop=key, memory=memory) as client:
        for _ in range(2):
            assert (await client.chat("Count.", max_tokens=8)).text == "one two three"
    for wrong in ({"dpop": thief}, {}):
        async with lacre.AsyncClient(url, token=token, memory=memory, **wrong) as client:  # type: ignore[arg-type]
            with pytest.raises(lacre.Unauthenticated) as refused:
                await client.chat("Count.", max_tokens=8)
            assert refused.value.problem == "urn:lacre:problem:invalid-proof"


@pytest.mark.parametrize("client_id", ["app", "careful"])
async def test_a_token_that_the_client_asks_for_itself_is_bound(client_id: str, cluster: LiveStage, provider: Provider) -> None:
    """By OAuth2 client credentials; `careful` is a client whose proofs the provider wants a nonce in."""
    source = lacre.ClientCredentials(f"{provider.url}/token", client_id, SECRET, scope="lacre:http", in_body=True)
    url, key = cluster.gateways[0].url, lacre.ProofKey.generate()
    async with lacre.AsyncClient(url, token=source, dpop=key, memory=lacre.VersionMemory()) as client:
        assert (await client.chat("Count.", max_tokens=8)).text == "one two three"
        token = await client._sealed._link.bearer.token()
    assert jwt.decode(token, options={"verify_signature": False})["cnf"] == {"jkt": key.thumbprint}
    memory = lacre.VersionMemory()
    client = await asyncio.to_thread(lacre.Client, url, token=source, dpop=key, memory=memory)
    assert (await asyncio.to_thread(client.chat, "Count.", max_tokens=8)).text == "one two three"
    client.close()


def test_the_lock_names_no_host() -> None:
    lock = json.loads((FOLDER / "package-lock.json").read_text())
    assert len(lock["packages"]) > 30
    for name, package in lock["packages"].items():
        assert "resolved" not in package
        assert not name or package["integrity"].startswith("sha512-")
