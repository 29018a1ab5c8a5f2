"""A gateway and its fabric with 1 to 64 workers: the cost of a request, the time in the queue, and when to add workers.

One gateway process runs with everything on (`bench/stand.py`). The workers are those of `bench/crowd.py`, one slot each.
Requests come at random (`bench/arrivals.py`), at one rate for any number of workers. With more workers, answers take longer,
so each pool is about equally busy.

- `cpu_us_per_request_wN`: CPU time of the gateway's process, presence of N workers included. `cpu_spread` is the largest over
  the smallest, less one: the goal is at most 0.1.
- `nats_cpu_us_per_request_wN`: the same of nats-server. `kv_same_key_per_s`: how many leases a second can be drawn from one
  budget. `kv_updates_per_s`: from eight at once. Their bucket is always synced.
- `queue_per_s`: works a second through one pool's work queue: published, acknowledged, pulled, acknowledged again. One process
  publishes and pulls, 64 at a time. `queue_nats_cpu_us`: the CPU time of nats-server for one.
- `commits_per_s`: commits a second of one audit log on this disk, of one entry each. `commit_entries_per_s`: entries a second
  in the largest groups that a commit takes. `sync_ms`: one sync of a file on this disk.
- `wait_wN_ms`, `expected_wN_ms`: the mean wait for a slot, beside M/G/k's expectation for the measured rate and service times
  (`bench/queueing.py`). The wait is the time to the first byte, less that of an empty pool.
- `scaled_after_s`: a pool of 4 workers gets three times the load that it can carry. Each second a rule reads the gateway's
  metric `lacre_pool_demand` and asks for workers, at most twice the present number. They come 3 seconds later. The figure is
  the time until no request waits longer than one service time.
- `scaled_to`: the workers that this took. `scaled_worst_ms`: the longest wait. `scaled_needed`: the least possible number of
  workers.
"""

from __future__ import annotations

import asyncio
import itertools
import json
import os
import re
import statistics
import subprocess
import sys
import tempfile
import threading
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from bench import arrivals, command
from bench.audit_years import entries_of
from bench.crowd import Shift, Task
from bench.queueing import mean_wait, wanted
from bench.stand import MODEL, POOL, ROOT, Stand, ended, stand, usage
from lacre_fabric.nats import subjects
from lacre_fabric.nats.connection import Connection
from lacre_fabric.nats.kv import NatsBucket
from lacre_fabric.nats.subjects import BUDGETS_BUCKET, DEFAULT_REGION
from lacre_fabric.nats.worker import PULL
from lacre_fabric.operate.site import GATEWAY_ID
from lacre_gateway.audit.entries import STARTED, Event, encode
from lacre_gateway.audit.journal import MAX_GROUP
from lacre_gateway.audit.store import Store

WORKERS = (1, 4, 16, 64)
RATE, BUSY = 30.0, 0.7
IDLE_RATE = 5.0  # where nobody waits
ABREAST, WAITING = 64, 256  # works in flight to the queue, and in it at most
STEP, CAPACITY_AT_FIRST, TARGET = 3.0, 4, 0.8
LOOK, START = 1.0, 3.0  # seconds between looks at the demand; and until a worker that was asked for is there
_DEMAND = re.compile(rf'^lacre_pool_demand{{pool="{POOL}",region="{DEFAULT_REGION}"}} ([0-9.]+)', re.MULTILINE)


