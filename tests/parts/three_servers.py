"""A deployment with three message servers and a pool whose callers never stop."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import replace
from pathlib import Path
from types import MappingProxyType
from typing import Final

from lacre.trust.chain import verify
from lacre_fabric.nats.connection import Connection
from lacre_fabric.nats.gateway import NatsGateway
from lacre_fabric.nats.worker import NatsWorker
from lacre_fabric.operate import stores
from lacre_fabric.operate.account_reload import AccountFiles
from lacre_fabric.operate.rotation import publish
from lacre_fabric.operate.site import Site
from lacre_fabric.work.contract import FabricError
from parts.fabric import Kept, ask_once, work
from parts.nats_cluster import NatsCluster
from parts.waiting import until

ONE_POOL: Final[Mapping[str, Sequence[str]]] = MappingProxyType({"a": ("m1",)})


class Deployment(Kept):
    """Three servers of a site with the pool `a`, which serves until the end. ended: what its callers got."""

    def __init__(self, stack: AsyncExitStack, site: Site, cluster: NatsCluster) -> None:
        super().__init__(stack)
        self.site, self.cluster = site, cluster
        self.ended: list[str] = []

    @property
    def files(self) -> AccountFiles:
        return AccountFiles(tuple(node.folder / "accounts.json" for node in self.cluster.nodes), wait=20)

    async def gateway(self, node: int = 0) -> NatsGateway:
        servers = replace(self.cluster.servers, urls=(self.cluster.nodes[node].url,))
        return await self.kept(NatsGateway.connect(servers, self.site.credential("gateway-g1"), "g1"))

    async def worker(self, pool: str, model: str, node: int = 0, slots: int = 1) -> NatsWorker:
        servers = replace(self.cluster.servers, urls=(self.cluster.nodes[node].url,))
        credential = self.site.credential(f"worker-{pool}")
        return await self.kept(NatsWorker.connect(servers, credential, pool, f"n{node}", [model], slots=slots))

    async def serve(self) -> None:
        """Callers of the pool `a` at one server, and its worker at another one."""
        gateway, worker = await self.gateway(0), await self.worker("a", "m1", 1, slots=4)
        for _ in range(4):
            self.background(work(worker))
            self.background(self._ask(gateway))
        await until(lambda: len(self.ended) > 20, 20)

    async def _ask(self, gateway: NatsGateway) -> None:
        while True:
            try:
                self.ended.append(await ask_once(gateway))
            except FabricError as exc:
                self.ended.append(f"{type(exc).__name__}: {exc}")
            await asyncio.sleep(0.01)


@asynccontextmanager
async def deployed(folder: Path, pools: Mapping[str, Sequence[str]] = ONE_POOL) -> AsyncIterator[Deployment]:
    site = Site(folder / "site", pools, replicas=3)
    site.create()
    cluster = NatsCluster(folder, site.replicated_roles(), site.pools, plain=True)
    nats = {"url": list(cluster.servers.urls)}
    members = {
        "pools": {pool: list(models) for pool, models in pools.items()},
        "replicas": 3,
        "nats": nats,
        "gateway": "https://lacre.example",
    }
    (site.folder / "site.json").write_text(json.dumps(members))
    try:
        cluster.start()
        await cluster.ready(site.credential("provisioner"))
        async with connected(site) as connection:
            await stores.provision_site(site, connection)
            await publish(site, connection)
        async with AsyncExitStack() as stack:
            yield Deployment(stack, Site.load(site.folder), cluster)
    finally:
        cluster.stop()


@asynccontextmanager
async def connected(site: Site) -> AsyncIterator[Connection]:
    connection = await Connection.open(site.servers, site.credential("provisioner"))
    yield connection
    await connection.close()


async def published(site: Site) -> dict[str, list[str]]:
    async with connected(site) as connection:
        document = await connection.manifest()
    assert document is not None
    manifest = verify(document, site.root, time.time()).manifest
    return {pool: list(each.models) for pool, each in manifest.pools.items()}
