"""The path of a request over a real nats-server, as much of it as a test asks for: each part is a process that may die.

A `LiveSite` has a site's folder. `start` gives it a message server with everything provisioned. A test adds gateways
(`gateway`), workers (`worker`) and a node in its own process, whose app is no model (`node`). `close` ends all of it.
"""

from __future__ import annotations

import asyncio
import json
import os
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Self

import httpx2
from nats.aio.msg import Msg

from lacre import asgi
from lacre.jose.jws import b64u
from lacre_backend.keyring import KeyRing
from lacre_backend.node.node import Identity, Node
from lacre_fabric.keys.secret_files import read_ed25519
from lacre_fabric.nats import roles, subjects
from lacre_fabric.nats.connection import Connection
from lacre_fabric.nats.manifest_feed import ManifestFeed
from lacre_fabric.nats.provisioning import provision
from lacre_fabric.nats.roles import Role
from lacre_fabric.nats.worker import NatsWorker
from lacre_fabric.operate import dev_issuer
from lacre_fabric.operate.leash import PYTHON, leashed
from lacre_fabric.operate.nats_server import NatsServer, free_port
from lacre_fabric.operate.rotation import publish
from lacre_fabric.operate.site import NODE, Site
from lacre_fabric.work.contract import FabricUnavailable
from lacre_gateway.budget.plans import PLANS_FILE
from lacre_gateway.policy.rules import shipped

POOL = "default"
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
PATIENCE = 60.0  # seconds; the machine may be busy


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
        self.process = _process("lacre_gateway", self.settings, self.log)

    async def missing(self) -> dict[str, str]:
        """What `readyz` says is missing."""
        async with httpx2.AsyncClient(base_url=self.base_url, trust_env=False) as client:
            found: dict[str, str] = (await client.get("/readyz")).json()["missing"]
            return found

    async def ready(self, seconds: float = PATIENCE) -> None:
        async with asyncio.timeout(seconds):
            while True:
                assert self.process.poll() is None, self.log.read_text()
                try:
                    if not await self.missing():
                        return
                except httpx2.TransportError:
                    pass
                await asyncio.sleep(0.05)

    def stop(self) -> None:
        _stop(self.process)


@dataclass
class WorkerProcess:
    """heard: when its presence was heard last, on the monotonic clock."""

    node: str
    settings: Path
    log: Path
    heard: float = 0.0
    process: subprocess.Popen[bytes] = field(init=False)

    def start(self, inside: Callable[..., list[str]] = lambda *command: list(command)) -> None:
        """inside: what the command becomes where it is to run somewhere else."""
        self.process = _process("lacre_backend", self.settings, self.log, inside)

    def kill(self) -> None:
        os.kill(self.process.pid, signal.SIGKILL)
        self.process.wait(10)
        self.heard = 0.0

    def stop(self) -> int:
        return _stop(self.process)

    @property
    def ticks(self) -> int:
        """CPU time so far, in clock ticks (proc(5)): the worker that answers is the one that computes."""
        fields = Path(f"/proc/{self.process.pid}/stat").read_text().rpartition(")")[2].split()
        return int(fields[11]) + int(fields[12])


