"""A deployment whose processes are of two versions: a balancer, two gateways, two workers with the real model, one NATS."""

from __future__ import annotations

import asyncio
import itertools
import shutil
import subprocess
from collections import Counter
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Self
from urllib.parse import urlsplit

from lacre_fabric.nats import roles
from lacre_fabric.operate.nats_server import free_port
from lacre_gateway.budget.plans import PLANS_FILE
from parts.scraping import receipt_checks
from parts.stage import MODEL, POOL, GatewayProcess, LiveStage, launched, own_issuer, stopped, worker_settings
from parts.stage.processes import OwnProcess
from parts.versions import Version, environment
from parts.waiting import PATIENCE, until

GATEWAYS, NODES = ("g1", "g2"), ("n1", "n2")
LOAD = Path(__file__).with_name("load.py")
CLIENTS = 2  # of each version
ENOUGH = 4  # answers that each version's clients get in each state of the deployment
PLANS = """
    currency = "USD"
    default_plan = "all"
    [plans.all.user]
    concurrent_streams = 100
    tokens_per_day = 100_000_000
    [plans.all.tenant]
    money_per_month = "1000000"
    [prices."*"]
    prompt = "1"
    cached = "1"
    completion = "1"
"""  # so that gateways of both versions draw from the same budgets
DRAIN = 90  # seconds that an answer under way has; on a busy machine it may need them
DRAIN_DELAY = 1  # seconds in which a gateway still accepts the connections that the balancer has just made


