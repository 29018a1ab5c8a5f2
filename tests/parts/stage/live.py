"""The path of a request over a real nats-server, as much of it as a test asks for: each part is a process that may die.

A `LiveStage` has a site's folder. `start_fabric` gives it a message server with everything provisioned. A test adds gateways
(`gateway`), workers (`worker`) and a node in its own process, whose app is no model (`node`). `on_air` does all of it.
"""

from __future__ import annotations

import asyncio
import subprocess
import time
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import Any, Self

from nats.aio.msg import Msg

import lacre
from lacre import asgi
from lacre_backend.keyring import KeyRing
from lacre_backend.node.node import Identity, Node
from lacre_backend.node.work_counts import WorkCounts
from lacre_fabric.keys.secret_files import read_ed25519
from lacre_fabric.nats import roles, subjects
from lacre_fabric.nats.connection import Connection
from lacre_fabric.nats.manifest_feed import ManifestFeed
from lacre_fabric.nats.provisioning import provision
from lacre_fabric.nats.roles import Credential, Role
from lacre_fabric.nats.servers import Servers
from lacre_fabric.nats.subjects import ONE_REGION
from lacre_fabric.nats.worker import NatsWorker
from lacre_fabric.operate import dev_issuer
from lacre_fabric.operate.nats_server import NatsServer, free_port
from lacre_fabric.operate.rotation import publish
from lacre_fabric.operate.site import NODE, Site
from lacre_fabric.work.contract import FabricUnavailable
from parts.stage.processes import GatewayProcess, WorkerProcess, stopped, worker_settings
from parts.stage.settings import POOL, own_issuer, policies_with
from parts.stage.standing import Standing, entries
from parts.waiting import PATIENCE, until

MODEL = "smollm2-135m"
TINY = "tiny"  # where no model answers
NO_LIMITS = """
    currency = "USD"
    default_plan = "all"
    [plans.all.user]
    concurrent_streams = 1000
    [prices."*"]
    prompt = "1"
    cached = "1"
    completion = "1"
"""