class LiveSite:
    """models: by pool. kms: the address of the key that wraps the site's own. gateways, workers: the processes, as added."""

    nats: subprocess.Popen[bytes]

    def __init__(self, folder: Path, models: Mapping[str, Sequence[str]] | None = None, *, kms: str = "") -> None:
        self.site = Site(folder / "state", models or {POOL: (MODEL,)})
        if kms:
            self.site.choose_kms(kms)
        self.site.create()
        self.server = NatsServer(self.site.folder / "nats", free_port())
        self.policies = folder / "policies"
        self.gateways: list[GatewayProcess] = []
        self.workers: list[WorkerProcess] = []
        self.stack = AsyncExitStack()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_error: object) -> None:
        await self.close()

    async def close(self) -> None:
        await self.stack.aclose()

    # The message server

    async def start(self, *, gateways: Sequence[str] = (), nodes: Sequence[str] = (), more: Sequence[Role] = ()) -> None:
        """The message server knows the site's own roles, and further gateways and nodes of the first pool."""
        site, pools = self.site, tuple(self.site.pools)
        self.server.configure([
            *site.roles(),
            *(roles.gateway(site.credential(f"gateway-{name}"), name, pools) for name in gateways),
            *(roles.worker(site.credential(f"worker-{pools[0]}-{node}"), pools[0], node) for node in nodes),
            *more,
        ])  # fmt: skip
        self.start_nats()
        self.stack.callback(lambda: _stop(self.nats))
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
        """A server that has just come up, with everybody at its door, may refuse at first."""
        async with asyncio.timeout(PATIENCE):
            while True:
                try:
                    connection = await self.connect()
                    try:
                        return await provision(connection, self.site.pools)
                    finally:
                        await connection.close()
                except FabricUnavailable:
                    await asyncio.sleep(0.1)

    # Gateways

    def gateway(self, more: str, *, plans: str = NO_LIMITS, drain: int = 5) -> GatewayProcess:
        """The next one, not started yet. more: tables of its settings, as TOML. plans: the plans file of them all."""
        if not self.policies.exists():
            shutil.copytree(shipped(), self.policies)
            (self.policies / PLANS_FILE).write_text(plans)
        name = f"g{len(self.gateways) + 1}"
        gateway = GatewayProcess.configured(self.site, name, [self.server.url], self.policies, more, drain=drain)
        self.gateways.append(gateway)
        return gateway

    async def start_gateways(self, seconds: float = PATIENCE) -> None:
        for gateway in self.gateways:
            gateway.start()
            self.stack.callback(gateway.stop)
        await self.ready(seconds)

    async def ready(self, seconds: float = PATIENCE) -> None:
        await asyncio.gather(*(gateway.ready(seconds) for gateway in self.gateways))

    async def stop_gateways(self) -> None:
        """In order: what they did not use of their leases is given back."""
        for gateway in self.gateways:
            gateway.process.terminate()
        for gateway in self.gateways:
            await asyncio.to_thread(gateway.process.wait, 60)

    def token(self, subject: str, **claims: Sequence[str]) -> str:
        """Of the site's own issuer."""
        return dev_issuer.issue(read_ed25519(self.site.folder / "issuer.pem"), subject, tenant="acme", **claims)

    # Workers

    async def node(self, app: asgi.App, pool: str = POOL, *, slots: int = 16) -> Node:
        """A node that runs in this process, with the keys of the site's own worker."""
        site, keys = self.site, KeyRing(self.site.keys_folder(pool))
        self.stack.callback(keys.close)
        fabric = await NatsWorker.connect(
            self.server.url, site.credential(f"worker-{pool}-{NODE}"), pool, NODE, tuple(site.pools[pool]), slots=slots,
            keys=keys.fingerprints,
        )  # fmt: skip
        self.stack.push_async_callback(fabric.close)
        feed = ManifestFeed(fabric.connection.manifest, site.root)
        await feed.start()
        self.stack.push_async_callback(feed.close)
        receipt_key = read_ed25519(site.folder / "pools" / pool / "receipt.pem")
        node = Node(fabric, app, Identity(pool, lambda: keys.keys, receipt_key, lambda: feed.manifest))
        running = asyncio.create_task(node.run())

        async def end() -> None:
            running.cancel()
            await asyncio.gather(running, return_exceptions=True)
            await node.drain(2)

        self.stack.push_async_callback(end)
        return node

    @classmethod
    async def with_node(cls, folder: Path, app: asgi.App, more: str, *, gateways: int = 2, slots: int = 16) -> Self:
        """A node in this process, whose app is `app`, and gateways that are ready. more: tables of the gateways' settings."""
        live = cls(folder, {POOL: (TINY,)})
        async with AsyncExitStack() as stack:
            stack.push_async_callback(live.close)
            await live.start(gateways=[f"g{number + 1}" for number in range(1, gateways)])
            await live.node(app, slots=slots)
            for _ in range(gateways):
                live.gateway(more, drain=2)
            await live.start_gateways()
            stack.pop_all()
        return live

    def worker(self, settings: Path, node: str = NODE) -> WorkerProcess:
        """Not started yet."""
        worker = WorkerProcess(node, settings, self.site.log(node))
        self.workers.append(worker)
        return worker

    @classmethod
    async def with_workers(cls, folder: Path, count: int = 2, served: Mapping[str, str] | None = None) -> Self:
        """One gateway and real workers, all ready. served: in place of the default model, a table `[upstream]` for each worker,
        as TOML, by its model's name.
        """
        tables = list((served or {}).values()) or [""] * count
        live = cls(folder, {POOL: tuple(served or (MODEL,))})
        async with AsyncExitStack() as stack:
            stack.push_async_callback(live.close)
            nodes = [f"n{number + 1}" for number in range(len(tables))]
            await live.start(nodes=nodes[1:])
            port = free_port()
            # One thread each: two workers of two threads on two cores wait for each other.
            model = {"name": MODEL, "threads": 1, "context": 2048, "slots": 2}
            live.site.write_settings(live.server.url, port, {POOL: [model]})
            base_url, log = f"http://127.0.0.1:{port}", live.site.log("gateway")
            url = live.site.connection_string(base_url)
            live.gateways.append(GatewayProcess("gateway", live.site.gateway_settings, log, base_url, url))
            for node, table in zip(nodes, tables, strict=True):
                live.worker(worker_settings(live.site, node, table), node)
            await live.start_workers()
            await live.start_gateways()
            await live.heard()
            stack.pop_all()
        return live

    async def start_workers(self) -> None:
        connection = await self.connect()
        self.stack.push_async_callback(connection.close)
        await connection.client.subscribe(subjects.presence(next(iter(self.site.pools)), "*", "*"), cb=self._hear)
        for worker in self.workers:
            worker.start()
            self.stack.callback(worker.stop)

    async def heard(self) -> None:
        """Until every worker was heard within the last second and a half."""
        async with asyncio.timeout(2 * PATIENCE):
            while not all(time.monotonic() - worker.heard < 1.5 for worker in self.workers):
                for worker in self.workers:
                    assert worker.process.poll() is None, worker.log.read_text()[-2000:]
                await asyncio.sleep(0.05)

    async def _hear(self, message: Msg) -> None:
        node = message.subject.rpartition(".")[2]
        for worker in self.workers:
            if worker.node == node:
                worker.heard = time.monotonic()


