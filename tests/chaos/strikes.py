"""Carries a schedule out: each strike at its time, and undone when it has lasted. What was done, and when, is kept."""

from __future__ import annotations

import asyncio
import contextlib
import signal
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Final

from chaos.echo_worker import POOL
from chaos.schedule import Kind, Strike
from chaos.stage import PLANS, EchoWorker, Stage
from lacre.errors import LacreError
from lacre_fabric.nats import subjects
from lacre_fabric.operate import rotation
from lacre_gateway.budget.plans import PLANS_FILE
from parts.small_disk import filled

GRACE: Final = 15.0  # seconds that a key which was replaced is still listed
TAKEN_UP: Final = 10.0  # seconds for workers to take up a new key
ROTATION_TRIES: Final = 10


@dataclass
class Strikes:
    """done: by kind. failed: what could not be done and why, such as a rotation while no message server has a leader."""

    stage: Stage
    done: dict[Kind, int] = field(default_factory=dict)
    failed: list[str] = field(default_factory=list)
    _filling: asyncio.Lock = field(default_factory=asyncio.Lock)

    async def run(self, schedule: Sequence[Strike], began: float) -> None:
        """began: on the monotonic clock. Ends when the last one is undone."""
        impossible = self.stage.why_not()
        async with asyncio.TaskGroup() as group:
            for strike in schedule:
                if strike.kind in impossible:
                    continue
                await asyncio.sleep(max(0.0, began + strike.at - time.monotonic()))
                group.create_task(self._strike(strike, began))

    async def _strike(self, strike: Strike, began: float) -> None:
        print(
            f"{time.monotonic() - began:7.1f} s  {strike.kind} {strike.target} {strike.lasting} {strike.skew or ''}", flush=True
        )
        match strike.kind:
            case "kill-gateway" | "kill-worker" | "kill-server":
                await self._kill(strike.target, strike.lasting)
            case "stop-gateway" | "stop-worker" | "stop-server":
                await self._stop(strike.target, strike.lasting)
            case "leader":
                await self._kill(await self._leader(), strike.lasting)
            case "partition":
                self.stage.network.cut(strike.target)
                await asyncio.sleep(strike.lasting)
                self.stage.network.mend(strike.target)
            case "skew":
                worker = self.stage.workers[strike.target]
                assert isinstance(worker, EchoWorker)
                worker.skew(strike.skew)
                await asyncio.sleep(strike.lasting)
                worker.skew(0.0)
            case "disk":
                assert self.stage.disk is not None
                async with self._filling:  # a disk that is full still is filled again when it is free
                    with filled(self.stage.disk):
                        await asyncio.sleep(strike.lasting)
            case "keys":
                if not await self._rotate():
                    return  # what did not happen is not counted
            case "policies":
                self._rewrite()
        self.done[strike.kind] = self.done.get(strike.kind, 0) + 1

    async def _kill(self, name: str, lasting: float) -> None:
        """It may be stopped: that makes no difference to SIGKILL. One that is away already stays so."""
        if name in self.stage.held:
            return
        part = self.stage.parts[name]
        self.stage.held.add(name)
        self.stage.killed.add(name)
        part.process.kill()
        await asyncio.to_thread(part.process.wait)
        await asyncio.sleep(lasting)
        part.start()
        self.stage.held.discard(name)

    async def _stop(self, name: str, lasting: float) -> None:
        process = self.stage.parts[name].process
        process.send_signal(signal.SIGSTOP)
        await asyncio.sleep(lasting)
        process.send_signal(signal.SIGCONT)

    async def _leader(self) -> str:
        """The server that leads the pool's queue now; any where nobody knows."""
        with contextlib.suppress(LacreError):
            async with self.stage.connected() as connection, connection.mapped():
                cluster = (await connection.jetstream.stream_info(subjects.work_stream(POOL, subjects.DEFAULT_REGION))).cluster
                if cluster is not None and cluster.leader:
                    return cluster.leader
        return next(iter(self.stage.servers))

    async def _rotate(self) -> bool:
        """New keys, and an end to those whose grace is over; tried again, as `upkeep` does, while servers have no leader."""
        for _ in range(ROTATION_TRIES):
            try:
                async with self.stage.connected() as connection:
                    await rotation.rotate(self.stage.site, connection, POOL, grace=GRACE, wait=TAKEN_UP)
                    await rotation.retire(self.stage.site, connection, wait=0.0)
                    return True
            except LacreError as exc:
                self.failed.append(f"keys: {exc}")
                await asyncio.sleep(1.0)
        return False

    def _rewrite(self) -> None:
        """Other bytes, and the same limits: replaced at once, as an operator's tools do."""
        path = self.stage.policies / PLANS_FILE
        fresh = path.with_suffix(".new")
        fresh.write_text(f"# version {time.time_ns()}\n{PLANS}")
        fresh.replace(path)
