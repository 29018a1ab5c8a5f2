"""A stolen credential speaks to a running site of two pools for as long as it likes. Slow: a process for each of its parts."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import pytest

import lacre
from hostile.attacks import attack
from lacre.runtime import tasks
from lacre_fabric.nats import roles, subjects
from lacre_fabric.nats.connection import Connection
from lacre_fabric.nats.kv import dump
from lacre_fabric.nats.revocations import revoke
from lacre_fabric.nats.roles import Role
from lacre_fabric.nats.servers import Servers
from lacre_fabric.operate import floods
from lacre_fabric.operate.dev_issuer import ISSUER
from lacre_fabric.work.revocations import Revocation, subject_key
from parts.stage import EchoStage, Kept
from parts.thief import Thief

SECONDS = 9.0  # that each credential is spoken with
GOES_ON = 8.0  # seconds for an answer: 3 are promised, and this machine does everything at once
NATS_MEMORY = 600 * 2**20  # bytes more than before
GATEWAY_MEMORY = 250 * 2**20
OTHERS = (
    f"cancel.a.{'0' * 32}", f"credit.b.{'0' * 32}", f"reply.a.g1.{'0' * 32}", f"reply.b.g1.{'0' * 32}", "presence.b.lacre.n1",
    "presence.a.lacre.n9", "$KV.budgets.gateway-g1.x", "$KV.revocations.provisioner", "$KV.claims_b.x", "$KV.trust.manifest",
    "work.b.lacre.ZWNobw", "_INBOX_gateway-g1.x", "$JS.API.STREAM.PURGE.KV_budgets", "$JS.API.STREAM.DELETE.WORK_b_lacre",
    "FABRIC.API.STREAM.DELETE.KV_revocations", "$SYS.REQ.SERVER.PING.VARZ", "$SYS.REQ.SERVER.PING",
)  # fmt: skip


class TwoPools(EchoStage):
    """Pools a and b; and a second gateway's credential, which is for pool a alone."""

    def more_roles(self) -> list[Role]:
        return [roles.gateway(self.site.credential("gateway-g2"), "g2", ("a",))]

    def role(self, name: str) -> Role:
        return next(role for role in [*self.site.roles(), *self.more_roles()] if role.credential.name == name)


@dataclass
class Asking:
    """Asks pool b again and again, as any client does: a 503 in the first moment of a flood is asked again. times: seconds each
    took.
    """

    site: TwoPools
    times: list[float] = field(default_factory=list)
    failed: list[str] = field(default_factory=list)

    async def run(self) -> None:
        url = self.site.site.connection_string(self.site.base_url)
        token = self.site.token("asker")
        async with lacre.AsyncClient(
            url, token=token, memory=lacre.VersionMemory(), transport=Kept(), shape="none", pool="b", resume=0
        ) as client:
            while True:
                began = time.monotonic()
                try:
                    async with asyncio.timeout(GOES_ON):
                        await client.chat("Mare Nostrum", max_tokens=8)
                except (lacre.LacreError, TimeoutError) as exc:
                    self.failed.append(f"{type(exc).__name__}: {exc}")
                self.times.append(time.monotonic() - began)
                await asyncio.sleep(0.3)


@pytest.fixture
async def two(tmp_path: Path) -> AsyncIterator[TwoPools]:
    site = TwoPools(tmp_path, pools=("a", "b"))
    watching = None
    try:
        await site.set_up()
        watched = partial(floods.watch, Servers.of(f"nats://127.0.0.1:{site.server.port}"), site.site.credential("warden"))
        watching = tasks.start("floods", watched, restart=floods.WATCHED)
        await site.start()
        yield site
    finally:
        if watching is not None:
            await watching.close()
        await site.close()


def memory(pid: int) -> int:
    """Bytes that the process has in memory."""
    return next(
        int(line.split()[1]) * 1024 for line in Path(f"/proc/{pid}/status").read_text().splitlines() if line.startswith("VmRSS")
    )


@pytest.mark.slow
@pytest.mark.timeout(300)
@pytest.mark.parametrize("stolen", ["worker-a-n1", "gateway-g2", "inspector"])
@attack("send everything that one credential may send, in odd forms, sizes and rates", "credential",
        "each pool has its own connection at the gateway; every buffer is bounded; floods are cut off",
        gain="its own pools' time")  # fmt: skip
async def test_a_stolen_credential(two: TwoPools, stolen: str) -> None:
    assert two.process is not None
    assert two.nats is not None
    before = memory(two.nats.pid), memory(two.process.pid)
    provisioner = await Connection.open(f"nats://127.0.0.1:{two.server.port}", two.site.credential("provisioner"))
    asking = Asking(two)
    running = asyncio.create_task(asking.run())
    await asyncio.sleep(2)
    books = await dump(provisioner, subjects.BUDGETS_BUCKET)
    most = before
    thief = Thief(two.server.port, two.role(stolen), OTHERS, SECONDS)
    thief.start()
    while thief.is_alive():
        await asyncio.sleep(0.2)
        most = max(most[0], memory(two.nats.pid)), max(most[1], memory(two.process.pid))
    await asyncio.sleep(2)
    running.cancel()
    await asyncio.gather(running, return_exceptions=True)
    grown = [(now - then) >> 20 for now, then in zip(most, before, strict=True)]
    print(
        f"{stolen}: {thief.said} batches on {thief.connections} connections; {len(asking.times)} questions to pool b, the "
        f"slowest {max(asking.times):.2f} s, {len(asking.failed)} refused; MiB more: nats-server {grown[0]}, gateway {grown[1]}"
    )
    assert asking.failed == []
    assert len(asking.times) > 5
    assert most[0] - before[0] < NATS_MEMORY
    assert most[1] - before[1] < GATEWAY_MEMORY
    after = await dump(provisioner, subjects.BUDGETS_BUCKET)
    assert {key for key in books if key.startswith("gateway-g1.user")} <= after.keys()
    token = two.token("left")
    assert not await _refused(two, token)
    await revoke(provisioner, Revocation(subject_key(ISSUER, "left"), time.time() + 600, time.time()))
    await two.until(lambda: _refused(two, token))
    await provisioner.close()


async def _refused(two: TwoPools, token: str) -> bool:
    url = two.site.connection_string(two.base_url)
    async with lacre.AsyncClient(
        url, token=token, memory=lacre.VersionMemory(), transport=Kept(), shape="none", pool="b", retries=0
    ) as client:
        try:
            await client.chat("Mare Nostrum", max_tokens=8)
        except lacre.Unauthenticated:
            return True
    return False