class Workers:
    """The crowd's process. `shift` may be called from one thread at a time."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self._process = process

    def shift(self, workers: int, service: float) -> dict[str, float]:
        """Sets the number of workers; returns the figures since the last change."""
        assert self._process.stdin is not None and self._process.stdout is not None
        print(json.dumps(asdict(Shift(workers, service))), file=self._process.stdin, flush=True)
        return dict(json.loads(self._process.stdout.readline()))


@contextmanager
def crowd(served: Stand) -> Iterator[Workers]:
    task = Task(
        url=served.nats_url,
        credential=str(served.site.credential_file(f"worker-{POOL}")),
        receipt_key=str(served.site.receipt_file(POOL)),
        pool=POOL,
        model=MODEL,
    )
    command_line = [sys.executable, "-m", "bench.crowd", json.dumps(asdict(task))]
    process = subprocess.Popen(command_line, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    with ended(process):
        yield Workers(process)


def arrive(served: Stand, rate: float, seconds: float) -> dict[str, Any]:
    task = arrivals.task(served.load(2**10, 1, models=(MODEL,), reopen=0), rate, seconds)
    done = subprocess.run(
        [sys.executable, "-m", "bench.arrivals"], input=json.dumps(asdict(task)) + "\n", cwd=ROOT, stdout=subprocess.PIPE,
        text=True, check=True,
    )  # fmt: skip
    return dict(json.loads(done.stdout))


def steady(served: Stand, workers: Workers, count: int, seconds: float) -> command.Figures:
    """So many workers, busy for 80 % of the time."""
    service = BUSY * count / RATE
    workers.shift(count, service)
    time.sleep(1.5)  # until the gateway knows the new workers and those that left
    empty = statistics.median(wait for _, wait in arrive(served, IDLE_RATE, 4)["first"])
    workers.shift(count, service)
    before, nats_before = usage(served.process.pid).cpu, usage(served.nats.pid).cpu
    found = arrive(served, RATE, seconds)
    cpu, nats_cpu = usage(served.process.pid).cpu - before, usage(served.nats.pid).cpu - nats_before
    did = workers.shift(count, service)
    assert found["refused"] == 0, f"{found['refused']} of {found['requests']} were refused"
    return {
        f"cpu_us_per_request_w{count}": cpu / found["requests"] * 1e6,
        f"nats_cpu_us_per_request_w{count}": nats_cpu / found["requests"] * 1e6,
        f"wait_w{count}_ms": found["mean_ms"] - empty * 1e3,
        f"expected_w{count}_ms": mean_wait(count, found["rate"], did["service"], did["variation"]) * 1e3,
        f"busy_w{count}": found["rate"] * did["service"] / count,
    }


def scaled(served: Stand, workers: Workers, seconds: float) -> command.Figures:
    """A pool that gets three times what it can do, and a rule that adds workers by what the gateway's metric says."""
    service = STEP * CAPACITY_AT_FIRST / RATE
    workers.shift(CAPACITY_AT_FIRST, service)
    time.sleep(1.5)
    over, peak = threading.Event(), [CAPACITY_AT_FIRST]

    def rule() -> None:
        count = CAPACITY_AT_FIRST
        while not over.wait(LOOK):
            asked = min(wanted(demand(served), 1, TARGET), 2 * count)
            if asked > count and not over.wait(START):
                workers.shift(asked, service)
                count = peak[0] = asked

    thread = threading.Thread(target=rule)
    thread.start()
    found = arrive(served, RATE, seconds)
    over.set()
    thread.join()
    late = [asked for asked, wait in found["first"] if wait > service]
    return {
        "scaled_after_s": max(late, default=0.0),
        "scaled_to": float(peak[0]),
        "scaled_needed": RATE * service,
        "scaled_worst_ms": max(wait for _, wait in found["first"]) * 1e3,
        "scaled_refused": float(found["refused"]),
    }


async def leases(served: Stand, seconds: float) -> command.Figures:
    """Updates a second of the budgets' bucket, each after the one before it of the same key: of one key, and of eight."""
    connection = await Connection.open(served.nats_url, served.site.credential(f"gateway-{GATEWAY_ID}"))
    bucket = NatsBucket(connection, BUDGETS_BUCKET)

    async def draw(key: str) -> int:
        count, until = 0, time.perf_counter() + seconds
        revision = await bucket.write(key, b"0", 0)
        while time.perf_counter() < until:
            revision, count = await bucket.write(key, b"%d" % count, revision), count + 1
        return count

    try:
        return {
            "kv_same_key_per_s": await draw("bench.one") / seconds,
            "kv_updates_per_s": sum(await asyncio.gather(*(draw(f"bench.{number}") for number in range(8)))) / seconds,
        }
    finally:
        await connection.close()


