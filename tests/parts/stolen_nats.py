"""A stolen credential that speaks NATS as bytes and hears the answers: JetStream's, and those meant for others."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any, Self

from lacre_fabric.nats import subjects
from lacre_fabric.nats.roles import Credential

PATIENCE = 20.0  # seconds for an answer; the machine may be busy


@dataclass
class StolenNats:
    """One connection. errors: what the server said in `-ERR` lines."""

    credential: Credential
    reader: asyncio.StreamReader
    writer: asyncio.StreamWriter
    info: Mapping[str, Any]
    errors: list[str] = field(default_factory=list)
    asked: int = 0

    @classmethod
    async def open(cls, port: int, credential: Credential) -> Self:
        """Raises ConnectionError where the server does not take it."""
        reader, writer = await asyncio.open_connection("127.0.0.1", port, limit=2**24)
        info = json.loads((await reader.readline()).removeprefix(b"INFO "))
        raw = cls(credential, reader, writer, info)
        who = {"user": credential.name, "pass": credential.password, "lang": "raw", "version": "0"}
        options = {**who, "headers": True, "no_responders": True, "verbose": False}
        raw.say(b"CONNECT " + json.dumps(options).encode() + b"\r\n")
        try:
            await raw.settle()
        except BaseException:
            await raw.close()
            raise
        return raw

    def say(self, data: bytes) -> None:
        self.writer.write(data)

    def publish(
        self, subject: str | bytes, data: bytes = b"", *, reply: str = "", headers: Mapping[str, str] | bytes | None = None
    ) -> None:
        self.say(published(subject, data, reply=reply, headers=headers))

    async def settle(self) -> list[tuple[str, bytes]]:
        """Until the server has taken all that was said; what came meanwhile. Raises ConnectionError when it hung up."""
        self.say(b"PING\r\n")
        found = []
        async with asyncio.timeout(PATIENCE):
            await self.writer.drain()
            while (message := await self.read()) is not None:
                found.append(message)
        return found

    async def read(self) -> tuple[str, bytes] | None:
        """Subject and payload of the next message; None for the answer to a ping."""
        while line := await self.reader.readline():
            verb, *words = line.split()
            if verb == b"PONG":
                return None
            if verb == b"PING":
                self.say(b"PONG\r\n")
            elif verb == b"-ERR":
                self.errors.append(line.decode().strip())
            elif verb in (b"MSG", b"HMSG"):
                data = (await self.reader.readexactly(int(words[-1]) + 2))[:-2]
                return words[0].decode(), data[int(words[-2]) :] if verb == b"HMSG" else data
        raise ConnectionError(f"the server hung up: {self.errors}")

    async def ask(self, subject: str, data: bytes = b"", headers: Mapping[str, str] | None = None) -> Any:
        """The JSON that JetStream answers with."""
        self.asked += 1
        inbox = f"{subjects.inbox(self.credential.name)}.raw{self.asked}"
        self.say(f"SUB {inbox} 9{self.asked}\r\nUNSUB 9{self.asked} 1\r\n".encode())
        self.publish(subject, data, reply=inbox, headers=headers)
        async with asyncio.timeout(PATIENCE):
            while (message := await self.read()) is None or message[0] != inbox:
                pass
        return json.loads(message[1])

    async def close(self) -> None:
        self.writer.close()
        with suppress(OSError):  # the server may have hung up
            await self.writer.wait_closed()


def published(
    subject: str | bytes, data: bytes = b"", *, reply: str = "", headers: Mapping[str, str] | bytes | None = None
) -> bytes:
    """The frame of one message. headers: a mapping, or the block as it goes out."""
    start = (subject.encode() if isinstance(subject, str) else subject) + b" " + (f"{reply} ".encode() if reply else b"")
    if headers is None:
        return b"PUB %b%d\r\n%b\r\n" % (start, len(data), data)
    if not isinstance(headers, bytes):
        headers = b"NATS/1.0\r\n" + b"".join(f"{name}: {value}\r\n".encode() for name, value in headers.items()) + b"\r\n"
    return b"HPUB %b%d %d\r\n%b%b\r\n" % (start, len(headers), len(headers) + len(data), headers, data)
