"""Somebody who speaks NATS with a stolen credential, byte for byte as they like: no client library keeps them from anything."""

from __future__ import annotations

import asyncio
import json
from types import TracebackType
from urllib.parse import urlsplit

from lacre_fabric.roles import Credential

PATIENCE = 10.0  # seconds for the server's answer


def message(subject: bytes, payload: bytes = b"", headers: bytes | None = None) -> bytes:
    """A PUB, or an HPUB whose header block is `headers` as it is."""
    if headers is None:
        return b"PUB %b %d\r\n%b\r\n" % (subject, len(payload), payload)
    return b"HPUB %b %d %d\r\n%b%b\r\n" % (subject, len(headers), len(headers) + len(payload), headers, payload)


class RawNats:
    """A context. url: of a server without TLS."""

    def __init__(self, url: str, credential: Credential) -> None:
        self._url = urlsplit(url)
        self._credential = credential

    async def __aenter__(self) -> RawNats:
        self._reader, self._writer = await asyncio.open_connection(self._url.hostname, self._url.port)
        await self._reader.readline()
        who = {"user": self._credential.name, "pass": self._credential.password, "headers": True, "verbose": False}
        self._writer.write(b"CONNECT " + json.dumps({**who, "lang": "raw", "version": "1"}).encode() + b"\r\n")
        await self.settled()
        return self

    async def __aexit__(self, _kind: type[BaseException] | None, _error: object, _trace: TracebackType | None) -> None:
        self._writer.transport.abort()

    async def say(self, *messages: bytes) -> None:
        """Until the server has read it all."""
        for one in messages:
            self._writer.write(one)
            await self._writer.drain()
        await self.settled()

    async def settled(self) -> None:
        """Until the server has read what was said. Raises ConnectionError where it hung up, and what it said."""
        self._writer.write(b"PING\r\n")
        async with asyncio.timeout(PATIENCE):
            while (line := await self._reader.readline()) != b"PONG\r\n":
                if not line or line.startswith(b"-ERR"):
                    raise ConnectionResetError(line.decode("latin-1"))
