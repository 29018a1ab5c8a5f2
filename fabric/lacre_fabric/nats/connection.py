"""A role's connection to NATS. The client library's exceptions are mapped here and in the two modules that use this one.

Rules:
- The connection reconnects by itself. It is `lost` if NATS ends it for good, for example because the credential was withdrawn.
- NATS reports a denied operation separately, and the operation itself only times out. So denials are counted, and an operation
  during which one arrives reports it.
"""

from __future__ import annotations

import asyncio
import json
import random
from base64 import b64decode
from collections.abc import AsyncIterator, Callable, Collection, Mapping, Sequence
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any, Final

import nats.errors
import nats.js.errors
import structlog
from nats.aio.msg import Msg
from nats.js.client import JetStreamContext

from lacre.errors import InvalidMessage
from lacre.jose.claims import Members
from lacre.runtime import tasks
from lacre.runtime.hosts import without_secrets
from lacre.runtime.json_objects import object_in
from lacre.transport.fault_words import fault_in_words
from lacre_fabric.nats import subjects
from lacre_fabric.nats.client import DirectClient
from lacre_fabric.nats.login import Login
from lacre_fabric.nats.protocol import DESCRIPTION, MAX_SIZE, STATUS
from lacre_fabric.nats.roles import Credential
from lacre_fabric.nats.servers import Servers, Trust, distrusted
from lacre_fabric.work.contract import FabricBusy, FabricLost, FabricRefused, FabricUnavailable, FabricUntrusted

CONNECT_TIMEOUT: Final = 5  # seconds for a first connection; reconnecting has no time limit
MAX_REFUSALS: Final = 3  # consecutive refusals of a credential that worked before; a server may be between two configurations
API_TIMEOUT: Final = 2.0  # seconds for an answer from JetStream
STORE_FAILED: Final = 10077  # JSStreamStoreFailedF: the stream or bucket is full, with `discard: new`
TOO_MANY_REQUESTS: Final = (
    10167  # JSStreamTooManyRequests: more than `max_buffered_msgs` writes were waiting, so this one was not taken
)
_NOT_FOUND: Final = "404"
_MAX_TEXT: Final = 200  # characters of an error's text, which goes to the log

log = structlog.get_logger("lacre.fabric")


@dataclass(frozen=True, slots=True)
class Stored:
    """A message stored in a stream, without its headers.

    time: when the server stored it, in seconds since the epoch. stamp: the same as the server writes it, to the nanosecond.
    """

    sequence: int
    subject: str
    stamp: str
    time: float
    value: bytes = field(repr=False)

    @classmethod
    def parse(cls, said: object) -> Stored:
        """Raises InvalidMessage."""
        members = Members(said, "the message")
        stamp, data = members.text("time"), said.get("data") if isinstance(said, Mapping) else None
        try:
            time = datetime.fromisoformat(stamp).timestamp()
            value = b64decode(data, validate=True) if isinstance(data, str) else b""
        except (ValueError, OverflowError) as exc:
            raise InvalidMessage("the message has an invalid time or payload") from exc
        return cls(members.count("seq"), members.text("subject"), stamp, time, value)


