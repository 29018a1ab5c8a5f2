"""Answers in `bench/gateway.py` in place of workers: a real consumer of the pool's queue on NATS, in a process of its own.

It pulls and acks. It answers at once with records of 512 bytes and a receipt for that request, signed with the pool's key. It
opens the gateway's settlement key and sends a MAC with the receipt. So the gateway does all that it does for a worker. It
claims nothing and opens no request. It uses a bare socket for NATS: its own cost is outside the figures, but it shares the
machine.

`python -m bench.consumer TASK`, where TASK is JSON: see `Task`. With `hold`, an answer is its first record, and a beat a second
until the process ends.
"""

from __future__ import annotations

import base64
import json
import re
import socket
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from lacre.evidence.receipts import TYP
from lacre.jose.jws import b64u
from lacre.wire.header import SealedHeader
from lacre_backend.node.opened_keys import OpenedKeys
from lacre_fabric.keys import pool_keys
from lacre_fabric.keys.secret_files import read_ed25519
from lacre_fabric.nats import subjects
from lacre_fabric.nats.gateway import GATEWAY, REQUEST
from lacre_fabric.nats.roles import Credential
from lacre_fabric.work.settlement_keys import SETTLE

RECORD = b"\xa5" * 512  # no record looks like the end of a chunked answer
BATCH = 256  # messages asked for at once
# bytes of them: what waits for a busy reader stays far below the 64 MiB at which NATS closes its connection, also if two
# pulls of each model overlap
PULLED = 4 * 2**20
RENEW = 1.0  # seconds that one pull lives; what an earlier process asked for is over soon
BEAT = 1.0
ATTEMPT = "0123456789abcdef" * 2
_MESSAGE = re.compile(rb"(?:HMSG|MSG) (\S+) (\S+) (?:(\S+) )?(?:(\d+) )?(\d+)\r\n")


@dataclass(frozen=True, slots=True)
class Task:
    port: int
    credential: str
    receipt_key: str
    keys: str
    pool: str
    models: tuple[str, ...]
    node: str
    records: int
    hold: bool = False


@dataclass(frozen=True, slots=True)
class Message:
    subject: bytes
    reply: bytes
    head: bytes
    payload: memoryview


@dataclass(slots=True)
class Pull:
    """Of one model's work. asked: how many messages are still to come."""

    subject: str
    inbox: str
    asked: int = 0
    asked_at: float = 0.0


class Wire:
    """NATS's protocol over a socket, as far as it is needed here."""

    def __init__(self, task: Task) -> None:
        credential = Credential.load(Path(task.credential))
        self.inbox = subjects.inbox(credential.name)
        self.sock = socket.create_connection(("127.0.0.1", task.port))
        self.sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._rest = b""
        options = {"verbose": False, "pedantic": False, "headers": True, "no_responders": True, "protocol": 1}
        options |= {"user": credential.name, "pass": credential.password, "lang": "bench", "version": "1"}
        self.sock.sendall(f"CONNECT {json.dumps(options)}\r\nSUB {self.inbox}.pull.* 1\r\n".encode())

    def messages(self, seconds: float) -> Iterator[Message]:
        """All that came, after waiting so long for something to come."""
        self.sock.settimeout(seconds)
        try:
            data = self._rest + self.sock.recv(4 * 2**20)
        except TimeoutError:
            return
        at = 0
        while (line := data.find(b"\r\n", at)) >= 0:
            match = _MESSAGE.match(data, at)
            if match is None:
                if data.startswith(b"PING", at):
                    self.sock.sendall(b"PONG\r\n")
                elif data.startswith(b"-ERR", at):
                    print(data[at:line].decode(), file=sys.stderr, flush=True)
                at = line + 2
                continue
            start, size, head = match.end(), int(match[5]), int(match[4] or 0)
            if len(data) < start + size + 2:
                break
            yield Message(match[1], match[3] or b"", data[start : start + head], memoryview(data)[start + head : start + size])
            at = start + size + 2
        self._rest = data[at:]


