"""Sends events to an operator's webhook, signed as Standard Webhooks 1.0 says, in the background.

Rules:
- `send` returns at once. At most `MAX_WAITING` events wait; further ones are dropped.
- One event is sent at a time, and one try takes `TIME_LIMIT` at most. A failed event waits for its next try while others go on.
  It is given up after the last of `TRIES`, and when it is out of date.
- Each event that is not delivered has a line in the log, with its id, its limit and its budget's digest.
- An event keeps its id over all tries, and also when several gateways report it: receivers count an id once.
- The log names neither the address nor anything of the answer: an address may hold a secret.
- The operator chose the address, so it may be a private one. Over https, the certificate proves who is there.
- A new secret or CA counts from the next try on. A file that cannot be used changes nothing.
"""

from __future__ import annotations

import asyncio
import base64
import binascii
import hashlib
import heapq
import hmac
import itertools
import json
import re
import ssl
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any, Final

import httpx2

from lacre.errors import SettingsError
from lacre.runtime import tasks
from lacre.runtime.authorities import trusting
from lacre.runtime.watched_files import WatchedFiles
from lacre.transport.fault_words import fault_in_words
from lacre_fabric.keys.secret_files import read_secret
from lacre_fabric.logs import Log
from lacre_gateway.auth.fetch import FetchFailed, make_client
from lacre_gateway.settings import Webhook

MAX_WAITING: Final = 256  # events of 1 KiB
TIME_LIMIT: Final = 10.0  # seconds for one try
# Seconds before each try: a receiver may be restarted meanwhile, or be away for a night's maintenance.
TRIES: Final = (0.0, 5.0, 30.0, 120.0, 600.0, 3600.0, 7200.0, 14400.0)
_LOOK: Final = 0.25  # seconds between two looks for events that are due
_PREFIX: Final = "whsec_"
_SECRET_BYTES: Final = range(24, 65)  # of the specification
_MAX_SECRETS: Final = 2  # the new one and, while receivers change, the old one
_REMEDY: Final = "Make one: printf 'whsec_%s' \"$(openssl rand -base64 32)\" > FILE; chmod 600 FILE"
_NO_CLIENT: Final = "correct SSL_CERT_FILE, SSL_CERT_DIR and the *_PROXY variables"
_GONE: Final = 410  # the receiver wants no more of it
_IDS: Final = re.compile(r"[A-Za-z0-9_-]{1,64}")  # no full stop, which separates the signed parts