class Connection:
    """A role's connection to NATS, with JetStream.

    denials: how many operations the server denied to this role. denied: the last denial, in the server's words.
    trust: the certificates for the next handshake.
    """

    def __init__(self, client: DirectClient, credential: Credential, trust: Trust) -> None:
        self.client = client
        self.jetstream: JetStreamContext = client.jetstream(timeout=API_TIMEOUT, prefix=subjects.API)
        self.credential = credential
        self.trust = trust
        self.denials = 0
        self.denied = ""
        self.on_reconnect: Callable[[], None] = lambda: None
        self.on_denied: Callable[[str], None] = lambda _text: None
        self._last_error: Exception | None = None
        self._refusals = 0
        self._closing: asyncio.Task[object] | None = None
        self._changed = asyncio.Event()

    @classmethod
    async def open(
        cls,
        servers: Servers | str,
        credential: Credential,
        *,
        keep: int = MAX_SIZE,
        purpose: str = "",
        trust: Trust | None = None,
    ) -> Connection:
        """Connects to any of the servers, and to another one if that server fails later.

        keep: bytes of the longest useful message. purpose: part of the connection's name, which servers and logs show.
        trust: the certificates, if several connections share them.

        Raises SettingsError, or FabricUntrusted if a server does not prove its identity. Raises FabricUnavailable after
        `CONNECT_TIMEOUT` for each server, or as soon as one refuses the credential.
        """
        servers = Servers.of(servers)
        trust = servers.trust() if trust is None else trust
        urls = random.sample(servers.urls, len(servers.urls))  # so that clients spread over the servers
        failed: list[FabricUnavailable] = []
        for _ in urls:
            try:
                return await cls._open(
                    urls, trust, DirectClient(keep, trust=trust, login=Login(credential)), credential, purpose
                )
            except FabricRefused:
                raise
            except FabricUnavailable as exc:
                failed.append(exc)
            urls.append(urls.pop(0))
        raise next((exc for exc in failed if isinstance(exc, FabricUntrusted)), failed[0])

    @classmethod
    async def _open(
        cls, urls: Sequence[str], trust: Trust, client: DirectClient, credential: Credential, purpose: str
    ) -> Connection:
        """Connects to the first server; the others are for reconnecting."""
        connection = cls(client, credential, trust)
        try:
            async with asyncio.timeout(CONNECT_TIMEOUT):
                await client.connect(
                    list(urls),
                    tls=trust.value,
                    dont_randomize=True,
                    name=f"{credential.name} {purpose}".strip(),
                    user=credential.name,
                    password=credential.password,
                    inbox_prefix=subjects.inbox(credential.name),
                    connect_timeout=CONNECT_TIMEOUT,
                    allow_reconnect=False,  # the first refusal is final; the library would retry without end
                    max_reconnect_attempts=-1,
                    reconnect_time_wait=1,
                    error_cb=connection._on_error,
                    disconnected_cb=connection._on_change,
                    reconnected_cb=connection._on_reconnect,
                    closed_cb=connection._on_change,
                )
        except (nats.errors.Error, OSError, TimeoutError) as exc:
            why = connection._no_connection(urls[0], exc)  # before closing adds errors of its own
            await connection._end()
            raise why from exc
        except BaseException:
            await connection._end()
            raise
        client.options["allow_reconnect"] = True
        return connection

    def _no_connection(self, url: str, error: Exception) -> FabricUnavailable:
        reason = self._last_error or error
        told = f"cannot connect to NATS at {without_secrets(url)} as {self.credential.name}"
        if (distrust := distrusted(reason)) is not None:
            return FabricUntrusted(f"{told}: {distrust}")
        text = str(reason).removeprefix("nats: ")
        if isinstance(reason, OSError | TimeoutError):
            text = fault_in_words(reason, "nats.ca")
        kind = FabricRefused if _is_refusal(text) else FabricUnavailable
        return kind(f"{told}: {text}")

    async def _on_error(self, error: Exception) -> None:
        self._last_error = error
        text = str(error).removeprefix("nats: ")
        if not text.lower().startswith("permissions violation"):
            refused = _is_refusal(text)
            kind = "AuthorizationViolation" if refused else type(error).__name__
            why = {"reason": fault_in_words(error, "nats.ca")} if isinstance(error, OSError | TimeoutError) else {}
            log.warning("fabric.error", kind=kind, **why)
            self._refusals = self._refusals + 1 if refused else 0
            if self._refusals == MAX_REFUSALS:
                self._closing = tasks.detach("end of a connection", self._end())
            return
        self.denials += 1
        self.denied = text
        self.on_denied(text)
        log.warning("fabric.denied", role=self.credential.name, denied=text)

    async def _on_change(self) -> None:
        self._changed.set()

    async def _on_reconnect(self) -> None:
        log.info("fabric.reconnected")
        self._refusals = 0
        self.on_reconnect()
        self._changed.set()

    @property
    def connected(self) -> bool:
        return self.client.is_connected

    @property
    def address(self) -> str:
        """The address of the server that it is connected to."""
        url = self.client.connected_url
        return "no server" if url is None else url.geturl()

    @property
    def lost(self) -> bool:
        return self.client.is_closed

    async def wait_connected(self) -> None:
        """Waits until the connection is up. Raises FabricLost if it is lost for good."""
        while not self.connected:
            if self.lost:
                raise FabricLost("NATS ended the connection for good: check that the credential is current, then restart")
            await self._change()

    async def wait_lost(self) -> None:
        """Waits until the connection is closed, or ended by NATS for good. It does not come back after that."""
        while not self.lost:
            await self._change()

    async def _change(self) -> None:
        self._changed.clear()
        await self._changed.wait()

    async def manifest(self) -> bytes | None:
        """The manifest document in the trust bucket; None if none was published. Raises FabricUnavailable."""
        async with self.mapped():
            return await self.newest(f"KV_{subjects.TRUST_BUCKET}", subjects.manifest()) or None

    async def newest(self, stream: str, subject: str) -> bytes | None:
        """The payload of a subject's last message, from any replica; None if there is none. Raises as `ask`."""
        message = await self.client.request(f"{subjects.API}.DIRECT.GET.{stream}.{subject}", timeout=API_TIMEOUT)
        status = headers_of(message).get(STATUS)
        if status is None:
            return bytes(message.data)
        if status == _NOT_FOUND:
            return None
        raise nats.js.errors.APIError(code=int(status), description=headers_of(message).get(DESCRIPTION))

    async def stored(self, stream: str, asked: Mapping[str, int | str], *, limit: float = API_TIMEOUT) -> Stored:
        """A message of a stream, from its leader. Raises as `ask`.

        asked: `last_by_subj`, or `seq`, or `seq` and `next_by_subj`. limit: seconds for the answer.
        """
        try:
            return Stored.parse((await self.ask(f"STREAM.MSG.GET.{stream}", asked, limit=limit)).get("message"))
        except InvalidMessage as exc:
            raise nats.errors.ProtocolError from exc

    async def missing(self, stream: str, sequences: Collection[int]) -> frozenset[int]:
        """Those of `sequences` that are no longer in the stream; all if the stream does not exist. Raises FabricUnavailable."""
        async with self.mapped():
            try:
                state = (await self.ask(f"STREAM.INFO.{stream}", {"deleted_details": True})).get("state")
            except nats.js.errors.NotFoundError:
                return frozenset(sequences)
        try:
            members = Members(state, "the stream's state")
            first, last = members.count("first_seq"), members.count("last_seq")
        except InvalidMessage as exc:
            raise FabricUnavailable("NATS describes a stream in an unknown form") from exc
        deleted = frozenset(state.get("deleted") or ()) if isinstance(state, dict) else frozenset()
        return frozenset(one for one in sequences if not first <= one <= last or one in deleted)

    async def ask(
        self, what: str, asked: Mapping[str, int | str | bool], *, limit: float = API_TIMEOUT
    ) -> Mapping[str, object]:
        """Calls JetStream's API. Raises nats.errors.Error; JetStream's own errors are subclasses of it.

        The library's own calls trust data that a peer stored, and can raise any exception on it.
        """
        message = await self.client.request(f"{subjects.API}.{what}", json.dumps(asked).encode(), timeout=limit)
        said = object_in(message.data)
        if said is None:
            raise nats.errors.ProtocolError
        if isinstance(error := said.get("error"), dict):
            code, number, text = error.get("code"), error.get("err_code"), str(error.get("description", ""))[:_MAX_TEXT]
            kind = nats.js.errors.NotFoundError if code == int(_NOT_FOUND) else nats.js.errors.APIError
            raise kind(code=code, err_code=number, description=text)
        return said

    @asynccontextmanager
    async def mapped(self, *, confirmed: bool = False) -> AsyncIterator[None]:
        """Maps the library's errors to FabricUnavailable, and reports a denial that arrives meanwhile.

        confirmed: for operations without an answer (subscriptions, plain messages): a round trip finds out whether they were
        denied.
        """
        denials = self.denials
        try:
            yield
            if confirmed:
                await self.round_trip()
        except (nats.errors.Error, TimeoutError) as exc:
            raise self.unavailable(exc, denials) from exc
        if confirmed and self.denials != denials:
            raise FabricUnavailable(self._denial())

    async def round_trip(self) -> None:
        """Waits until the server has processed everything published before, and has reported what it denies.

        Two pings are needed: the library may still buffer messages when it sends the first. They are sent before the second.
        """
        await self.client.flush(CONNECT_TIMEOUT)
        await self.client.flush(CONNECT_TIMEOUT)

    def unavailable(self, error: Exception, denials: int) -> FabricUnavailable:
        """The exception for `error`. denials: how many there were before the failed call."""
        if self.denials != denials:
            return FabricUnavailable(self._denial())
        if isinstance(error, nats.js.errors.APIError) and error.err_code == TOO_MANY_REQUESTS:
            return FabricBusy("NATS has too many writes waiting: a client floods it")
        if isinstance(error, nats.js.errors.APIError) and error.err_code and error.description:
            # JetStream's own reason, for example that a stream is full
            return FabricUnavailable(f"NATS refuses: {error.description}")
        if isinstance(error, nats.errors.NoRespondersError | nats.js.errors.ServiceUnavailableError):
            return FabricUnavailable("no service on NATS answers: run `lacre up`, or provision the fabric")
        if isinstance(error, nats.js.errors.APIError) and error.description:
            return FabricUnavailable(f"NATS refuses: {error.description}")
        if isinstance(error, TimeoutError):
            return FabricUnavailable("NATS did not answer")
        return FabricUnavailable(f"NATS cannot be used: {type(error).__name__}")

    def _denial(self) -> str:
        return f"NATS denies {self.credential.name} this: {self.denied}"

    async def close(self) -> None:
        if self._closing is not None:
            await tasks.settle(self._closing, limit=tasks.END_LIMIT)
        if not self.client.is_closed:
            await self._end()

    async def _end(self) -> None:
        # If the server is gone with unsent data, uvloop raises a RuntimeError for what asyncio ignores.
        with suppress(nats.errors.Error, OSError, RuntimeError, TimeoutError):
            async with asyncio.timeout(tasks.END_LIMIT):
                await self.client.close()
        self._changed.set()  # the library calls its callback last, and not at all after such an error


def _is_refusal(text: str) -> bool:
    return "authorization violation" in text.lower()


def headers_of(message: Msg) -> dict[str, str]:
    headers: dict[str, Any] | None = message.headers
    return {} if headers is None else {str(name): str(value) for name, value in headers.items()}
