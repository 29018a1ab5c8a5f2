"""A real nats-server with every role provisioned, for tests: started once, ended with the session."""

from __future__ import annotations

import asyncio
import secrets
import subprocess
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from lacre.wire.header import SealedHeader
from lacre_fabric.nats import roles, subjects
from lacre_fabric.nats.connection import Connection
from lacre_fabric.nats.gateway import NatsGateway
from lacre_fabric.nats.provisioning import provision
from lacre_fabric.nats.roles import Credential, Role
from lacre_fabric.nats.worker import NatsWorker
from lacre_fabric.operate.nats_server import NatsServer, free_port
from lacre_fabric.work.contract import ACK_WAIT, Work

POOLS = {"a": ("m1", "m2"), "b": ("m1",)}
GATEWAYS = ("g1", "g2")
NODES = tuple((pool, f"n{number}") for pool in POOLS for number in (1, 2))


@dataclass
class LiveFabric:
    """The server, and a credential for each role: `provisioner`, `gateway-g1`, `worker-a-n1` and so on."""

    server: NatsServer
    log: Path
    credentials: Mapping[str, Credential]
    process: subprocess.Popen[bytes] = field(init=False)

    @classmethod
    def make(cls, folder: Path) -> LiveFabric:
        names = ["provisioner", *(f"gateway-{name}" for name in GATEWAYS), *(f"worker-{pool}-{node}" for pool, node in NODES)]
        credentials = {name: Credential.new(name) for name in names}
        return cls(NatsServer(folder, free_port()), folder / "nats.log", credentials)

    @classmethod
    @contextmanager
    def running(cls, folder: Path) -> Iterator[LiveFabric]:
        """Started, and stopped at the end; nothing is provisioned yet."""
        live = cls.make(folder)
        live.start()
        try:
            yield live
        finally:
            live.stop()

    def start(self, roles: Sequence[Role] | None = None) -> None:
        self.server.configure(self.roles() if roles is None else roles)
        self.process = self.server.start(self.log)

    def roles(self) -> list[Role]:
        credentials = self.credentials
        return [
            roles.provisioner(credentials["provisioner"]),
            *(roles.gateway(credentials[f"gateway-{name}"], name, tuple(POOLS)) for name in GATEWAYS),
            *(roles.worker(credentials[f"worker-{pool}-{node}"], pool, node) for pool, node in NODES),
        ]

    async def restart(self, seconds_down: float = 0.1) -> None:
        """What was in memory is gone, what was in files is not."""
        self.stop()
        await asyncio.sleep(seconds_down)  # everybody notices
        self.process = self.server.start(self.log)

    def stop(self) -> None:
        self.process.terminate()
        self.process.wait(10)

    async def connect(self, role: str) -> Connection:
        return await Connection.open(self.server.url, self.credentials[role])

    async def provision(self, *, ack_wait: float = ACK_WAIT) -> None:
        connection = await self.connect("provisioner")
        try:
            await provision(connection, POOLS, ack_wait=ack_wait)
        finally:
            await connection.close()

    async def queued(self, pool: str = "a") -> int:
        """How many messages are in the pool's queue."""
        connection = await self.connect("provisioner")
        info = await connection.jetstream.stream_info(subjects.work_stream(pool, subjects.DEFAULT_REGION))
        await connection.close()
        return info.state.messages

    async def gateway(self, name: str = "g1") -> NatsGateway:
        return await NatsGateway.connect(self.server.url, self.credentials[f"gateway-{name}"], name)

    async def worker(
        self,
        pool: str = "a",
        node: str = "n1",
        models: Sequence[str] = ("m1",),
        slots: int = 1,
        each: Mapping[str, int] | None = None,
    ) -> NatsWorker:
        credential = self.credentials[f"worker-{pool}-{node}"]
        return await NatsWorker.connect(self.server.url, credential, pool, node, models, slots=slots, each=each)


def sealed_bytes() -> bytes:
    """A sealed request's outer form with random insides: enough for a fabric, which opens nothing."""
    header = bytes.fromhex("01002000010002") + secrets.token_bytes(32)
    return header + b"\x00" + secrets.token_bytes(32)


def new_work(pool: str = "a", model: str = "m1", sealed: bytes | None = None) -> Work:
    sealed = sealed or sealed_bytes()
    return Work(secrets.token_hex(16), pool, model, SealedHeader.parse(sealed).digest, "a.grant.jws", sealed)
