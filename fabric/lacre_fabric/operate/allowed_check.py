"""Tries what gateways and workers must be allowed: one request of no model, from the queue to the answer.

Rules:
- It uses a model name of its own, with a consumer of its own: no worker pulls its message, and it pulls no one's work.
- Everything is undone: the message is acked and so deleted, the consumer is deleted, or NATS removes it after `_GONE` seconds.
  Three entries cannot be deleted by anyone: a claim and a revocation expire, and an empty lease has one fixed key.
- One step that fails does not end the others, unless they need its result.
"""

from __future__ import annotations

import asyncio
import secrets
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from dataclasses import dataclass, field
from typing import Final

import nats.errors
from nats.js.api import AckPolicy, ConsumerConfig, Header

from lacre.errors import LacreError
from lacre.jose.jws import b64u
from lacre_fabric.nats import subjects
from lacre_fabric.nats.connection import Connection
from lacre_fabric.nats.kv import NatsBucket
from lacre_fabric.nats.revocations import revoke
from lacre_fabric.nats.roles import Credential
from lacre_fabric.nats.servers import Servers
from lacre_fabric.nats.worker import try_claim
from lacre_fabric.operate.fabric_check import FabricFinding, Severity
from lacre_fabric.work.contract import FabricUnavailable
from lacre_fabric.work.revocations import Revocation

_GONE: Final = 60.0  # seconds without use after which NATS deletes the consumer, if this process cannot
_LIVES: Final = 10  # seconds that the message waits in its queue, if nobody takes it
_ANSWER: Final = 3.0  # seconds for a message between two connections
_KEY: Final = "check-nobody"  # of the lease: no tenant or user has this key
_REMEDY: Final = "configure the servers with exactly what `lacre fabric accounts` prints, then run `lacre manifest publish`"


@dataclass(slots=True)
class _Tried:
    """One pool in one region. faults: of each role, in words."""

    pool: str
    region: str
    provisioner: Connection
    gateway: Connection
    worker: Connection
    faults: dict[str, list[str]] = field(default_factory=lambda: {"gateway": [], "worker": []})

    async def step(self, role: str, what: str, action: Callable[[], Awaitable[object]]) -> bool:
        """Whether it worked."""
        try:
            await action()
        except LacreError as exc:
            self.faults[role].append(f"it cannot {what}: {exc}")
            return False
        return True


async def check_allowed(
    servers: Servers, pools: Sequence[str], credentials: Mapping[str, Credential], regions: Sequence[str]
) -> list[FabricFinding]:
    """credentials: as `fabric_check.inspect` takes them. It skips pools whose workers' credential is missing."""
    found = []
    for region in regions:
        mark = "" if region == subjects.DEFAULT_REGION else f"@{region}"
        for pool in pools:
            roles = f"gateway{mark}", f"worker-{pool}{mark}"
            if all(role in credentials for role in roles):
                tried = await _place(servers, pool, region, credentials, roles)
                if any(finding.verdict is not Severity.OK for finding in tried):  # a provisioner may have deleted the consumer
                    tried = await _place(servers, pool, region, credentials, roles)
                found += tried
    return found


async def _place(
    servers: Servers, pool: str, region: str, credentials: Mapping[str, Credential], roles: tuple[str, str]
) -> list[FabricFinding]:
    try:
        async with AsyncExitStack() as stack:
            connections = []
            for role in ("provisioner", *roles):
                connections.append(await Connection.open(servers, credentials[role]))
                stack.push_async_callback(connections[-1].close)
            provisioner, gateway, worker = connections
            tried = _Tried(pool, region, provisioner, gateway, worker)
            await _request(tried)
            await _gateway(tried)
            await _worker(tried)
    except LacreError as exc:
        return [FabricFinding(f"allowed {roles[1]}", Severity.WRONG, str(exc), _REMEDY)]
    told = zip((f"{roles[0]} for {pool}", roles[1]), tried.faults.values(), strict=True)
    return [
        FabricFinding(f"allowed {name}", Severity.WRONG, "; ".join(faults), _REMEDY)
        if faults
        else FabricFinding(f"allowed {name}", Severity.OK, "it may do all that it must")
        for name, faults in told
    ]


async def _request(tried: _Tried) -> None:
    """Queue, pull, ack, answer."""
    model = f"check-{secrets.token_hex(8)}"
    request = secrets.token_hex(16)
    subject = subjects.work(tried.pool, tried.region, model)
    async with _consumer(tried, model):
        if await tried.step("gateway", "queue work", lambda: _publish(tried.gateway, subject)):
            await tried.step("worker", "pull work", lambda: _pull(tried, model))
    await tried.step("worker", "answer", lambda: _answer(tried, request))


