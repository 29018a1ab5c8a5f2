"""A real nats-server with every role provisioned, for tests: started once, ended with the session."""

from __future__ import annotations

import asyncio
import json
import secrets
import subprocess
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Iterator, Mapping, Sequence
from contextlib import AsyncExitStack, asynccontextmanager, contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol, TypeVar

from lacre.runtime import tasks
from lacre.wire.header import SealedHeader
from lacre_fabric.nats import roles, subjects
from lacre_fabric.nats.connection import Connection
from lacre_fabric.nats.gateway import NatsGateway
from lacre_fabric.nats.provisioning import provision
from lacre_fabric.nats.roles import Credential, Role
from lacre_fabric.nats.worker import NatsWorker
from lacre_fabric.operate.nats_server import NatsServer, free_port
from lacre_fabric.work.contract import ACK_WAIT, Dispatch, FabricError, Work
from lacre_fabric.work.frames import FrameKind
from parts.frames import frames_of
from parts.stolen_nats import StolenNats

POOLS = {"a": ("m1", "m2"), "b": ("m1",)}
GATEWAYS = ("g1", "g2")
NODES = tuple((pool, f"n{number}") for pool in POOLS for number in (1, 2))


@dataclass
class LiveFabric:
    """The server, and a credential for each role: `provisioner`, `gateway-g1`, `worker-a-n1` and so on."""

    server: NatsServer
    log: Path
    credentials: Mapping[str, Credential]
    given: Sequence[Role] | None = None  # in place of those of POOLS and GATEWAYS
    process: subprocess.Popen[bytes] = field(init=False)

    @classmethod
    def make(cls, folder: Path) -> LiveFabric:
        names = ["provisioner", *(f"gateway-{name}" for name in GATEWAYS), *(f"worker-{pool}-{node}" for pool, node in NODES)]
        credentials = {name: Credential.new(name) for name in names}
        return cls(NatsServer(folder, free_port()), folder / "nats.log", credentials)

    @classmethod
    @contextmanager
    def running(cls, folder: Path, given: Sequence[Role] | None = None, **how: Any) -> Iterator[LiveFabric]:
        """Started as `start` does it, and stopped at the end; nothing is provisioned yet."""
        live = cls.make(folder)
        if given is not None:
            live = cls(live.server, live.log, {role.credential.name: role.credential for role in given}, given)
        live.start(**how)
        try:
            yield live
        finally:
            live.stop()

    def start(
        self,
        as_role: Callable[[Role], Role] = lambda role: role,
        change: Callable[[dict[str, Any]], object] | None = None,
    ) -> None:
        """as_role: what is made of each role. change: what is done to the server's configuration."""
        self.server.configure([as_role(role) for role in self.roles()])
        if change is not None:
            path = self.log.with_name("nats.conf")
            config = json.loads(path.read_text())
            change(config)
            path.write_text(json.dumps(config))
        self.process = self.server.start(self.log)

    def roles(self) -> list[Role]:
        if self.given is not None:
            return list(self.given)
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
        **options: Any,
    ) -> NatsWorker:
        credential = self.credentials[f"worker-{pool}-{node}"]
        return await NatsWorker.connect(self.server.url, credential, pool, node, models, slots=slots, **options)


class Closable(Protocol):
    async def close(self) -> None: ...


End = TypeVar("End", bound=Closable)


@dataclass
class Kept:
    """What is opened or begun here is closed or ended with the stack."""

    stack: AsyncExitStack

    async def kept(self, opening: Awaitable[End]) -> End:
        end = await opening
        self.stack.push_async_callback(end.close)
        return end

    def background(self, work: Coroutine[Any, Any, object]) -> None:
        self.stack.push_async_callback(tasks.end, tasks.spawn("of a test", work))


@dataclass
class Parties(Kept):
    """Who is connected to one server."""

    live: LiveFabric

    @classmethod
    @asynccontextmanager
    async def of(cls, live: LiveFabric) -> AsyncIterator[Parties]:
        async with AsyncExitStack() as stack:
            yield cls(stack, live)

    async def connect(self, role: str = "provisioner") -> Connection:
        return await self.kept(self.live.connect(role))

    async def gateway(self, name: str = "g1") -> NatsGateway:
        return await self.kept(self.live.gateway(name))

    async def worker(self, pool: str = "a", node: str = "n1", **options: Any) -> NatsWorker:
        return await self.kept(self.live.worker(pool, node, **options))

    async def stolen(self, role: str) -> StolenNats:
        """A raw connection with the role's credential."""
        return await self.kept(StolenNats.open(self.live.server.port, self.live.credentials[role]))


async def answer(worker: NatsWorker, *pieces: bytes) -> Work:
    """Pulls a request and answers it, with `x` where no pieces are given."""
    async with asyncio.timeout(15):
        delivery = await worker.pull()
        assert await delivery.claim()
        for piece in pieces or (b"x",):
            await delivery.send(FrameKind.DATA, piece)
        await delivery.send(FrameKind.USAGE, b"receipt")
        await delivery.drop()
        worker.release()
    return delivery.work


async def work(worker: NatsWorker) -> None:
    """Answers one request after the other, with `x`."""
    while True:
        try:
            delivery = await worker.pull()
        except FabricError:
            await asyncio.sleep(0.1)
            continue
        with suppress(FabricError):  # another attempt has it then
            if await delivery.claim():
                await delivery.send(FrameKind.DATA, b"x")
                await delivery.send(FrameKind.USAGE, b"")
        await delivery.drop()
        worker.release()


async def read(dispatch: Dispatch) -> list[bytes]:
    """The answer's payloads, the receipt last."""
    payloads = []
    async for frame in frames_of(dispatch):
        payloads.append(frame.payload)
        await dispatch.consumed(len(frame.payload))
    return payloads


async def ask_once(gateway: NatsGateway, **options: Any) -> str:
    """`whole` for what `work` answers, or what else came. Raises FabricError."""
    frames = await read(await gateway.dispatch(new_work(), **options))
    return "whole" if frames == [b"x", b""] else f"answered with {frames}"


def sealed_bytes() -> bytes:
    """A sealed request's outer form with random insides: enough for a fabric, which opens nothing."""
    header = bytes.fromhex("01002000010002") + secrets.token_bytes(32)
    return header + b"\x00" + secrets.token_bytes(32)


def new_work(pool: str = "a", model: str = "m1", sealed: bytes | None = None) -> Work:
    sealed = sealed or sealed_bytes()
    return Work(secrets.token_hex(16), pool, model, SealedHeader.parse(sealed).digest, "a.grant.jws", sealed, gateway="g1")
