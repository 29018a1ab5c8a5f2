"""A pool comes and goes on three message servers with TLS, while applications call another pool.

All of it is real: nats-server, two gateways and the workers are processes, and each application is an SDK client over HTTP. The
clients neither ask again nor resume, so a single refusal shows.
"""

from __future__ import annotations

import asyncio
import json
import sys
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack
from pathlib import Path

import pytest

import lacre
from lacre.errors import LacreError
from lacre.jose.jws import b64u
from lacre_fabric.operate.nats_server import free_port
from lacre_fabric.operate.pool_state import observe
from lacre_fabric.operate.rotation import publish
from lacre_fabric.operate.site import Site
from lacre_fabric.operate.stores import provision_site
from parts.behind import answering, serving
from parts.nats_cluster import NatsCluster
from parts.stage.live import NO_LIMITS
from parts.stage.processes import GatewayProcess, WorkerProcess
from parts.stage.settings import gateway_settings, own_issuer, policies_with
from parts.stage.standing import Standing
from parts.three_servers import connected
from parts.waiting import until

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]

CALLERS = 6
REPLACED = 6  # workers
ANSWER = {
    "id": "c1",
    "object": "chat.completion",
    "created": 1,
    "model": "m",
    "choices": [{"index": 0, "message": {"role": "assistant", "content": "one two three"}, "finish_reason": "stop"}],
    "usage": {"prompt_tokens": 7, "completion_tokens": 3, "total_tokens": 10},
}


class Deployment(Standing):
    """ended: what callers of the pool `a` got. origin: of the server behind all workers."""

    def __init__(self, folder: Path, origin: str) -> None:
        super().__init__()
        self.folder, self.origin = folder, origin
        self.site = Site(folder / "site", {"a": ("m1",)}, replicas=3)
        self.site.create()
        self.cluster = NatsCluster(folder, self.site.replicated_roles(), self.site.pools)
        self.nats = {"url": list(self.cluster.servers.urls), "ca": str(self.cluster.ca.file)}
        members = {"pools": {"a": ["m1"]}, "replicas": 3, "nats": self.nats, "gateway": "https://lacre.example"}
        (self.site.folder / "site.json").write_text(json.dumps(members))
        self.gateways: list[GatewayProcess] = []
        self.ended: Counter[str] = Counter()

    async def start(self) -> None:
        self.stack.callback(self.cluster.stop)
        self.cluster.start()
        await self.cluster.ready(self.site.credential("provisioner"))
        async with connected(self.site) as connection:
            await provision_site(self.site, connection)
            await publish(self.site, connection)
        policies_with(NO_LIMITS, self.folder / "policies")
        for number in range(2):
            self._start_gateway(number)
        self.worker = self.start_worker("a", "m1")
        for gateway in self.gateways:
            await gateway.ready(60)

    def _start_gateway(self, number: int) -> None:
        port, site = free_port(), self.site
        url = f"http://127.0.0.1:{port}"
        path = self.folder / f"gateway-{number}.toml"
        lines = f'audit = "{self.folder}/audit-{number}"\npolicies = "{self.folder}/policies"'
        tables = f'ca = "{self.nats["ca"]}"\n[listen]\nport = {port}\n{own_issuer(site)}'
        credential = site.credential_file("gateway-g1")
        key = str(site.folder / "gateway" / "grant.pem")
        path.write_text(gateway_settings("g1", url, site.root, self.nats["url"], key, credential, lines, tables))
        gateway = GatewayProcess(f"g{number}", path, site.log(f"g{number}"), url, site.connection_string(url))
        gateway.start(lambda *command: [*command, "--instance", str(number)])
        self.stack.callback(gateway.stop)
        self.gateways.append(gateway)

    def start_worker(self, pool: str, model: str, node: str = "n1") -> WorkerProcess:
        site, path = self.site, self.folder / f"worker-{pool}-{node}.toml"
        path.write_text(f"""
            pool = "{pool}"
            node = "{node}"
            trust = "{b64u(site.root)}"
            keys = "{site.keys_folder(pool)}"
            receipt_key = "{site.receipt_file(pool)}"
            slots = 16
            [nats]
            url = {json.dumps(self.nats["url"])}
            ca = "{self.nats["ca"]}"
            credentials = "{site.credential_file(f"worker-{pool}")}"
            [upstream]
            origin = "{self.origin}"
            [[upstream.models]]
            name = "{model}"
            allow = ["POST /v1/chat/completions"]
        """)
        worker = WorkerProcess(pool, path, site.log(f"worker-{pool}-{node}"))
        worker.start()
        self.stack.callback(worker.stop)
        return worker

    def callers(self, pool: str) -> list[lacre.AsyncClient]:
        """One for each gateway."""
        token = self.site.token("alice")
        return [self.client_of(gateway.url, token, None, pool=pool, retries=0) for gateway in self.gateways]

    async def call(self, client: lacre.AsyncClient) -> None:
        while True:
            try:
                said = (await client.chat("Count.", model="m1", max_tokens=3)).text
            except LacreError as exc:
                self.ended[f"{type(exc).__name__}: {exc}"] += 1
            else:
                self.ended["whole" if said == "one two three" else f"answered {said!r}"] += 1
            await asyncio.sleep(0.02)

    async def more(self, number: int) -> None:
        """Until so many more calls have ended."""
        before = self.ended.total()
        await until(lambda: self.ended.total() >= before + number, 120)

    async def is_there(self, pool: str, node: str) -> bool:
        """Whether a worker of that name announces itself."""
        async with connected(self.site) as connection:
            state = (await observe(connection, (pool,), self.site.regions))[pool]
        return any(worker.name == node for worker in state.workers)

    async def lacre(self, *arguments: str) -> tuple[int, str]:
        """The command's status, and what it said."""
        command = [sys.executable, "-P", "-m", "lacre", *arguments, f"--state={self.site.folder}"]
        pipes = {"stdout": asyncio.subprocess.PIPE, "stderr": asyncio.subprocess.STDOUT}
        process = await asyncio.create_subprocess_exec(*command, **pipes)
        said, _ = await process.communicate()
        assert process.returncode is not None
        return process.returncode, said.decode()

    @property
    def accounts(self) -> list[str]:
        return [f"--accounts={node.folder / 'accounts.json'}" for node in self.cluster.nodes]