def worker_settings(site: Site, node: str, upstream: str = "") -> Path:
    """The site's worker settings, for another node; with `upstream`, where there is one, in place of the models."""
    own = site.worker_settings(POOL)
    path = own.with_name(f"{node}.toml")
    text = own.read_text().replace(f'"{NODE}"', f'"{node}"').replace(f"worker-{POOL}-{NODE}", f"worker-{POOL}-{node}")
    if upstream:
        text = text.partition("\n[[models]]")[0] + upstream
    path.touch(0o600)
    path.write_text(text.replace('"manifests"', f'"manifests-{node}"'))
    return path


def busiest(workers: Sequence[WorkerProcess], since: Sequence[int]) -> WorkerProcess:
    """The one that computed the most. since: the ticks of each before."""
    return max(zip(workers, since, strict=True), key=lambda pair: pair[0].ticks - pair[1])[0]


def own_issuer(site: Site) -> str:
    """The table `[[issuers]]` for the site's development issuer."""
    return f"""
        [[issuers]]
        issuer = "{dev_issuer.ISSUER}"
        audience = "{dev_issuer.AUDIENCE}"
        algorithms = ["EdDSA"]
        jwks = "{site.folder / "issuer.jwks"}"
    """


def _process(
    package: str, settings: Path, log: Path, inside: Callable[..., list[str]] = lambda *command: list(command)
) -> subprocess.Popen[bytes]:
    command = leashed(inside(*PYTHON, "-m", package, "--settings", str(settings)))
    with log.open("ab") as output:
        return subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=output, stderr=output)


def _stop(process: subprocess.Popen[bytes]) -> int:
    """Its status. In order, where it still runs."""
    if process.poll() is None:
        process.terminate()
    return process.wait(30)
