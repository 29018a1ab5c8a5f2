"""Poisson arrivals at the gateway, in a process of its own: requests come at random and do not wait for earlier ones.

It reads one task from standard input and writes its figures to standard output, both JSON. Connections of `bench/load.py` wait
for their answers. This load does not slow down when the pool is full, so a queue builds up.
"""

from __future__ import annotations

import asyncio
import json
import random
import statistics
import sys
import time
from dataclasses import asdict, dataclass, field
from typing import Any

import uvloop

from bench.load import HEAD_END, LAST_CHUNK, requests
from bench.load import Task as Bodies

Streams = tuple[asyncio.StreamReader, asyncio.StreamWriter]


@dataclass(frozen=True, slots=True)
class Task:
    """bodies: what to send (`bench/load.py`). rate: a second. seconds: how long. seed: of the arrivals."""

    bodies: dict[str, Any]
    rate: float
    seconds: float
    seed: int = 1


@dataclass(slots=True)
class Arrivals:
    """first: seconds to the first byte of each answer, by when it was asked for. refused: answers that are not 200."""

    task: Task
    first: list[tuple[float, float]] = field(default_factory=list)
    refused: int = 0

    async def run(self) -> dict[str, Any]:
        bodies, chance = Bodies(**self.task.bodies), random.Random(self.task.seed)
        sealed, idle = requests(bodies), list[Streams]()
        began = due = time.perf_counter()
        async with asyncio.TaskGroup() as asking:
            while (due := due + chance.expovariate(self.task.rate)) < began + self.task.seconds:
                await asyncio.sleep(due - time.perf_counter())
                request, _ = next(sealed)
                asking.create_task(self._ask(bodies.port, idle, request, began))
        waits = [wait for _, wait in self.first]
        return {
            "requests": len(waits), "refused": self.refused, "rate": len(waits) / self.task.seconds,
            "mean_ms": statistics.fmean(waits) * 1e3, "first": sorted(self.first),
        }  # fmt: skip

    async def _ask(self, port: int, idle: list[Streams], request: bytes, began: float) -> None:
        asked = time.perf_counter()
        reader, writer = idle.pop() if idle else await asyncio.open_connection("127.0.0.1", port)
        writer.write(request)
        head = await reader.readuntil(HEAD_END)
        self.first.append((asked - began, time.perf_counter() - asked))
        if head[9:12] != b"200":
            self.refused += 1
            writer.close()
            return
        await reader.readuntil(LAST_CHUNK)
        idle.append((reader, writer))


def task(bodies: Bodies, rate: float, seconds: float, seed: int = 1) -> Task:
    return Task(asdict(bodies), rate, seconds, seed)


if __name__ == "__main__":
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        print(json.dumps(runner.run(Arrivals(Task(**json.loads(sys.stdin.readline()))).run())), flush=True)
