"""The deployment that is struck: three message servers, three gateways behind nginx, two workers with the real model and two
that echo. Every part is a process that may die; a keeper starts again what ended by itself, as an orchestrator does.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import subprocess
from collections import Counter
from collections.abc import AsyncIterator, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final, Protocol

from chaos.balancer import Balancer
from chaos.echo_worker import POOL
from chaos.message_servers import MessageServer, network
from chaos.schedule import GATEWAYS, REAL_WORKERS, SERVERS, SMALL_DISK, WORKERS
from lacre_fabric.nats import roles
from lacre_fabric.nats.connection import Connection
from lacre_fabric.nats.provisioning import provision
from lacre_fabric.operate.leash import PYTHON
from lacre_fabric.operate.nats_server import free_port
from lacre_fabric.operate.rotation import publish
from lacre_fabric.operate.site import NODE, Site
from lacre_fabric.work.contract import FabricUnavailable
from parts.small_disk import NO_DISK, small_disk
from parts.stage import GatewayProcess, WorkerProcess, own_issuer, worker_settings
from parts.stage.processes import launched
from parts.stage.settings import policies_with

REAL, ECHO = "smollm2-135m", "echo"
TESTS: Final = os.environ | {"PYTHONPATH": str(Path(__file__).parents[1])}  # the environment of a module of the tests
READY: Final = 180.0  # seconds for all of it to come up, on a machine that has other things to do
PRICES: Final = '[prices."*"]\nprompt = "1.1"\ncached = "0.3"\ncompletion = "2.7"\n'
# Far more than the load takes, and all of it drawn on leases by every gateway: what is held against the books is their sums.
PLANS: Final = f"""
default_plan = "p"
[plans.p.tenant]
money_per_month = "1000.00"
tokens_per_day = 100000000
[plans.p.user]
requests_per_minute = 6000
concurrent_streams = 100
{PRICES}"""
# A request that finds no worker is refused after ten seconds rather than thirty: clients see it typed, and in time.
LIMITS: Final = "[limits]\nqueue_limit = 10.0\nlongest_stream = 120.0\n"
KEPT_UP: Final = 0.5  # seconds between looks of the keeper
CLOCKS: Final = ("/usr/lib/x86_64-linux-gnu/faketime/libfaketime.so.1", "/usr/lib/aarch64-linux-gnu/faketime/libfaketime.so.1")


class Part(Protocol):
    process: subprocess.Popen[bytes]
    log: Path

    def start(self) -> None: ...


@dataclass
class EchoWorker:
    """clock: the file that says how far its clock is off; None where that cannot be had."""

    name: str
    site: Site
    urls: Sequence[str]
    log: Path
    clock: Path | None
    process: subprocess.Popen[bytes] = field(init=False)

    def start(self) -> None:
        environment = dict(TESTS)
        if self.clock is not None:
            self.skew(0.0)
            environment |= {
                "LD_PRELOAD": _clock_library() or "", "FAKETIME_TIMESTAMP_FILE": str(self.clock),
                "FAKETIME_CACHE_DURATION": "1", "FAKETIME_DONT_FAKE_MONOTONIC": "1",
            }  # fmt: skip
        command = [*PYTHON, "-m", "chaos.echo_worker", str(self.site.folder), self.name, ECHO, *self.urls]
        self.process = launched(command, self.log, env=environment)

    def skew(self, seconds: float) -> None:
        if self.clock is not None:
            self.clock.write_text(f"{seconds:+.1f}\n")


class Stage:
    """parts: by name, those that may die. killed: those that were. alone: how often the keeper had to start one, by name."""

    def __init__(self, folder: Path) -> None:
        self._open = AsyncExitStack()
        self.site = Site(folder / "state", {POOL: (REAL, ECHO)}, replicas=len(SERVERS))
        self.site.create()
        self.policies = policies_with(PLANS, folder / "policies")
        self.network = network(SERVERS)
        self._open.callback(self.network.close)
        ports = (free_port(), free_port()) if self.network.partitions else None
        self.servers = {
            name: MessageServer(
                name, self.site.folder / "nats" / name, self.site.log(name), self.network, ports or (free_port(), free_port())
            )
            for name in SERVERS
        }
        self._urls = [server.url for server in self.servers.values()]
        balancer_port = free_port()
        self.gateways = {
            name: GatewayProcess.configured(
                self.site, name, self._all_from(number), self.policies, f"{own_issuer(self.site)}\n{LIMITS}",
                public_url=f"http://127.0.0.1:{balancer_port}",
            )
            for number, name in enumerate(GATEWAYS)
        }  # fmt: skip
        self.balancer = Balancer(folder / "nginx", balancer_port, [gateway.base_url for gateway in self.gateways.values()])
        self.workers = self._workers(folder)
        self.parts: dict[str, Part] = {**self.servers, **self.gateways, **self.workers}
        self.held: set[str] = set()  # those that are away on purpose
        self.killed: set[str] = set()
        self.alone: Counter[str] = Counter()
        self.disk: Path | None = None
        self.provisioner: Connection

    def _workers(self, folder: Path) -> dict[str, WorkerProcess | EchoWorker]:
        site = self.site
        # One thread each: there may be no more cores than two.
        site.write_settings(self._urls[0], 1, {POOL: [{"name": REAL, "threads": 1, "context": 1024, "slots": 2}]})
        site.save(self._urls[0], self.balancer.url)
        # The second's are made from the first's: both before either is changed.
        settings = {name: site.worker_settings(POOL) if name == NODE else worker_settings(site, name) for name in REAL_WORKERS}
        workers: dict[str, WorkerProcess | EchoWorker] = {}
        for number, name in enumerate(WORKERS):
            site.credential(f"worker-{POOL}-{name}")
            urls, log = self._all_from(number), site.log(name)
            if name in REAL_WORKERS:
                written = settings[name].read_text()
                settings[name].write_text(written.replace(f'"{self._urls[0]}"', json.dumps(urls)))
                workers[name] = WorkerProcess(name, settings[name], log)
            else:
                workers[name] = EchoWorker(name, site, urls, log, folder / f"clock-{name}" if _clock_library() else None)
        return workers

    def _all_from(self, number: int) -> list[str]:
        """Every message server, as in a deployment; whoever starts tries another one first."""
        first = number % len(self._urls)
        return self._urls[first:] + self._urls[:first]

    @property
    def url(self) -> str:
        """What an application is given."""
        return self.site.connection_string(self.balancer.url)

    def audit(self, name: str) -> Path:
        return self.site.folder / "gateway" / f"audit-{name}"

    def why_not(self) -> dict[str, str]:
        """The strikes that this machine cannot have, and why."""
        reasons = {
            "partition": None if self.network.partitions else "network namespaces take root and iproute2",
            "skew": None if _clock_library() else "libfaketime is not installed",
            "disk": NO_DISK,
        }
        return {kind: reason for kind, reason in reasons.items() if reason is not None}

    async def start(self) -> None:
        if NO_DISK is None:
            self.disk = self._open.enter_context(small_disk(self.audit(SMALL_DISK), "64m"))
        self._start_servers()
        await self.provision()
        for part in (*self.workers.values(), *self.gateways.values()):
            part.start()
        self.balancer.start()
        self._open.callback(_end, self.balancer.process)
        async with asyncio.timeout(READY):
            await asyncio.gather(*(gateway.ready(READY) for gateway in self.gateways.values()))
        keeping = asyncio.create_task(self._keep())
        self._open.callback(keeping.cancel)

    def _start_servers(self) -> None:
        site = self.site
        more = [
            *(roles.gateway(site.credential(f"gateway-{name}"), name, (POOL,)) for name in GATEWAYS[1:]),
            *(roles.worker(site.credential(f"worker-{POOL}-{name}"), POOL, name) for name in WORKERS if name != NODE),
        ]
        for server in self.servers.values():
            server.configure([*site.roles(), *more], self.servers)
            server.start()

    async def provision(self) -> None:
        """A cluster that has just come up has no leader yet."""
        async with asyncio.timeout(READY):
            while True:
                with contextlib.suppress(FabricUnavailable):
                    async with self.connected() as connection:
                        await provision(connection, self.site.pools, replicas=self.site.replicas)
                        await publish(self.site, connection)
                        return
                await asyncio.sleep(0.5)

    @asynccontextmanager
    async def connected(self) -> AsyncIterator[Connection]:
        """As the provisioner, to any server that answers. Raises FabricUnavailable."""
        for url in self._urls:
            with contextlib.suppress(FabricUnavailable):
                connection = await Connection.open(url, self.site.credential("provisioner"))
                break
        else:
            raise FabricUnavailable("no message server answers")
        try:
            yield connection
        finally:
            await connection.close()

    async def _keep(self) -> None:
        while True:
            await asyncio.sleep(KEPT_UP)
            for name, part in self.parts.items():
                if name not in self.held and part.process.poll() is not None:
                    self.alone[name] += 1
                    part.start()

    async def stop_gateways(self) -> None:
        """In order: what they did not use of their leases is given back."""
        self.held.update(self.gateways)
        for gateway in self.gateways.values():
            gateway.process.terminate()
        for gateway in self.gateways.values():
            await asyncio.to_thread(gateway.process.wait, 60)

    async def close(self) -> None:
        """Also of a stage that did not come up."""
        self.held.update(self.parts)
        for part in self.parts.values():
            if hasattr(part, "process"):
                _end(part.process)
        await self._open.aclose()


def _clock_library() -> str | None:
    return next((path for path in CLOCKS if Path(path).exists()), None)


def _end(process: subprocess.Popen[bytes]) -> None:
    process.kill()
    process.wait()
