"""A canary on three message servers: the command that publishes it, a gateway process, and callers who never stop."""

from __future__ import annotations

import asyncio
from collections import defaultdict
from collections.abc import AsyncIterator, Mapping
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path

import pytest

import lacre
from lacre_backend.api.app import create_app
from lacre_fabric.keys.secret_files import read_ed25519
from lacre_fabric.nats import subjects
from lacre_fabric.operate import dev_issuer
from parts.echo_engine import EchoEngine
from parts.stage.live import NO_LIMITS, connected_node
from parts.stage.processes import GatewayProcess
from parts.stage.settings import own_issuer, policies_with
from parts.stage.standing import Standing
from parts.three_servers import Deployment, connected, deployed
from parts.up import LACRE
from parts.waiting import PATIENCE, until

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]

POOLS = {"default": ("old",), "canary": ("new",)}
USERS = [f"user {number}" for number in range(12)]
LEARNED = 45.0  # seconds: clients look at most every 30 s for what a gateway names


class Callers(Standing):
    """Users of one program, whose client stays the same throughout. pools: of each user's answers. failed: the errors."""

    def __init__(self, deployment: Deployment, folder: Path) -> None:
        super().__init__()
        self.site, self.cluster = deployment.site, deployment.cluster
        policies = policies_with(NO_LIMITS, folder / "policies")
        urls = list(self.cluster.servers.urls)
        self.gateway = GatewayProcess.configured(self.site, "g1", urls, policies, own_issuer(self.site))
        self.pools: dict[str, list[str]] = defaultdict(list)
        self.failed: list[lacre.LacreError] = []
        self.most = 0  # attempts of an answer

    async def serve(self, pool: str, server: int) -> AsyncExitStack:
        """A worker, connected to one of the servers. Returns what ends it."""
        worker = await self.stack.enter_async_context(AsyncExitStack())
        app, url = create_app([EchoEngine(name=POOLS[pool][0])]), self.cluster.nodes[server].url
        connecting = connected_node(self.site, url, app, pool, slots=8, credential_of=f"worker-{pool}")
        worker.push_async_callback(self.run(await worker.enter_async_context(connecting)))
        return worker

    async def publish(self, routes: Mapping[str, int], folder: Path) -> None:
        """The pools' shares, by the command."""
        table = '[[routes.assistant.pools]]\npool = "{}"\nmodel = "{}"\nshare = {}\n'
        lines = "".join(table.format(pool, POOLS[pool][0], share) for pool, share in routes.items())
        (path := folder / "routes.toml").write_text(lines)
        command = [*LACRE, "manifest", "publish", "--routes", str(path), "--state", str(self.site.folder)]
        process = await asyncio.create_subprocess_exec(*command, stderr=asyncio.subprocess.PIPE)
        _, said = await process.communicate()
        assert process.returncode == 0, said.decode()

    async def call(self) -> None:
        """Each user asks again and again, until the test ends."""
        token = dev_issuer.issue(read_ed25519(self.site.folder / "issuer.pem"), "alice", tenant="acme")
        self.gateway.start()
        self.stack.callback(self.gateway.stop)
        await self.gateway.ready()
        client = self.client_of(self.gateway.url, token, None, retries=None)
        for user in USERS:
            asking = asyncio.create_task(self._ask(client.with_options(cache_scope=user), user))
            self.stack.callback(asking.cancel)
        await self.answered(3)

    async def _ask(self, client: lacre.AsyncClient, user: str) -> None:
        while True:
            try:
                reply = await client.chat("Name a sea.", model="assistant", max_tokens=4)
            except lacre.LacreError as exc:
                self.failed.append(exc)
            else:
                sealed_to = reply.verification.sealed_to
                assert sealed_to is not None and reply.receipt is not None
                assert reply.model == POOLS[sealed_to.pool][0]
                self.pools[user].append(sealed_to.pool)
                self.most = max(self.most, reply.attempts)
            await asyncio.sleep(0.2)

    async def answered(self, times: int, seconds: float = PATIENCE) -> None:
        """Until each user got so many more answers."""
        before = {user: len(self.pools[user]) for user in USERS}
        await until(lambda: all(len(self.pools[user]) >= before[user] + times for user in USERS), seconds, lambda: self.failed)

    def now(self) -> dict[str, str]:
        """Each user's last pool."""
        return {user: pools[-1] for user, pools in self.pools.items()}


@asynccontextmanager
async def calling(folder: Path) -> AsyncIterator[Callers]:
    async with deployed(folder, POOLS) as deployment, Callers(deployment, folder) as callers:
        yield callers


async def test_a_canary_comes_grows_fails_and_comes_back(tmp_path: Path) -> None:
    async with calling(tmp_path) as callers:
        await callers.serve("default", 0)
        await callers.publish({"default": 1, "canary": 0}, tmp_path)
        await callers.call()
        assert set(callers.now().values()) == {"default"}

        # Its users stay with it once the running program has learned of it.
        canary = await callers.serve("canary", 1)
        await callers.publish({"default": 1, "canary": 1}, tmp_path)
        await until(lambda: "canary" in callers.now().values(), LEARNED)
        await callers.answered(3)
        drawn = callers.now()
        await callers.answered(3)
        assert callers.now() == drawn and set(drawn.values()) == {"default", "canary"}
        assert all(pools == sorted(pools, reverse=True) for pools in callers.pools.values()), "nobody goes to and fro"

        # Its last worker leaves: at once, its users are served by the other pool.
        await canary.aclose()
        await callers.answered(3)
        assert set(callers.now().values()) == {"default"} and callers.most >= 2

        # It comes back, and so do its users; then it loses its queue.
        await callers.serve("canary", 2)
        await until(lambda: callers.now() == drawn, PATIENCE, callers.now)
        async with connected(callers.site) as connection:
            await connection.jetstream.delete_stream(subjects.work_stream("canary", subjects.DEFAULT_REGION))
        await until(lambda: set(callers.now().values()) == {"default"}, PATIENCE, callers.now)
        await callers.answered(2)

        # The operator makes the queue again. Neither change cost an answer.
        await callers.publish({"default": 1, "canary": 1}, tmp_path)
        await until(lambda: callers.now() == drawn, PATIENCE, callers.now)
        assert callers.failed == []
