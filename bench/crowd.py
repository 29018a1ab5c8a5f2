"""The workers of `bench/scale.py`: each has one slot, a connection, presence, pulls, claims and beats.

They use the fabric's own `NatsWorker`; only the model is missing. An answer is a first record at once, a pause of one service
time, a last record, and a receipt by the pool's key. `python -m bench.crowd TASK`, where TASK is JSON: see `Task`.

It reads lines of JSON from standard input: the new number of workers (`Shift`). It answers each with a line about the time
since the line before.
"""

from __future__ import annotations

import asyncio
import json
import random
import statistics
import sys
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import uvloop

from lacre.evidence.receipts import Receipt
from lacre.jose.jws import b64u
from lacre_fabric.keys.secret_files import read_ed25519
from lacre_fabric.nats.delivery import NatsDelivery
from lacre_fabric.nats.roles import Credential
from lacre_fabric.nats.worker import NatsWorker
from lacre_fabric.work.contract import BEAT, Cancelled, FabricUnavailable
from lacre_fabric.work.frames import FrameKind

RECORD = b"\xa5" * 512  # no record looks like the end of a chunked answer
SPREAD = 0.8  # of the logarithm of a service time: its squared coefficient of variation is e^(0.8²) − 1 = 0.90


@dataclass(frozen=True, slots=True)
class Task:
    url: str
    credential: str
    receipt_key: str
    pool: str
    model: str


@dataclass(frozen=True, slots=True)
class Shift:
    """workers: how many from now on. service: mean seconds that an answer takes."""

    workers: int
    service: float


class Crowd:
    def __init__(self, task: Task) -> None:
        self._task = task
        self._credential = Credential.load(Path(task.credential))
        self._key = read_ed25519(Path(task.receipt_key))
        self._random = random.Random(1)
        self._workers: list[asyncio.Task[None]] = []
        self._service = 0.1
        self._times: list[float] = []

    async def change(self, shift: Shift) -> dict[str, float]:
        """Returns the figures since the last change, then sets the number of workers. The newest leave first."""
        times, self._times, self._service = self._times, [], shift.service
        leaving, self._workers = self._workers[shift.workers :], self._workers[: shift.workers]
        for worker in leaving:
            worker.cancel()
        await asyncio.gather(*leaving, return_exceptions=True)
        first = len(self._workers)
        fabrics = await asyncio.gather(*(self._join(number) for number in range(first, shift.workers)))
        self._workers += [asyncio.create_task(self._work(fabric)) for fabric in fabrics]
        mean = statistics.fmean(times) if times else 0.0
        variation = statistics.pvariance(times) / mean**2 if len(times) > 1 else 0.0
        return {"served": len(times), "service": mean, "variation": variation}

    async def _join(self, number: int) -> NatsWorker:
        task = self._task
        return await NatsWorker.connect(task.url, self._credential, task.pool, f"w{number}", [task.model], slots=1)

    async def _work(self, fabric: NatsWorker) -> None:
        try:
            while True:
                delivery = await fabric.pull()
                began = time.perf_counter()
                try:
                    await self._answer(delivery)
                    self._times.append(time.perf_counter() - began)
                finally:
                    fabric.release()
        finally:
            await fabric.close()

    async def _answer(self, delivery: NatsDelivery) -> None:
        beating = asyncio.create_task(_beat(delivery))
        try:
            with suppress(Cancelled, FabricUnavailable):
                began = time.time()
                if await delivery.claim():
                    await delivery.send(FrameKind.DATA, RECORD)
                    await asyncio.sleep(self._service * self._random.lognormvariate(-(SPREAD**2) / 2, SPREAD))
                    await delivery.send(FrameKind.DATA, RECORD)
                    digest = b64u(delivery.work.digest)
                    receipt = Receipt(digest, "sha256:00", 64, 0, 2, began, time.time(), final=True)
                    await delivery.send(FrameKind.USAGE, receipt.sign(self._key).encode())
        finally:
            beating.cancel()
            await delivery.drop()


async def _beat(delivery: NatsDelivery) -> None:
    while True:
        await asyncio.sleep(BEAT)
        await delivery.send(FrameKind.BEAT, b"")


async def main(task: Task) -> None:
    crowd, loop = Crowd(task), asyncio.get_running_loop()
    reader = asyncio.StreamReader()
    await loop.connect_read_pipe(lambda: asyncio.StreamReaderProtocol(reader), sys.stdin)
    while line := await reader.readline():
        print(json.dumps(await crowd.change(Shift(**json.loads(line)))), flush=True)


if __name__ == "__main__":
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(main(Task(**json.loads(sys.argv[1]))))