@dataclass(frozen=True, slots=True)
class WebhookEvent:
    """id: the same for the same event, from any gateway. time: when it happened, in seconds since the epoch. until: when it is
    out of date; None: never. noted: facts for the log, which hold no name.
    """

    id: str
    type: str
    time: float
    data: dict[str, Any]
    until: float | None = None
    noted: Mapping[str, str] = field(default_factory=dict)

    def body(self) -> bytes:
        at = datetime.fromtimestamp(self.time, UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")
        return json.dumps({"type": self.type, "timestamp": at, "data": self.data}, separators=(",", ":")).encode()


def read_keys(path: Path) -> tuple[bytes, ...]:
    """The secrets of a private file, one a line, the newest first. Raises SettingsError."""
    lines = read_secret(path, _REMEDY).decode("ascii", "replace").split()
    if not 1 <= len(lines) <= _MAX_SECRETS:
        raise SettingsError(f"alerts.secret: {path} must have one secret, or two while you change it. {_REMEDY}")
    return tuple(_key(line, path) for line in lines)


def _key(line: str, path: Path) -> bytes:
    try:
        key = base64.b64decode(line.removeprefix(_PREFIX), validate=True)
    except (binascii.Error, ValueError):
        key = b""
    if not line.startswith(_PREFIX) or len(key) not in _SECRET_BYTES:
        raise SettingsError(f"alerts.secret: {path} must hold `whsec_` and base64 of 24 to 64 bytes. {_REMEDY}")
    return key


def signed(keys: Sequence[bytes], event_id: str, timestamp: int, body: bytes) -> dict[str, str]:
    """The header fields of one try."""
    content = f"{event_id}.{timestamp}.".encode() + body
    signatures = (base64.b64encode(hmac.digest(key, content, hashlib.sha256)).decode() for key in keys)
    return {
        "content-type": "application/json",
        "webhook-id": event_id,
        "webhook-timestamp": str(timestamp),
        "webhook-signature": " ".join(f"v1,{signature}" for signature in signatures),
    }


@dataclass(order=True, slots=True)
class _Waiting:
    """due: on the monotonic clock. tried: how often."""

    due: float
    number: int
    event: WebhookEvent = field(compare=False)
    tried: int = field(default=0, compare=False)


class WebhookSender:
    """Used on one event loop. Ends with `close`, which gives up what still waits.

    clock: seconds since the epoch, for signatures: receivers reject one that is minutes off. Raises SettingsError: a mistake
    ends the start, and not each try.
    """

    def __init__(
        self, settings: Webhook, log: Log, clock: Callable[[], float] = time.time, tries: Sequence[float] = TRIES
    ) -> None:
        self._url = settings.url
        self._log = log
        self._clock = clock
        self._tries = tries
        self._keys = WatchedFiles([settings.secret], partial(read_keys, settings.secret), partial(self._told, "secret"))
        self._trust: WatchedFiles[ssl.SSLContext] | None = None
        if settings.ca is not None:
            self._trust = WatchedFiles([settings.ca], partial(trusting, settings.ca, "alerts.ca"), partial(self._told, "ca"))
        self._trusted = None if self._trust is None else self._trust.value  # the CAs of `_client`
        self._client = self._make_client()
        self._waiting: list[_Waiting] = []
        self._numbers = itertools.count()
        self._task: asyncio.Task[object] | None = None
        self._closing = False

    @property
    def files(self) -> Sequence[WatchedFiles[Any]]:
        """Those to look at while the gateway serves."""
        return [self._keys] if self._trust is None else [self._keys, self._trust]

    def _make_client(self) -> httpx2.AsyncClient:
        """Raises SettingsError."""
        try:
            return make_client(self._url, self._trusted)
        except FetchFailed:  # its text has the address
            raise SettingsError(f"alerts: no client for the webhook: {_NO_CLIENT}") from None

    def _told(self, what: str, reason: str | None) -> None:
        if reason is None:
            self._log.info(f"webhook {what} taken")
        else:
            self._log.error(f"webhook {what} refused, the last good one stays", reason=reason)

    def send(self, event: WebhookEvent) -> None:
        """Returns at once."""
        assert _IDS.fullmatch(event.id)  # noqa: S101 - a mistake of the program
        if self._closing or len(self._waiting) >= MAX_WAITING:
            self._lost(_Waiting(0.0, 0, event), "the gateway ends" if self._closing else "too many alerts wait")
            return
        heapq.heappush(self._waiting, _Waiting(time.monotonic() + self._tries[0], next(self._numbers), event))
        if self._task is None or self._task.done():
            self._task = tasks.detach("alerts", self._run())

    async def close(self) -> None:
        self._closing = True
        if self._task is not None:
            await tasks.end(self._task)
        for waiting in self._waiting:
            self._lost(waiting, "the gateway ends")
        self._waiting.clear()
        await self._client.aclose()

    def _lost(self, waiting: _Waiting, reason: str) -> None:
        event = waiting.event
        told = {"reason": reason, "number": waiting.tried, "id": event.id, **event.noted}
        self._log.error("alert given up", remedy="check the webhook of [alerts]", **told)

    async def _run(self) -> None:
        while self._waiting:
            if (left := self._waiting[0].due - time.monotonic()) > 0:
                await asyncio.sleep(min(left, _LOOK))
                continue
            # It stays among those that wait until it is delivered or given up, so that `close` finds it.
            waiting = self._waiting[0]
            event, fault = waiting.event, None
            if waiting.tried and event.until is not None and self._clock() >= event.until:
                heapq.heappop(self._waiting)
                self._lost(waiting, "the limit's window has ended")
                continue
            fault = await self._try(event)
            self._waiting.remove(waiting)
            heapq.heapify(self._waiting)
            if fault is None:
                continue
            waiting.tried += 1
            if waiting.tried == len(self._tries) or fault == str(_GONE):
                self._lost(waiting, fault)
                continue
            self._log.warning("alert not delivered", reason=fault, number=waiting.tried, id=event.id, **event.noted)
            waiting.due = time.monotonic() + self._tries[waiting.tried]
            heapq.heappush(self._waiting, waiting)

    async def _renew(self) -> None:
        """Uses the CAs of the newest file."""
        if self._trust is not None and self._trust.value is not self._trusted:
            old, self._trusted = self._client, self._trust.value
            self._client = self._make_client()
            await old.aclose()

    async def _try(self, event: WebhookEvent) -> str | None:
        """The fault, in our own words; None: it was delivered. The answer's body is not read."""
        body = event.body()
        headers = signed(self._keys.value, event.id, int(self._clock()), body)
        try:
            await self._renew()
            async with asyncio.timeout(TIME_LIMIT):
                async with self._client.stream("POST", self._url, content=body, headers=headers) as response:
                    return None if response.is_success else str(response.status_code)
        except (TimeoutError, httpx2.TimeoutException):
            return "it took too long"
        except (httpx2.HTTPError, httpx2.InvalidURL) as exc:
            return fault_in_words(exc, "`ca` of [alerts]")
        except Exception as exc:  # noqa: BLE001 - foreign text: any failure is a failed try
            tasks.failed("alerts", exc)
            return "the connection failed"
