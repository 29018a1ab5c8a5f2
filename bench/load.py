"""The load of `bench/gateway.py`, a process of its own: one request at a time on each connection, each with another body.

It reads one task from standard input and writes its figures to standard output, both JSON. One thread, one epoll, no HTTP
library: on two cores the load's own cost lowers the figures.

Rules:
- An answer is whole at its Content-Length, or when the received bytes end with its last chunk. The bytes of our records never
  look like a last chunk (`bench/consumer.py`), so the end is not guessed.
- An answer other than 200, or a connection that ends, ends the run: refusals would give the best figures of all.
- The clock of a request starts when the kernel gets its first byte. Its body was made before, and its connection opened.
- Heads and bodies take turns, each in its own. So if their numbers share no factor, all pairs come up.
"""

from __future__ import annotations

import base64
import contextlib
import json
import os
import select
import socket
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import count, cycle
from typing import Any

LAST_CHUNK = b"0\r\n\r\n"
HEAD_END = b"\r\n\r\n"
PATIENCE = 30  # seconds without a byte of anything


@dataclass(frozen=True, slots=True)
class Task:
    """heads: request heads, without their lengths, taken in turns. bodies: likewise; a body is the first part, `fresh` random
    bytes, and the second part, both in base64.

    reopen: each request of so many is its connection's last; 0: none. seconds: how long requests are begun; or requests: how
    many. hold: answers stay open, until standard input ends.
    """

    port: int
    connections: int
    heads: list[str]
    bodies: list[tuple[str, str]]
    fresh: int = 0
    reopen: int = 0
    seconds: float = 0.0
    requests: int = 0
    hold: bool = False


def requests(task: Task) -> Iterator[tuple[bytes, bool]]:
    """One after another, without end; and whether the request is its connection's last."""
    heads = cycle([head.encode() for head in task.heads])
    bodies = cycle([(base64.b64decode(before), base64.b64decode(after)) for before, after in task.bodies])
    for number, head, (before, after) in zip(count(1), heads, bodies, strict=False):
        last = bool(task.reopen) and number % task.reopen == 0
        length = len(before) + task.fresh + len(after)
        fields = b"content-length: %d\r\n%s\r\n" % (length, b"connection: close\r\n" if last else b"")
        yield b"".join((head, fields, before, os.urandom(task.fresh), after)), last


@dataclass(slots=True)
class Connection:
    sock: socket.socket
    left: memoryview = field(default_factory=lambda: memoryview(b""))
    head: bytes = b""
    needed: int = -1  # bytes of the answer that are still to come; -1: its head is not whole, -2: chunks without a length
    waits: bool = False  # for room to send
    last: bool = False  # this request is its last
    began: float = 0.0
    first: float = 0.0


class Load:
    def __init__(self, task: Task) -> None:
        self._task = task
        self._requests = requests(task)
        self._poll = select.epoll()
        self._connections: dict[int, Connection] = {}
        self._begun = 0
        self._until = 0.0
        self.first: list[float] = []
        self.whole: list[float] = []

    def run(self) -> dict[str, Any]:
        for _ in range(self._task.connections):
            self._open()
        began = time.perf_counter()
        self._until = began + self._task.seconds if self._task.seconds else float("inf")
        running = sum(self._begin(connection) for connection in [*self._connections.values()])
        while running:
            ready = self._poll.poll(PATIENCE)
            if not ready:
                raise SystemExit(f"no byte for {PATIENCE} s, and {running} answers are not whole")
            for number, event in ready:
                connection = self._connections[number]
                if connection.left:
                    self._send(connection)
                if event & ~select.EPOLLOUT and self._receive(connection):
                    running += self._begin(connection) - 1
        return self._figures(time.perf_counter() - began)

    def _open(self) -> Connection:
        sock = socket.create_connection(("127.0.0.1", self._task.port))
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        sock.setblocking(False)
        connection = self._connections[sock.fileno()] = Connection(sock)
        self._poll.register(sock, select.EPOLLIN)
        return connection

    def _begin(self, connection: Connection) -> bool:
        """Whether another request was begun."""
        if connection.last:
            self._poll.unregister(connection.sock)
            del self._connections[connection.sock.fileno()]
            connection.sock.close()
        over = self._begun >= self._task.requests if self._task.requests else time.perf_counter() >= self._until
        if over:
            return False
        self._begun += 1
        if connection.last:
            connection = self._open()
        request, connection.last = next(self._requests)
        connection.left, connection.head, connection.needed, connection.first = memoryview(request), b"", -1, 0.0
        connection.began = time.perf_counter()
        self._send(connection)
        return True

    def _send(self, connection: Connection) -> None:
        with contextlib.suppress(BlockingIOError):
            connection.left = connection.left[connection.sock.send(connection.left) :]
        if bool(connection.left) != connection.waits:
            connection.waits = not connection.waits
            self._poll.modify(connection.sock, select.EPOLLIN | (select.EPOLLOUT if connection.waits else 0))

    def _receive(self, connection: Connection) -> bool:
        """Whether the answer is whole."""
        try:
            data = connection.sock.recv(256 * 1024)
        except BlockingIOError:
            return False
        if not data:
            raise SystemExit(f"the server ended a connection, after {len(self.whole)} answers")
        if not connection.first:
            connection.first = time.perf_counter()
        if connection.needed == -1:
            connection.head += data
            if HEAD_END not in connection.head:
                return False
            data = self._head(connection)
        if connection.needed == -2:
            whole = data.endswith(LAST_CHUNK)
        else:
            connection.needed -= len(data)
            whole = connection.needed <= 0
        if self._task.hold and len(data) > 0 and not whole:
            whole = True  # as far as this one goes: it has begun, and stays
        if whole:
            self.first.append(connection.first - connection.began)
            self.whole.append(time.perf_counter() - connection.began)
        return whole

    @staticmethod
    def _head(connection: Connection) -> bytes:
        """The bytes behind the head."""
        head, _, rest = connection.head.partition(HEAD_END)
        if head[9:12] != b"200":
            raise SystemExit(f"an answer that is not 200: {head[:40]!r} {rest!r}")
        lines = head.lower().split(b"\r\n")
        length = next((line for line in lines if line.startswith(b"content-length:")), None)
        connection.needed = -2 if length is None else int(length.partition(b":")[2])
        return rest

    def _figures(self, seconds: float) -> dict[str, Any]:
        first, whole = sorted(self.first), sorted(self.whole)
        at = lambda times, part: 1e3 * times[min(len(times) - 1, int(part * len(times)))]  # noqa: E731
        return {
            "requests": len(whole),
            "rps": len(whole) / seconds,
            "first_p50_ms": at(first, 0.5),
            "first_p99_ms": at(first, 0.99),
            "p50_ms": at(whole, 0.5),
            "p99_ms": at(whole, 0.99),
        }


def main() -> None:
    task = Task(**json.loads(sys.stdin.readline()))
    load = Load(task)
    print(json.dumps(load.run()), flush=True)
    if task.hold:
        sys.stdin.read()


if __name__ == "__main__":
    main()