async def queued(served: Stand, seconds: float) -> command.Figures:
    """Works of 1.3 KiB through the queue of one model. No other worker may pull from it."""
    gateway = await Connection.open(served.nats_url, served.site.credential(f"gateway-{GATEWAY_ID}"))
    worker = await Connection.open(served.nats_url, served.site.credential(f"worker-{POOL}"))
    subject, stream = subjects.work(POOL, DEFAULT_REGION, MODEL), subjects.work_stream(POOL, DEFAULT_REGION)
    pull = await worker.jetstream.pull_subscribe_bind(consumer=subjects.consumer(MODEL), stream=stream)
    until, work, published, pulled = time.perf_counter() + seconds, bytes(1300), 0, 0

    async def publish() -> None:
        nonlocal published
        while time.perf_counter() < until:
            if published - pulled >= WAITING:
                await asyncio.sleep(0.001)
                continue
            published += 1
            await gateway.jetstream.publish(subject, work)

    async def take() -> None:
        nonlocal pulled
        while True:
            for message in await pull.fetch(ABREAST, timeout=seconds):
                await message.ack()
                pulled += 1

    try:
        before, began = usage(served.nats.pid).cpu, time.perf_counter()
        taking = asyncio.create_task(take())
        try:
            await asyncio.gather(*(publish() for _ in range(ABREAST)))
        finally:
            taking.cancel()
            await asyncio.gather(taking, return_exceptions=True)
        took, cpu, done = time.perf_counter() - began, usage(served.nats.pid).cpu - before, pulled
        return {"queue_per_s": done / took, "queue_nats_cpu_us": cpu / done * 1e6}
    finally:
        await gateway.close()
        await worker.close()


def committed(folder: Path, seconds: float) -> command.Figures:
    """One audit log, on the disk of the temporary files, published as a busy gateway does it."""
    store = Store(folder / "audit", Ed25519PrivateKey.generate(), "bench.example/audit")
    store.commit(encode(Event(time=time.time(), event=STARTED)))
    figures: command.Figures = {}
    for name, size in (("commits_per_s", 1), ("commit_entries_per_s", MAX_GROUP)):
        group = [entry for number in range(size) for entry in itertools.islice(entries_of(number), 1)]
        count, until = 0, time.perf_counter() + seconds
        while time.perf_counter() < until:
            store.commit(group)
            count += len(group)
            if store.unpublished >= 64 * MAX_GROUP:
                store.published(store.publication(()).write())
        figures[name] = count / seconds
    store.close()
    with (folder / "synced").open("wb", buffering=0) as file:
        times = []
        for _ in range(200):
            file.write(bytes(1000))
            began = time.perf_counter()
            os.fdatasync(file.fileno())
            times.append(time.perf_counter() - began)
    return figures | {"sync_ms": statistics.median(times) * 1e3}


def demand(served: Stand) -> float:
    with urllib.request.urlopen(f"http://127.0.0.1:{served.admin_port}/metrics", timeout=5) as answer:
        match = _DEMAND.search(answer.read().decode())
    return 0.0 if match is None else float(match[1])


def measure(quick: bool) -> command.Figures:
    with tempfile.TemporaryDirectory() as name, stand(Path(name)) as served, crowd(served) as workers:
        workers.shift(CAPACITY_AT_FIRST, 0.01)
        arrive(served, RATE, 3.0)  # first requests allocate, and draw leases
        figures: command.Figures = {}
        for count in WORKERS:
            figures |= steady(served, workers, count, 6.0 if quick else 40.0)
        figures |= asyncio.run(leases(served, 1.0 if quick else 5.0))
        figures |= committed(Path(name), 1.0 if quick else 5.0)
        figures |= scaled(served, workers, 15.0 if quick else 40.0)
        workers.shift(0, 1.0)
        time.sleep(PULL)
        figures |= asyncio.run(queued(served, 1.0 if quick else 5.0))
    costs = [figures[f"cpu_us_per_request_w{count}"] for count in WORKERS]
    return {name: round(value, 3) for name, value in (figures | {"cpu_spread": max(costs) / min(costs) - 1}).items()}


if __name__ == "__main__":
    command.run(__doc__, {"scale": measure})