class LiveStage(Standing):
    """served: models by pool. kms: the address of the key that wraps the site's. gateways, workers: the processes, as added."""

    nats: subprocess.Popen[bytes]

    def __init__(self, folder: Path, served: Mapping[str, Sequence[str]] | None = None, *, kms: str = "") -> None:
        super().__init__()
        self.site = Site(folder / "state", served or {POOL: (TINY,)})
        if kms:
            self.site.choose_kms(kms)
        self.site.create()
        self.pool = next(iter(self.site.pools))
        self.server = NatsServer(self.site.folder / "nats", free_port())
        self.policies = folder / "policies"
        self.gateways: list[GatewayProcess] = []
        self.workers: list[WorkerProcess] = []

    @classmethod
    @asynccontextmanager
    async def on_air(
        cls,
        folder: Path,
        app: asgi.App | None = None,
        *,
        gateways: int = 1,
        tables: str | None = None,
        slots: int = 16,
        workers: int = 0,
        upstreams: Mapping[str, str] | None = None,
    ) -> AsyncIterator[Self]:
        """All of it ready. app: of a node in this process. tables: of the gateways' settings, as TOML, in place of the site's
        own issuer. workers: processes with the real model, or one for each of `upstreams`: tables `[upstream]`, as TOML, by the
        names of their models.
        """
        written = list((upstreams or {}).values()) or [""] * workers
        nodes = [f"n{number + 1}" for number in range(len(written))]
        async with cls(folder, {POOL: tuple(upstreams or (MODEL if workers else TINY,))}) as live:
            await live.start_fabric(gateways=[f"g{number}" for number in range(2, gateways + 1)], nodes=nodes[1:])
            if app is not None:
                await live.node(app, slots=slots)
            # One thread each: two workers of two threads on two cores wait for each other.
            live.write_settings({"name": MODEL, "threads": 1, "context": 2048, "slots": 2})
            for node, table in zip(nodes, written, strict=True):
                live.worker(worker_settings(live.site, node, table), node)
            await live.start_workers()
            for _ in range(gateways):
                live.gateway(own_issuer(live.site) if tables is None else tables, drain=2)
            await live.start_gateways()
            await live.heard()
            yield live

    # The message server

    async def start_fabric(self, *, gateways: Sequence[str] = (), nodes: Sequence[str] = (), more: Sequence[Role] = ()) -> None:
        """The message server knows the site's own roles, and further gateways and nodes of the first pool."""
        site, pools = self.site, tuple(self.site.pools)
        self.server.configure([
            *site.roles(),
            *(roles.gateway(site.credential(f"gateway-{name}"), name, pools) for name in gateways),
            *(roles.worker(site.credential(f"worker-{self.pool}-{node}"), self.pool, node) for node in nodes),
            *more,
        ])  # fmt: skip
        self.start_nats()
        self.stack.callback(lambda: stopped(self.nats))
        await self.provision()
        connection = await self.connect()
        await publish(site, connection)
        await connection.close()

    def start_nats(self) -> None:
        self.nats = self.server.start(self.site.log("nats"))

    async def restart_nats(self) -> None:
        """Kills it; what was in its files is there again, and its queues, which were in memory, are made anew."""
        self.nats.kill()
        self.nats.wait()
        await asyncio.sleep(0.3)
        self.start_nats()
        await self.provision()

    async def connect(self, role: str = "provisioner") -> Connection:
        return await Connection.open(self.server.url, self.site.credential(role))

    async def provision(self) -> None:
        await provisioned(self.server.url, self.site.credential("provisioner"), self.site.pools)

    # Gateways

    def gateway(self, tables: str, *, plans: str = NO_LIMITS, drain: int = 5) -> GatewayProcess:
        """The next one, not started yet. tables: of its settings, as TOML. plans: the plans file of them all."""
        if not self.policies.exists():
            policies_with(plans, self.policies)
        name = f"g{len(self.gateways) + 1}"
        self.gateways.append(GatewayProcess.configured(self.site, name, [self.server.url], self.policies, tables, drain=drain))
        return self.gateways[-1]

    def write_settings(self, model: Mapping[str, object]) -> int:
        """As `lacre up` writes them: the workers', and those of the site's own gateway, whose port is returned."""
        port = free_port()
        self.site.write_settings(self.server.url, port, {pool: [model] for pool in self.site.pools})
        return port

    async def start_gateways(self, seconds: float = PATIENCE) -> None:
        for gateway in self.gateways:
            gateway.start()
            self.stack.callback(gateway.stop)
        await self.gateways_ready(seconds)

    async def gateways_ready(self, seconds: float = PATIENCE) -> None:
        await asyncio.gather(*(gateway.ready(seconds) for gateway in self.gateways))

    async def stop_gateways(self) -> None:
        """In order: what they did not use of their leases is given back."""
        for gateway in self.gateways:
            gateway.process.terminate()
        for gateway in self.gateways:
            await asyncio.to_thread(gateway.process.wait, 60)

    def audit_of(self, gateway: str = "g1") -> Path:
        return self.site.folder / "gateway" / f"audit-{gateway}"

    def entries(self, *kinds: str, gateway: str = "g1") -> list[dict[str, Any]]:
        return entries(self.audit_of(gateway), *kinds)

    # Clients

    def token(self, subject: str, **claims: Any) -> str:
        """Of the site's own issuer."""
        return dev_issuer.issue(read_ed25519(self.site.folder / "issuer.pem"), subject, tenant="acme", **claims)

    def client(self, token: str, **options: Any) -> lacre.AsyncClient:
        """Of the first gateway."""
        return self.client_of(self.gateways[0].url, token, None, **options)

    # Workers

    async def node(self, app: asgi.App, pool: str = POOL, *, slots: int = 16) -> Node:
        """A node that runs in this process, with the keys of the site's own worker."""
        node = await self.stack.enter_async_context(connected_node(self.site, self.server.url, app, pool, slots=slots))
        self.run(node)
        return node

    def worker(self, settings: Path, node: str = NODE) -> WorkerProcess:
        """Not started yet."""
        worker = WorkerProcess(node, settings, self.site.log(node))
        self.workers.append(worker)
        return worker

    async def start_workers(self) -> None:
        connection = await self.connect()
        self.stack.push_async_callback(connection.close)
        await connection.client.subscribe(subjects.presence(self.pool, "*", "*"), cb=self._hear)
        for worker in self.workers:
            worker.start()
            self.stack.callback(worker.stop)

    async def heard(self) -> None:
        """Until every worker was heard within the last second and a half."""
        await until(self._all_heard, 2 * PATIENCE)

    def _all_heard(self) -> bool:
        for worker in self.workers:
            assert worker.runs, worker.said()
        return all(time.monotonic() - worker.heard < 1.5 for worker in self.workers)

    async def _hear(self, message: Msg) -> None:
        for worker in self.workers:
            if worker.name == message.subject.rpartition(".")[2]:
                worker.heard = time.monotonic()


@asynccontextmanager
async def connected_node(
    site: Site, url: str, app: asgi.App, pool: str = POOL, *, slots: int, credential_of: str = ""
) -> AsyncIterator[Node]:
    """A node that is connected, and does not run yet, with the keys of the site's worker. credential_of: the role's name."""
    keys, counts = KeyRing(site.keys_folder(pool)), WorkCounts()
    credential = site.credential(credential_of or f"worker-{pool}-{NODE}")
    models = tuple(site.pools[pool])
    fabric = await NatsWorker.connect(
        url, credential, pool, NODE, models, slots=slots, keys=keys.fingerprints, counts=counts.now
    )  # fmt: skip
    feed = ManifestFeed(fabric.connection.manifest, site.root)
    await feed.start()
    try:
        receipt_key = read_ed25519(site.receipt_file(pool))
        identity = Identity(pool, lambda: keys.keys, receipt_key, lambda: feed.manifest, receipt_keys=lambda: keys.receipt_keys)
        yield Node(fabric, app, identity, counts=counts)
    finally:
        await feed.close()
        await fabric.close()
        keys.close()


async def provisioned(
    servers: Servers | str,
    provisioner: Credential,
    pools: Mapping[str, Sequence[str]],
    *,
    replicas: int = 1,
    regions: Sequence[str] = ONE_REGION,
) -> None:
    """Tries until it is done: servers that have just come up, with everybody at their door, may refuse at first."""

    async def done() -> bool:
        with suppress(FabricUnavailable):
            connection = await Connection.open(servers, provisioner)
            try:
                await provision(connection, pools, replicas=replicas, regions=regions)
            finally:
                await connection.close()
            return True
        return False

    await until(done, PATIENCE)
