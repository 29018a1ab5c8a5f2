"""A role's connection to NATS. The client library's exceptions are mapped here and in the two modules that use this one."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any, Final

import nats
import nats.errors
import nats.js.errors
import structlog
from nats.aio.client import Client
from nats.aio.msg import Msg
from nats.js.client import JetStreamContext

from lacre_fabric import subjects
from lacre_fabric.roles import Credential
from lacre_fabric.work import FabricUnavailable

CONNECT_TIMEOUT: Final = 5  # seconds
API_TIMEOUT: Final = 2.0  # seconds for an answer by JetStream

log = structlog.get_logger("lacre.fabric")


class Connection:
    """A connection that comes back by itself. `denied` is the last thing the server would not let this role do."""

    def __init__(self, client: Client, credential: Credential) -> None:
        self.client = client
        self.jetstream: JetStreamContext = client.jetstream(timeout=API_TIMEOUT, prefix=subjects.API)
        self.credential = credential
        self.denied = ""

    @classmethod
    async def open(cls, url: str, credential: Credential) -> Connection:
        """Raises FabricUnavailable."""
        client = Client()
        connection = cls(client, credential)
        try:
            await client.connect(
                url,
                name=credential.name,
                user=credential.name,
                password=credential.password,
                inbox_prefix=subjects.inbox(credential.name),
                connect_timeout=CONNECT_TIMEOUT,
                max_reconnect_attempts=-1,
                reconnect_time_wait=1,
                ping_interval=10,
                error_cb=connection._on_error,
                allow_reconnect=True,
            )
        except (nats.errors.Error, OSError, TimeoutError) as exc:
            raise FabricUnavailable(f"cannot connect to NATS at {url}: is it running, and the credential current?") from exc
        connection.jetstream = client.jetstream(timeout=API_TIMEOUT, prefix=subjects.API)
        return connection

    async def _on_error(self, error: Exception) -> None:
        # A denial is told on the side, and the call that caused it just times out.
        text = str(error)
        if "permissions violation" in text.lower():
            self.denied = text
        log.warning("fabric.error", kind=type(error).__name__, denied=bool(self.denied))

    @property
    def connected(self) -> bool:
        return self.client.is_connected

    async def manifest(self) -> bytes | None:
        """The manifest document in the trust bucket; None where none was published. Raises FabricUnavailable."""
        async with self.mapped():
            try:
                message = await self.jetstream.get_msg(f"KV_{subjects.TRUST_BUCKET}", subject=subjects.manifest(), direct=True)
            except nats.js.errors.NotFoundError:
                return None
            return message.data

    @asynccontextmanager
    async def mapped(self) -> AsyncIterator[None]:
        """Maps the library's errors to FabricUnavailable, with the denial that may be behind a time-out."""
        denied = self.denied
        try:
            yield
        except (nats.errors.Error, nats.js.errors.Error, TimeoutError) as exc:
            if self.denied != denied:
                raise FabricUnavailable(f"NATS denies {self.credential.name} this: {self.denied}") from exc
            raise FabricUnavailable("NATS did not answer") from exc

    async def close(self) -> None:
        if not self.client.is_closed:
            await self.client.close()


def headers_of(message: Msg) -> dict[str, str]:
    headers: dict[str, Any] | None = message.headers
    return {} if headers is None else {str(name): str(value) for name, value in headers.items()}
