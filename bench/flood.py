"""One gateway under a flood, beside the same gateway left in peace: 200 connections that send all that they may.

Eight streams are honest: requests of 1 KiB, each answered with 20 records. All others share one process with one thread. Each
repeats one attack: a head that trickles, has no end, or has thousands of fields; a body that trickles, or has 7 MB. Bodies come
without a token, and with tokens of eight callers. A connection that is cut off or refused comes back after `PAUSE`.

- `quiet_first_p50_ms`, `flood_first_p50_ms`, `first_ratio`: the honest streams' first bytes; the goal is at most 3.
- `flood_cpu_idle`: the idle share of the machine's CPU time meanwhile; near 0 the ratio measures the machine, too.
- `flood_gateway_cpu`: CPUs that the gateway's process used.
- `flood_rss_mb`: the most memory that the gateway's process had. `allowed_rss_mb`: the memory that its settings allow. That is
  memory in peace, `listen.held_bytes`, and three times `limits.body_bytes`.
- `flood_mb_per_s`: the flood that the gateway's side received. The flood runs at a lower priority, because in real life it
  would use other machines' CPUs.
- `cut`, `refused`: connections that the flood lost, and its answers other than 200.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import re
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from bench import command
from bench.stand import MODEL, POOL, ROOT, Stand, ended, run_load, sealed, stand, usage
from lacre.wire.header import MAX_SEALED_REQUEST, MEDIA_TYPE_REQUEST
from lacre_gateway.settings import GatewayLimits, Listen

CONNECTIONS = 200
HONEST = 8
CALLERS = 8
PAUSE = 0.25  # seconds before a lost connection is made again
TRICKLE = 0.2  # seconds between two bytes
PIECE = 64 * 1024
START = b"POST /v1/sealed HTTP/1.1\r\nHost: x\r\n"


@dataclass(frozen=True, slots=True)
class Flood:
    """start: of a sealed request, in hexadecimal digits. tokens: of callers that take part."""

    port: int
    connections: int
    start: str
    tokens: list[str]


@dataclass(slots=True)
class Told:
    """sent: bytes."""

    cut: int = 0
    sent: int = 0
    refused: Counter[int] = field(default_factory=Counter)


async def one(task: Flood, number: int, told: Told) -> None:
    """One connection, again and again."""
    while True:
        with contextlib.suppress(OSError, asyncio.IncompleteReadError):
            reader, writer = await asyncio.open_connection("127.0.0.1", task.port)
            sending = asyncio.create_task(_send(task, number, writer, told))
            try:
                answer = await reader.read(4096)
                if found := re.match(rb"HTTP/1.1 (\d+)", answer):
                    told.refused[int(found[1])] += 1
            finally:
                sending.cancel()
                await asyncio.gather(sending, return_exceptions=True)
                writer.transport.abort()
        told.cut += 1
        await asyncio.sleep(PAUSE)


async def _send(task: Flood, number: int, writer: asyncio.StreamWriter, told: Told) -> None:
    token = task.tokens[number % len(task.tokens)]
    known = START + _outer() + f"Authorization: Bearer {token}\r\n".encode()
    size = MAX_SEALED_REQUEST - 1
    length = b"Content-Length: %d\r\n\r\n" % (size + 1)
    start = bytes.fromhex(task.start)
    match number % 7:
        case 0:
            await _trickle(writer, START)
        case 1:
            await _pour(writer, told, START + b"a: ", b"x", 2**40)
        case 2:
            await _pour(writer, told, START, b"a:b\r\n", 2**40)
        case 3:
            await _trickle(writer, START + _outer() + length)
        case 4:
            await _pour(writer, told, START + _outer() + length, b"x", size)
        case 5:
            await _trickle(writer, known + length + start)
        case _:
            await _pour(writer, told, known + length + start, b"x", size - len(start))


async def _trickle(writer: asyncio.StreamWriter, begun: bytes) -> None:
    writer.write(begun)
    while True:
        writer.write(b"x")
        await writer.drain()
        await asyncio.sleep(TRICKLE)


async def _pour(writer: asyncio.StreamWriter, told: Told, begun: bytes, what: bytes, size: int) -> None:
    """As fast as it is taken; and then it waits."""
    writer.write(begun)
    piece = what * (PIECE // len(what))
    while size > 0:
        writer.write(piece[:size])
        size -= len(piece)
        await writer.drain()
        told.sent += len(piece)


def _outer() -> bytes:
    return (
        f"Content-Type: {MEDIA_TYPE_REQUEST}\r\nLacre-Pool: {POOL}\r\nLacre-Model: {MODEL}\r\nLacre-Action: chat\r\n"
        "Lacre-Max-Tokens: 16\r\nLacre-Shape: none\r\n"
    ).encode()


async def flood(task: Flood) -> None:
    """Until standard input ends; then what it was told."""
    os.nice(10)
    told, began = Told(), time.monotonic()
    running = [asyncio.create_task(one(task, number, told)) for number in range(task.connections)]
    await asyncio.to_thread(sys.stdin.read)
    for each in running:
        each.cancel()
    await asyncio.gather(*running, return_exceptions=True)
    rate = told.sent / 2**20 / (time.monotonic() - began)
    figures = {"cut": told.cut, "refused": sum(told.refused.values()), "mb_per_s": rate, "statuses": told.refused}
    print(json.dumps(figures), flush=True)


@contextmanager
def flooding(served: Stand, found: dict[str, Any]) -> Iterator[None]:
    """A process of its own; what it was told is put into `found`."""
    prefix, tail = sealed(served.site, 4096)
    start = (prefix + bytes(32) + tail)[:2048]
    tokens = [served.site.token(f"flood-{number}@example.com") for number in range(CALLERS)]
    task = Flood(served.port, CONNECTIONS, start.hex(), tokens)
    program = [sys.executable, "-m", "bench.flood", "--flood", json.dumps(asdict(task))]
    process = subprocess.Popen(program, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    with ended(process):
        yield
        output, _ = process.communicate(timeout=30)
        found.update(json.loads(output))


@contextmanager
def sampled(read: Callable[[], float]) -> Iterator[list[float]]:
    """What `read` says, ten times a second."""
    found, over = [read()], threading.Event()

    def look() -> None:
        while not over.wait(0.1):
            found.append(read())

    looking = threading.Thread(target=look)
    looking.start()
    try:
        yield found
    finally:
        over.set()
        looking.join()


def idle_share(before: tuple[int, int], after: tuple[int, int]) -> float:
    return (after[0] - before[0]) / max(1, after[1] - before[1])


def cpu_times() -> tuple[int, int]:
    """Idle ones, and all, of the whole machine, in ticks."""
    first = Path("/proc/stat").read_text().splitlines()[0].split()[1:]
    return int(first[3]) + int(first[4]), sum(map(int, first))


def measure(quick: bool) -> command.Figures:
    seconds = 4.0 if quick else 15.0
    found: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as name, stand(Path(name)) as served, served.answering(20):
        pid = served.process.pid
        honest = served.load(2**10, HONEST, models=(MODEL,), reopen=0, seconds=seconds)
        run_load(served.load(2**10, HONEST, models=(MODEL,), reopen=0, seconds=2.0))  # first requests allocate
        quiet = run_load(honest)
        memory = usage(pid).rss
        with flooding(served, found), sampled(lambda: usage(pid).rss) as sizes:
            time.sleep(3)  # it has come up to its strength
            before, used, began = cpu_times(), usage(pid).cpu, time.monotonic()
            loud = run_load(honest)
            idle, used = idle_share(before, cpu_times()), (usage(pid).cpu - used) / (time.monotonic() - began)
    print(f"  statuses: {found['statuses']}", file=sys.stderr)
    allowed = memory + Listen().held_bytes + 3 * GatewayLimits().body_bytes
    return {
        "quiet_first_p50_ms": round(quiet["first_p50_ms"], 2),
        "quiet_first_p99_ms": round(quiet["first_p99_ms"], 2),
        "flood_first_p50_ms": round(loud["first_p50_ms"], 2),
        "flood_first_p99_ms": round(loud["first_p99_ms"], 2),
        "first_ratio": round(loud["first_p50_ms"] / quiet["first_p50_ms"], 2),
        "flood_cpu_idle": round(idle, 3),
        "flood_gateway_cpu": round(used, 3),
        "quiet_rss_mb": round(memory / 2**20, 1),
        "flood_rss_mb": round(max(sizes) / 2**20, 1),
        "allowed_rss_mb": round(allowed / 2**20, 1),
        "flood_mb_per_s": round(found["mb_per_s"], 1),
        "cut": float(found["cut"]),
        "refused": float(found["refused"]),
    }


if __name__ == "__main__":
    if "--flood" in sys.argv:
        asyncio.run(flood(Flood(**json.loads(sys.argv[-1]))))
    else:
        command.run(__doc__, {"flood": measure})