@asynccontextmanager
async def _consumer(tried: _Tried, model: str) -> AsyncIterator[None]:
    js, stream = tried.provisioner.jetstream, subjects.work_stream(tried.pool, tried.region)
    name = subjects.consumer(model)
    wanted = ConsumerConfig(
        durable_name=name, filter_subject=subjects.work(tried.pool, tried.region, model), ack_policy=AckPolicy.EXPLICIT,
        inactive_threshold=_GONE,
    )  # fmt: skip
    async with tried.provisioner.mapped():
        await js.add_consumer(stream, wanted)
    try:
        yield
    finally:
        with suppress(nats.errors.Error):  # another run of the provisioner has deleted it, or NATS will
            await js.purge_stream(stream, subject=wanted.filter_subject)
            await js.delete_consumer(stream, name)


async def _publish(gateway: Connection, subject: str) -> None:
    async with gateway.mapped():
        await gateway.jetstream.publish(subject, b"", headers={Header.MSG_TTL.value: str(_LIVES)}, timeout=_ANSWER)


async def _pull(tried: _Tried, model: str) -> None:
    stream = subjects.work_stream(tried.pool, tried.region)
    async with tried.worker.mapped(confirmed=True):
        pull = await tried.worker.jetstream.pull_subscribe_bind(consumer=subjects.consumer(model), stream=stream)
        [message] = await pull.fetch(1, timeout=_ANSWER)
        await message.ack()
        await pull.unsubscribe()


async def _answer(tried: _Tried, request: str) -> None:
    """A frame of no request: a gateway that runs ignores it."""
    heard, gateway_id = asyncio.Event(), tried.gateway.credential.name.removeprefix("gateway-")

    def come(_subject: str, _block: bytes, _payload: bytes) -> bool:
        heard.set()
        return True

    subject = subjects.reply(tried.pool, gateway_id, request)
    async with tried.gateway.mapped(confirmed=True):
        subscription = await tried.gateway.client.subscribe_directly(subject, come)
    async with tried.worker.mapped(confirmed=True):
        await tried.worker.client.publish(subject, b"")
    try:
        async with asyncio.timeout(_ANSWER):
            await heard.wait()
    except TimeoutError as exc:
        raise FabricUnavailable("the gateway does not receive it") from exc
    finally:
        await subscription.unsubscribe()


async def _gateway(tried: _Tried) -> None:
    gateway = tried.gateway

    async def lease() -> None:
        bucket = NatsBucket(gateway, subjects.BUDGETS_BUCKET)
        before = await bucket.read(_KEY)
        await bucket.write(_KEY, b"", 0 if before is None else before.revision)

    async def count() -> None:
        async with gateway.mapped():
            await gateway.ask(f"STREAM.INFO.{subjects.work_stream(tried.pool, tried.region)}", {})

    async def withdraw() -> None:
        stream = subjects.work_stream(tried.pool, tried.region)
        async with gateway.mapped():
            ack = await gateway.jetstream.publish(
                subjects.work(tried.pool, tried.region, _KEY), b"", headers={Header.MSG_TTL.value: str(_LIVES)}
            )
            await gateway.jetstream.delete_msg(stream, ack.seq)

    await tried.step("gateway", "read the manifest", gateway.manifest)
    await tried.step("gateway", "write a lease", lease)
    await tried.step("gateway", "count its queue", count)
    await tried.step("gateway", "withdraw work", withdraw)
    key = b64u(secrets.token_bytes(32))
    await tried.step("gateway", "revoke", lambda: revoke(gateway, Revocation(key, time.time() + 2)))
    request = secrets.token_hex(16)
    await tried.step("gateway", "cancel work", lambda: _say(gateway, subjects.cancel(tried.pool, request)))
    await tried.step("gateway", "give credit", lambda: _say(gateway, subjects.credit(tried.pool, request)))


async def _worker(tried: _Tried) -> None:
    await tried.step("worker", "read the manifest", tried.worker.manifest)
    await tried.step("worker", "claim a request", lambda: try_claim(tried.worker, tried.pool))


async def _say(connection: Connection, subject: str) -> None:
    async with connection.mapped(confirmed=True):
        await connection.client.publish(subject, b"")
