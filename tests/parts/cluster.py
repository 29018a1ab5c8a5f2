"""A small deployment on loopback: a real nats-server, gateways that are processes of their own, and a node in this process that
really opens, and seals answers that no model made."""

from __future__ import annotations

import asyncio
import json
import shutil
import subprocess
from collections.abc import Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Self

import httpx2

from lacre import asgi
from lacre.jose.jws import b64u
from lacre.trust.chain import verify
from lacre_backend.keyring import KeyRing
from lacre_backend.node.node import Identity, Node
from lacre_fabric.keys.secret_files import read_ed25519
from lacre_fabric.nats import roles
from lacre_fabric.nats.connection import Connection
from lacre_fabric.nats.provisioning import provision
from lacre_fabric.nats.worker import NatsWorker
from lacre_fabric.operate import dev_issuer
from lacre_fabric.operate.leash import PYTHON, leashed
from lacre_fabric.operate.nats_server import NatsServer, free_port
from lacre_fabric.operate.rotation import publish
from lacre_fabric.operate.site import NODE, Site
from lacre_gateway.budget.plans import PLANS_FILE
from lacre_gateway.policy.rules import shipped

POOL = "default"
_NO_LIMITS = """
    currency = "USD"
    default_plan = "all"
    [plans.all.user]
    concurrent_streams = 1000
    [prices."*"]
    prompt = "1"
    cached = "1"
    completion = "1"
"""
MODEL = "tiny"


@dataclass
class GatewayProcess:
    """One gateway. url: what an application is given."""

    name: str
    settings: Path
    log: Path
    base_url: str
    url: str
    process: subprocess.Popen[bytes] = field(init=False)

    @classmethod
    def configured(
        cls, site: Site, name: str, nats_urls: Sequence[str], policies: Path, more: str, *, public_url: str = "", drain: int = 5
    ) -> Self:
        """Its settings are written, with a port of its own; it is not started. more: further tables, as TOML. public_url: where
        applications find it, if that is not where it listens.
        """
        port = free_port()
        base_url = f"http://127.0.0.1:{port}"
        site.credential(f"gateway-{name}")
        path = site.folder / "gateway" / f"{name}.toml"
        path.write_text(f"""
            gateway = "{name}"
            public_url = "{public_url or base_url}"
            trust = "{b64u(site.root)}"
            signing_key = "grant.pem"
            audit = "audit-{name}"
            policies = "{policies}"
            [listen]
            port = {port}
            drain = {drain}
            [nats]
            url = {json.dumps(list(nats_urls))}
            credentials = "{site.credential_file(f"gateway-{name}")}"
            {more}
        """)
        return cls(name, path, site.log(name), base_url, site.connection_string(public_url or base_url))

    def start(self) -> None:
        with self.log.open("ab") as output:
            command = leashed([*PYTHON, "-m", "lacre_gateway", "--settings", str(self.settings)])
            self.process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=output, stderr=output)

    async def missing(self) -> dict[str, str]:
        """What `readyz` says is missing."""
        async with httpx2.AsyncClient(base_url=self.base_url, trust_env=False) as client:
            found: dict[str, str] = (await client.get("/readyz")).json()["missing"]
            return found

    async def ready(self) -> None:
        async with asyncio.timeout(60):
            while True:
                assert self.process.poll() is None, self.log.read_text()
                try:
                    if not await self.missing():
                        return
                except httpx2.TransportError:
                    pass
                await asyncio.sleep(0.05)

    def stop(self) -> None:
        if self.process.poll() is None:
            self.process.terminate()
            self.process.wait(30)


@dataclass
class Cluster:
    """Use `start`. issuers: the tables `[[issuers]]` of the gateways' settings, as TOML."""

    site: Site
    server: NatsServer
    gateways: list[GatewayProcess]
    stack: AsyncExitStack

    @classmethod
    async def start(cls, folder: Path, app: asgi.App, issuers: str, *, gateways: int = 2, slots: int = 16) -> Self:
        """Everything ends with `stack`."""
        async with AsyncExitStack() as stack:
            site = Site(folder / "state", {POOL: (MODEL,)})
            site.create()
            cluster = cls(site, NatsServer(site.folder / "nats", free_port()), [], stack)
            await cluster._start_fabric(gateways)
            await cluster._start_worker(app, slots)
            cluster.gateways = [cluster._gateway(f"g{number + 1}", issuers) for number in range(gateways)]
            await asyncio.gather(*(gateway.ready() for gateway in cluster.gateways))
            cluster.stack = stack.pop_all()
        return cluster

    async def close(self) -> None:
        await self.stack.aclose()

    def credential(self, gateway: str) -> Path:
        return self.site.credential_file(f"gateway-{gateway}")

    async def _start_fabric(self, gateways: int) -> None:
        site = self.site
        others = [f"g{number}" for number in range(2, gateways + 1)]
        more = [roles.gateway(site.credential(f"gateway-{name}"), name, (POOL,)) for name in others]
        self.server.configure([*site.roles(), *more])
        process = self.server.start(site.log("nats"))
        self.stack.callback(process.wait, 10)
        self.stack.callback(process.terminate)
        connection = await Connection.open(self.server.url, site.credential("provisioner"))
        try:
            await provision(connection, site.pools)
            await publish(site, connection)
        finally:
            await connection.close()

    async def _start_worker(self, app: asgi.App, slots: int) -> None:
        site = self.site
        document = (site.folder / "trust" / "manifest.json").read_bytes()
        now = json.loads((site.folder / "trust" / "published").read_text())
        manifest = verify(document, site.root, now).manifest
        keys = KeyRing(site.keys_folder(POOL))
        receipt_key = read_ed25519(site.folder / "pools" / POOL / "receipt.pem")
        fabric = await NatsWorker.connect(
            self.server.url, site.credential(f"worker-{POOL}-{NODE}"), POOL, NODE, (MODEL,), slots=slots
        )
        self.stack.push_async_callback(fabric.close)
        node = Node(fabric, app, Identity(POOL, lambda: keys.keys, receipt_key, lambda: manifest))
        running = asyncio.create_task(node.run())

        async def end() -> None:
            running.cancel()
            await asyncio.gather(running, return_exceptions=True)
            await node.drain(2)

        self.stack.push_async_callback(end)

    def _gateway(self, name: str, issuers: str) -> GatewayProcess:
        policies = self.site.folder / "gateway" / "policies"
        if not policies.exists():
            shutil.copytree(shipped(), policies)
            (policies / PLANS_FILE).write_text(_NO_LIMITS)
        gateway = GatewayProcess.configured(self.site, name, [self.server.url], policies, issuers, drain=2)
        gateway.start()
        self.stack.callback(gateway.stop)
        return gateway


def own_issuer(site: Site) -> str:
    """The table `[[issuers]]` for the site's development issuer."""
    return f"""
        [[issuers]]
        issuer = "{dev_issuer.ISSUER}"
        audience = "{dev_issuer.AUDIENCE}"
        algorithms = ["EdDSA"]
        jwks = "{site.folder / "issuer.jwks"}"
    """