class Consumer:
    def __init__(self, task: Task) -> None:
        self._task = task
        self._wire = Wire(task)
        self._key: Ed25519PrivateKey = read_ed25519(Path(task.receipt_key))
        keys = [pool_keys.read(path) for path in pool_keys.files(Path(task.keys))]
        self._keys = {key.config.key_id: key for key in keys}
        self._opened = OpenedKeys(task.pool)
        stream = subjects.work_stream(task.pool, subjects.DEFAULT_REGION)
        self._pulls = [
            Pull(f"{subjects.API}.CONSUMER.MSG.NEXT.{stream}.{subjects.consumer(model)}", f"{self._wire.inbox}.pull.{number}")
            for number, model in enumerate(task.models)
        ]
        self._by_inbox = {pull.inbox.encode(): pull for pull in self._pulls}
        self._by_work = {
            subjects.work(task.pool, subjects.DEFAULT_REGION, model).encode(): pull
            for model, pull in zip(task.models, self._pulls, strict=True)
        }
        self._said_at = 0.0
        self._frames = [
            b"NATS/1.0\r\nA: %s\r\nS: %d\r\nK: data\r\n\r\n" % (ATTEMPT.encode(), number) for number in range(task.records)
        ]
        self._held: dict[bytes, int] = {}  # what is being answered, and its next frame

    def run(self) -> None:
        self._wire.sock.sendall(b"".join([*self._presence(time.monotonic()), *self._ask(time.monotonic())]))
        print("there", flush=True)
        while True:
            now = time.monotonic()
            out = [*self._presence(now), *self._ask(now)]
            if out:
                self._wire.sock.sendall(b"".join(out))
            out = []
            for message in self._wire.messages(0.1):
                if REQUEST.encode() in message.head:
                    self._by_work[message.subject].asked -= 1
                    out += self._answer(message)
                elif (pull := self._by_inbox.get(message.subject)) is not None:
                    pull.asked = 0  # a status: the pull is over
            if out:
                self._wire.sock.sendall(b"".join(out))

    def _presence(self, now: float) -> Iterator[bytes]:
        if now - self._said_at >= BEAT:
            self._said_at = now
            said = json.dumps({"models": list(self._task.models), "free": BATCH, "busy": 0, "keys": []}).encode()
            yield _pub(subjects.presence(self._task.pool, subjects.DEFAULT_REGION, self._task.node), said)
            for reply, number in self._held.items():
                self._held[reply] += 1
                yield _hpub(reply, b"NATS/1.0\r\nA: %s\r\nS: %d\r\nK: beat\r\n\r\n" % (ATTEMPT.encode(), number), b"")

    def _ask(self, now: float) -> Iterator[bytes]:
        for pull in self._pulls:
            if pull.asked < BATCH // 2 or now - pull.asked_at >= RENEW:
                pull.asked, pull.asked_at = pull.asked + BATCH, now
                wanted = _json({"batch": BATCH, "max_bytes": PULLED, "expires": int(RENEW * 1e9)})
                yield b"PUB %s %s %d\r\n%s\r\n" % (pull.subject.encode(), pull.inbox.encode(), len(wanted), wanted)

    def _answer(self, message: Message) -> Iterator[bytes]:
        fields = dict(line.partition(b": ")[::2] for line in message.head.split(b"\r\n"))
        gateway, request = fields[GATEWAY.encode()].decode(), fields[REQUEST.encode()].decode()
        reply = subjects.reply(self._task.pool, gateway, request).encode()
        yield _pub(message.reply.decode(), b"+ACK")
        if self._task.hold:
            self._held[reply] = 1
            yield _hpub(reply, self._frames[0], RECORD)
            return
        for frame in self._frames:
            yield _hpub(reply, frame, RECORD)
        header = SealedHeader.parse(message.payload[:2048])
        receipt = self._receipt(header.digest)
        key = self._opened.find(fields.get(SETTLE.encode(), b"").decode(), gateway, header.key_id, self._keys)
        proved = b"" if key is None else b"M: %s\r\n" % key.mac(receipt).hex().encode()
        usage = b"NATS/1.0\r\nA: %s\r\nS: %d\r\nK: usage\r\n%s\r\n" % (ATTEMPT.encode(), self._task.records, proved)
        yield _hpub(reply, usage, receipt)

    def _receipt(self, digest: bytes) -> bytes:
        now = time.time()
        said = {"enc": b64u(digest), "model": "sha256:00", "prompt_tokens": 64, "cached_tokens": 0,
                "completion_tokens": self._task.records, "start": now, "end": now, "final": True}  # fmt: skip
        signed = f"{HEAD}.{b64u(_json(said))}".encode()
        return signed + b"." + base64.urlsafe_b64encode(self._key.sign(signed)).rstrip(b"=")


def _json(value: object) -> bytes:
    return json.dumps(value, separators=(",", ":")).encode()


HEAD = b64u(_json({"alg": "EdDSA", "typ": TYP}))  # as `lacre.jose.jws` writes it, byte for byte


def _pub(subject: str, payload: bytes) -> bytes:
    return b"PUB %s %d\r\n%s\r\n" % (subject.encode(), len(payload), payload)


def _hpub(subject: bytes, head: bytes, payload: bytes) -> bytes:
    return b"HPUB %s %d %d\r\n%s%s\r\n" % (subject, len(head), len(head) + len(payload), head, payload)


if __name__ == "__main__":
    Consumer(Task(**json.loads(sys.argv[1]))).run()