@dataclass
class Balancer:
    """Passes connections on to the gateways that are `on`, in turn."""

    on: list[str] = field(default_factory=list)
    url: str = ""
    turns: Iterator[int] = field(default_factory=itertools.count)

    @asynccontextmanager
    async def running(self) -> AsyncIterator[Self]:
        server = await asyncio.start_server(self._connected, "127.0.0.1", 0)
        self.url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
        try:
            yield self
        finally:
            server.close()

    async def _connected(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        at = urlsplit(self.on[next(self.turns) % len(self.on)])
        beyond, onward = await asyncio.open_connection(at.hostname, at.port)
        await asyncio.gather(_passed(reader, onward), _passed(beyond, writer))


async def _passed(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    with suppress(ConnectionError):
        while piece := await reader.read(65536):
            writer.write(piece)
            await writer.drain()
    writer.close()


@dataclass
class Load:
    """Clients of one version's SDK, in a process of their own."""

    version: Version
    log: Path
    process: subprocess.Popen[bytes]

    @classmethod
    def started(cls, version: Version, url: str, token: str, folder: Path) -> Self:
        log, own = folder / f"load-{version.name}.log", {"LACRE_TOKEN": token, "XDG_STATE_HOME": str(folder / version.name)}
        return cls(version, log, launched([*version.running, str(LOAD), url, str(CLIENTS)], log, env=environment() | own))

    def lines(self, kind: str = "") -> list[str]:
        return [line for line in self.log.read_text().splitlines() if line.startswith(kind)]

    def answered(self) -> int:
        assert self.process.poll() is None, self.lines()[-5:]
        assert not self.lines("failed"), (self.version.name, self.lines("failed")[:5])
        return len(self.lines("whole"))

    async def ended(self) -> int:
        """How many answers were whole. Fails if anything else became of a request."""
        self.process.terminate()
        assert await asyncio.to_thread(self.process.wait, PATIENCE) == 0, self.lines()[-5:]
        whole = self.lines("whole")
        others = [line for line in self.lines() if line not in whole]
        assert others == [], f"{len(others)} requests of the {self.version.name} SDK failed: {others[:5]}"
        return len(whole)


class Deployment(LiveStage):
    """old, new: the versions. Everything is of the old one when it is `up`; the state folder is too."""

    def __init__(self, folder: Path, old: Version, new: Version) -> None:
        self.folder, self.old, self.new = folder, old, new
        old.lacre("keys", "init", "--state", str(folder / "state"))
        super().__init__(folder, {POOL: (MODEL,)})
        shutil.copytree(old.sources / "policies", self.policies)  # an operator's own rules, which both versions read
        (self.policies / PLANS_FILE).write_text(PLANS)
        self.balancer = Balancer()
        self.loads: list[Load] = []
        self.admin_ports = [free_port() for _ in GATEWAYS]
        self.counts: dict[str, dict[str, int]] = {}  # by state of the deployment, and by version of the SDK

    async def up(self) -> None:
        site, pools = self.site, tuple(self.site.pools)
        await self.stack.enter_async_context(self.balancer.running())
        more = [roles.gateway(site.credential(f"gateway-{name}"), name, pools) for name in GATEWAYS[1:]]
        more += [roles.worker(site.credential(f"worker-{POOL}-{node}"), POOL, node) for node in NODES[1:]]
        self.server.configure([*site.roles(), *more])
        self.start_nats()
        self.stack.callback(lambda: stopped(self.nats))
        self.write_settings({"name": MODEL, "threads": 1, "context": 1024, "slots": 2})
        site.save(self.server.url, self.balancer.url)
        await self.publish(self.old)
        for node in NODES:
            path = worker_settings(site, node)
            path.write_text(path.read_text().replace("\ndrain = 5\n", f"\ndrain = {DRAIN}\n"))
            assert f"drain = {DRAIN}" in path.read_text()
            self.worker(path, node)
        for name, port in zip(GATEWAYS, self.admin_ports, strict=True):
            tables = f"drain_delay = {DRAIN_DELAY}\n{own_issuer(site)}\n[admin]\nport = {port}\n"
            self.gateway(tables, drain=DRAIN)
            assert self.gateways[-1].name == name
        await self.start_workers(self.old)
        await asyncio.gather(*(self._start(gateway, self.old) for gateway in self.gateways))
        await self.heard()

    async def publish(self, version: Version) -> None:
        """Provisions the fabric and publishes a manifest, with that version's command."""
        await asyncio.to_thread(version.lacre, "manifest", "publish", "--state", str(self.site.folder))

    async def start_workers(self, version: Version) -> None:  # type: ignore[override]
        workers, self.workers = self.workers, []
        await super().start_workers()  # hears their presence
        self.workers = workers
        for worker in workers:
            worker.start(version.inside)
            self.stack.callback(worker.stop)

    async def _start(self, gateway: GatewayProcess, version: Version) -> None:
        gateway.start(version.inside)
        self.stack.callback(gateway.stop)
        await gateway.ready()
        self.balancer.on.append(gateway.base_url)

    async def roll_gateways(self, version: Version) -> None:
        """One after the other: out of the balancer, drained, started as the other version, back in."""
        for gateway in self.gateways:
            self.balancer.on.remove(gateway.base_url)
            assert await drained(gateway) == 0, gateway.said()
            await self._start(gateway, version)

    async def roll_workers(self, version: Version) -> None:
        for worker in self.workers:
            assert await drained(worker) == 0, worker.said()
            worker.heard = 0.0
            worker.start(version.inside)
            self.stack.callback(worker.stop)
            await self.heard()

    def begin_load(self) -> None:
        url = self.site.connection_string(self.balancer.url)
        self.loads = [Load.started(each, url, self.token(each.name), self.folder) for each in (self.old, self.new)]
        for load in self.loads:
            self.stack.callback(stopped, load.process)

    async def answers(self, state: str) -> None:
        """Until the clients of both versions got answers in this state of the deployment."""
        before = {load.version.name: load.answered() for load in self.loads}
        await until(
            lambda: all(load.answered() >= before[load.version.name] + ENOUGH for load in self.loads),
            PATIENCE,
            lambda: [load.lines()[-3:] for load in self.loads],
        )
        self.counts[state] = {load.version.name: load.answered() - before[load.version.name] for load in self.loads}

    async def receipt_checks(self) -> Counter[str]:
        """How the gateways checked receipts since their starts, by their metrics."""
        found: Counter[str] = Counter()
        for port in self.admin_ports:
            found.update(await receipt_checks(port))
        return found


async def drained(server: OwnProcess) -> int:
    """Its status, once its answers under way have ended."""
    server.process.terminate()
    return await asyncio.to_thread(server.process.wait, DRAIN + PATIENCE)
