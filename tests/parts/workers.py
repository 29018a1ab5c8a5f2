"""One gateway and several workers, all of them processes, over a real nats-server: for tests in which workers die."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Self

from nats.aio.msg import Msg

from lacre_fabric.nats import roles, subjects
from lacre_fabric.nats.connection import Connection
from lacre_fabric.nats.provisioning import provision
from lacre_fabric.operate.leash import PYTHON, leashed
from lacre_fabric.operate.nats_server import NatsServer, free_port
from lacre_fabric.operate.rotation import publish
from lacre_fabric.operate.site import NODE, Site
from parts.cluster import GatewayProcess

POOL = "default"
MODEL = "smollm2-135m"


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
        with self.log.open("ab") as output:
            command = leashed(inside(*PYTHON, "-m", "lacre_backend", "--settings", str(self.settings)))
            self.process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=output, stderr=output)

    def kill(self) -> None:
        os.kill(self.process.pid, signal.SIGKILL)
        self.process.wait(10)
        self.heard = 0.0

    def stop(self) -> None:
        if self.process.poll() is None:
            self.process.terminate()
            self.process.wait(30)

    @property
    def ticks(self) -> int:
        """CPU time so far, in clock ticks (proc(5)): the worker that answers is the one that computes."""
        fields = Path(f"/proc/{self.process.pid}/stat").read_text().rpartition(")")[2].split()
        return int(fields[11]) + int(fields[12])


@dataclass
class Workers:
    """Use `start`; everything ends with `close`. nats: the message server's process."""

    site: Site
    server: NatsServer
    stack: AsyncExitStack
    gateway: GatewayProcess
    workers: list[WorkerProcess]
    nats: subprocess.Popen[bytes]

    @classmethod
    async def start(cls, folder: Path, count: int = 2, served: Mapping[str, str] | None = None) -> Self:
        """served: in place of the default model, a table `[upstream]` for each worker, as TOML, by its model's name."""
        upstreams = served or {}
        count = len(upstreams) or count
        async with AsyncExitStack() as stack:
            site = Site(folder / "state", {POOL: tuple(upstreams) or (MODEL,)})
            site.create()
            server, port = NatsServer(site.folder / "nats", free_port()), free_port()
            nodes = [f"n{number + 1}" for number in range(count)]
            others = [roles.worker(site.credential(f"worker-{POOL}-{node}"), POOL, node) for node in nodes[1:]]
            server.configure([*site.roles(), *others])
            process = server.start(site.log("nats"))
            stack.callback(process.wait, 10)
            stack.callback(process.terminate)
            connection = await Connection.open(server.url, site.credential("provisioner"))
            stack.push_async_callback(connection.close)
            await provision(connection, site.pools)
            await publish(site, connection)
            base_url = f"http://127.0.0.1:{port}"
            # One thread each: two workers of two threads on two cores wait for each other.
            site.write_settings(server.url, port, {POOL: [{"name": MODEL, "threads": 1, "context": 2048, "slots": 2}]})
            log, url = site.log("gateway"), site.connection_string(base_url)
            gateway = GatewayProcess("gateway", site.gateway_settings, log, base_url, url)
            tables = list(upstreams.values()) or [""] * count
            workers = [
                WorkerProcess(node, worker_settings(site, node, table), site.log(node))
                for node, table in zip(nodes, tables, strict=True)
            ]
            pool = cls(site, server, stack, gateway, workers, process)
            await connection.client.subscribe(subjects.presence(POOL, "*", "*"), cb=pool._hear)
            for each in (gateway, *workers):
                each.start()
                stack.callback(each.stop)
            await gateway.ready()
            await pool.ready()
            pool.stack = stack.pop_all()
        return pool

    async def close(self) -> None:
        await self.stack.aclose()

    async def ready(self) -> None:
        """Until every worker was heard within the last second and a half."""
        async with asyncio.timeout(120):
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
