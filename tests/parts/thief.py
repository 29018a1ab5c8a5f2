"""A thread that speaks NATS with a stolen credential, as fast as the socket takes it, and reads only if told to."""

from __future__ import annotations

import itertools
import json
import random
import socket
import threading
import time
from collections.abc import Iterator, Sequence

from lacre_fabric.nats.roles import Role
from parts.stolen_nats import published

BATCH = 256 * 1024  # bytes said at once
ODD = (b"x", b"0" * 32, b"f" * 32, b"\xff\xfe", b"\xc3\xa9", b"*", b">", b"\x7f", b"a" * 3000, b"$JS", b"..", b"presence")
PAYLOADS = (b"", b"x", b"{}", b"[" * 60_000, b"\0" * 300_000, b"9" * 400, b'{"models":["echo"],"busy":1' + b"0" * 400 + b"}")
HEADERS = (
    None,
    b"NATS/1.0\r\n\r\n",
    b"NATS/1.0 \xff\xff\xff\r\n\r\n",
    b"NATS/1.0\r\n\xff\xfe: x\r\n\r\n",
    b"NATS/1.0 503\r\n\r\n",
    b"NATS/1.0\r\n",
    b"NATS/1.0\r\nNats-Rollup: all\r\n\r\n",
    b"NATS/1.0\r\nNats-TTL: never\r\n\r\n",
    b"NATS/1.0\r\nNats-TTL: 1s\r\n\r\n",
    b"NATS/1.0\r\nA: " + b"f" * 32 + b"\r\nS: 0\r\nK: data\r\n\r\n",
)


class Thief(threading.Thread):
    """role: whose credential it has. others: subjects of others, to have answers sent to. seconds: how long it goes on."""

    def __init__(self, port: int, role: Role, others: Sequence[str], seconds: float, seed: int = 1) -> None:
        super().__init__(daemon=True)
        self._port = port
        self._role = role
        self._others = others
        self._until = time.monotonic() + seconds
        self._third = seconds / 3
        self._random = random.Random(seed)
        self.said = 0
        self.connections = 0

    def run(self) -> None:
        end = self._until
        for phase in (self._everything, self._fast, self._deaf):
            self._until = time.monotonic() + self._third
            while time.monotonic() < min(self._until, end):
                try:
                    with self._connected() as sock:
                        phase(sock)
                except OSError:  # the server hung up: another try
                    time.sleep(0.02)

    def _connected(self) -> socket.socket:
        sock = socket.create_connection(("127.0.0.1", self._port), timeout=5)
        who = {"user": self._role.credential.name, "pass": self._role.credential.password, "headers": True, "verbose": False}
        sock.sendall(b"CONNECT " + json.dumps({**who, "no_responders": True, "lang": "raw"}).encode() + b"\r\n")
        self.connections += 1
        return sock

    def _subject(self, pattern: str) -> bytes:
        tokens = [self._random.choice(ODD) if token in ("*", ">") else token.encode() for token in pattern.split(".")]
        return b".".join(tokens)

    def _everything(self, sock: socket.socket) -> None:
        """What it may say, in every form; and what it may not, now and then."""
        for _ in range(200):
            headers, payload = self._random.choice(HEADERS), self._random.choice(PAYLOADS)
            subject = self._subject(self._random.choice((*self._role.publish, *self._role.publish, *self._others)))
            reply = self._random.choice(("", "", *self._others))
            self._say(sock, published(subject, payload, reply=reply, headers=headers))
            if time.monotonic() > self._until:
                return

    def _fast(self, sock: socket.socket) -> None:
        """One small message after the other, on each subject in turn."""
        for pattern in itertools.cycle(self._role.publish):
            frame = published(self._subject(pattern), b"{}")
            self._say(sock, frame * max(1, BATCH // len(frame)))
            if time.monotonic() > self._until:
                return

    def _deaf(self, sock: socket.socket) -> None:
        """Asks for more than it reads, and subscribes to all that it may, on many connections."""
        held = [sock]
        for number in range(40):
            asked = b"".join(published(self._subject(one), b"{}", reply=self._inbox()) for one in self._role.publish) * 50
            heard = b"".join(f"SUB {one} {number}{at}\r\n".encode() for at, one in enumerate(self._patterns()))
            try:
                held[-1].sendall(heard + asked)
                held.append(self._connected())
            except OSError:
                break
            self.said += 50 * len(self._role.publish)
            if time.monotonic() > self._until:
                break
        for one in held[1:]:
            one.close()

    def _patterns(self) -> Iterator[str]:
        for _ in range(50):
            yield from self._role.subscribe

    def _inbox(self) -> str:
        return next(one for one in self._role.subscribe if one.startswith("_INBOX")).replace(">", "x")

    def _say(self, sock: socket.socket, data: bytes) -> None:
        sock.sendall(data)
        self.said += 1
        sock.setblocking(False)
        try:
            while sock.recv(1 << 20):
                pass
        except BlockingIOError:
            pass
        finally:
            sock.settimeout(5)