@pytest.fixture
async def deployment(tmp_path: Path) -> AsyncIterator[Deployment]:
    answer = answering(200, [("content-type", "application/json")], json.dumps(ANSWER).encode())
    async with AsyncExitStack() as stack:
        server = await stack.enter_async_context(serving(answer))
        deployment = await stack.enter_async_context(Deployment(tmp_path, server.url))
        await deployment.start()
        yield deployment


async def test_no_request_fails_while_a_pool_comes_and_goes(deployment: Deployment, capsys: pytest.CaptureFixture[str]) -> None:
    first = deployment.callers("a")
    for client in first:  # the worker may need a moment
        await until(lambda client=client: _answers(client, "m1"), 60)
    calling = [asyncio.create_task(deployment.call(first[number % 2])) for number in range(CALLERS)]
    await deployment.more(50)

    status, said = await deployment.lacre("pool", "add", "b", "--model=m2", *deployment.accounts)
    assert status == 0, said
    added = deployment.ended.total()
    worker = deployment.start_worker("b", "m2")
    for client in deployment.callers("b"):
        await until(lambda client=client: _answers(client, "m2"), 60)

    status, said = await deployment.lacre("pool", "remove", "b", "--yes", *deployment.accounts)
    assert (status, "the pool b has live workers (n1)" in " ".join(said.split())) == (1, True), said
    worker.stop()
    status, said = await deployment.lacre("pool", "remove", "b", "--yes", *deployment.accounts)
    assert status == 0, said
    await deployment.more(50)
    for task in calling:
        task.cancel()
    await asyncio.gather(*calling, return_exceptions=True)

    with capsys.disabled():
        failed = deployment.ended.total() - deployment.ended["whole"]
        print(f"\n{deployment.ended.total()} requests of pool a ({added} until b was there), {failed} failed")
    assert set(deployment.ended) == {"whole"}, deployment.ended


async def test_no_request_fails_while_workers_are_replaced(deployment: Deployment, capsys: pytest.CaptureFixture[str]) -> None:
    """Each drains, and returns work that has just reached it to the queue."""
    clients = deployment.callers("a")
    for client in clients:
        await until(lambda client=client: _answers(client, "m1"), 60)
    calling = [asyncio.create_task(deployment.call(clients[number % 2])) for number in range(CALLERS)]
    await deployment.more(20)
    leaving = deployment.worker
    for number in range(2, 2 + REPLACED):
        node = f"n{number}"
        coming = deployment.start_worker("a", "m1", node)
        await until(lambda node=node: deployment.is_there("a", node), 60)
        await asyncio.to_thread(leaving.stop)
        leaving = coming
        await deployment.more(20)
    for task in calling:
        task.cancel()
    await asyncio.gather(*calling, return_exceptions=True)

    with capsys.disabled():
        print(f"\n{deployment.ended.total()} requests while {REPLACED} workers were replaced")
    assert set(deployment.ended) == {"whole"}, deployment.ended


async def _answers(client: lacre.AsyncClient, model: str) -> bool:
    try:
        return (await client.chat("Count.", model=model, max_tokens=3)).text == "one two three"
    except (lacre.RefusedError, lacre.NetworkError, lacre.UsageError):
        return False
