"""The keys of an issuer that publishes them: found by OpenID Connect Discovery, or at an address in the settings.

Rules:
- An unusable set (empty, poisoned, malformed) never replaces a good one. Nor does an unreachable issuer: the keys stay for
  `stale_limit` seconds after they were last seen, and no longer.
- Any failure of a fetch is just a failed fetch, and the next one follows. Keys that are too old are never used, even if nothing
  has dropped them.
- When a key leaves the set, tokens of that key are no longer accepted, and verdicts about them are forgotten (`epoch`).
- However many tokens name unknown keys, the issuer is asked once for all of them, and once per `cooldown`.
"""

from __future__ import annotations

import asyncio
import math
import ssl
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Final

import httpx2
import jwt

from lacre.errors import LacreError
from lacre.runtime import tasks
from lacre.runtime.authorities import trusting
from lacre.runtime.hosts import without_secrets
from lacre.runtime.watched_files import WatchedFiles
from lacre_fabric.logs import Log
from lacre_gateway.auth.fetch import FetchFailed, fetch, make_client
from lacre_gateway.auth.jwks import KeySet
from lacre_gateway.settings import fetchable

MAX_WAITING: Final = 256  # tokens with unknown keys that may wait for the issuer at a time
MAX_REASON: Final = 1000  # characters in the log about faulty keys; a set may have a hundred of them
_METADATA_LIVES: Final = 3600.0  # seconds: an address rarely changes, and is fetched again when it fails
WELL_KNOWN: Final = "/.well-known/openid-configuration"  # OpenID Connect Discovery 1.0 section 4


class KeysUnavailable(LacreError):
    """The token cannot be judged now, because its issuer cannot be reached."""


@dataclass(frozen=True, slots=True)
class Timing:
    """Seconds. least, default: between fetches if the issuer names less, or nothing. retry, patience: after a failure, doubled
    up to patience. cooldown: between fetches for unknown keys. stale_limit: how long keys stay valid while their issuer is
    unreachable.
    """  # fmt: skip

    least: float = 60.0
    default: float = 600.0
    retry: float = 2.0
    patience: float = 60.0
    cooldown: float = 2.0
    stale_limit: float = 86400.0


class RemoteKeys:
    """An issuer's `KeySet`, kept current.

    address: of the set itself; None: discovery finds it. place: the settings key, for the log.
    ca: the PEM file of the CA for its addresses; None: the system's CAs. A renewed file counts from the next fetch on. Raises
    SettingsError if the file cannot be used.
    """

    def __init__(
        self,
        issuer: str,
        address: str | None,
        algorithms: Sequence[str],
        *,
        place: str,
        log: Log,
        timing: Timing | None = None,
        ca: Path | None = None,
    ) -> None:
        self._issuer = issuer
        self._address = address
        self._algorithms = algorithms
        self._place = place
        self._log = log
        self.trust: WatchedFiles[ssl.SSLContext] | None = None
        self._trusted: ssl.SSLContext | None = None  # the CAs of `_client`
        if ca is not None:
            self.trust = WatchedFiles([ca], partial(trusting, ca, f"{place}.ca"), self._told_ca)
        self._timing = timing or Timing()
        self._client: httpx2.AsyncClient | None = None
        self._found_at: str | None = None  # the address from discovery
        self._found_until = -math.inf  # on the monotonic clock, like all times here
        self._keys: KeySet | None = None
        self._etag: str | None = None
        self._good_until = -math.inf
        self._look_at = -math.inf
        self._last_look = -math.inf
        self._failure = ""
        self._failures = 0
        self._fetching = False
        self._looking: asyncio.Task[None] | None = None
        self._keeping: tasks.Background | None = None
        self._waiting = 0
        self.epoch = 0

    @property
    def usable(self) -> bool:
        return self._keys is not None

    def find(self, kid: object, alg: object) -> jwt.PyJWK | None:
        keys = self._keys
        return None if keys is None or time.monotonic() >= self._good_until else keys.find(kid, alg)

    async def seek(self, kid: object, alg: object) -> jwt.PyJWK | None:
        """Asks the issuer for an unknown key; None if it has none of that name. Raises KeysUnavailable."""
        if self._waiting >= MAX_WAITING:
            raise KeysUnavailable("too many tokens wait for their issuer")
        self._waiting += 1
        try:
            late = self._fetching  # the present fetch may be older than the key
            await self._look()
            key = self.find(kid, alg)
            if key is None and late:
                await self._look()
                key = self.find(kid, alg)
        finally:
            self._waiting -= 1
        if key is None and self._failure:
            raise KeysUnavailable(f"the issuer's keys cannot be fetched: {self._failure}")
        return key

    def start(self) -> None:
        """Fetches the keys, and keeps doing so as long as the process runs. Idempotent."""
        if self._keeping is None:
            self._keeping = tasks.start("issuer keys", self._keep)

    async def fetched(self) -> str:
        """Fetches them now. Returns why that failed; empty if it did not."""
        await self._look()
        return self._failure

    async def close(self) -> None:
        if self._keeping is not None:
            await self._keeping.close()
        if self._looking is not None:
            await tasks.end(self._looking)
        self._keeping = None
        if self._client is not None:
            await self._client.aclose()

    async def _keep(self) -> None:
        while True:
            now = time.monotonic()
            if self._keys is not None and now >= self._good_until:
                self._drop()
            if now >= self._look_at:
                await self._look()
            else:
                await asyncio.sleep((self._look_at if self._keys is None else min(self._look_at, self._good_until)) - now)

    async def _look(self) -> None:
        """The running fetch, or else a new one. Never fails: see `_failure`."""
        if self._looking is None:
            self._looking = tasks.spawn("look for issuer keys", self._ask())
        await asyncio.shield(self._looking)

    async def _ask(self) -> None:
        try:
            await asyncio.sleep(max(0.0, self._last_look + self._timing.cooldown - time.monotonic()))
            self._last_look, self._fetching = time.monotonic(), True
            try:
                self._succeeded(await self._fetch())
            except LacreError as exc:
                self._failed(str(exc))
            except Exception as exc:  # noqa: BLE001 - foreign text: any failure is a failed fetch
                tasks.failed("issuer keys", exc)
                self._failed(f"unexpected {type(exc).__name__}: see the log")
        finally:
            self._looking, self._fetching = None, False

    async def _fetch(self) -> float | None:
        """How many seconds the set may be kept. Raises FetchFailed or SettingsError."""
        client = await self._http()
        address = await self._where(client)
        answer = await fetch(client, address, self._etag)
        if answer.value is not None:
            self._replace(KeySet.parse(answer.value, self._algorithms, f"{self._place}: {without_secrets(address)}"))
            self._etag = answer.etag
        return answer.fresh

    async def _where(self, client: httpx2.AsyncClient) -> str:
        """The address of the key set. Raises FetchFailed."""
        if self._address is not None:
            return self._address
        if self._found_at is None or time.monotonic() >= self._found_until:
            url = self._issuer.rstrip("/") + WELL_KNOWN
            said = (await fetch(client, url, None)).value
            address = said.get("jwks_uri") if isinstance(said, Mapping) and said.get("issuer") == self._issuer else None
            if not isinstance(address, str) or not fetchable(address, plain=self._issuer.startswith("http:")):
                raise FetchFailed(f"{without_secrets(url)} does not describe the issuer {self._issuer} with an https jwks_uri")
            if address != self._found_at:
                self._found_at, self._etag = address, None
            self._found_until = time.monotonic() + _METADATA_LIVES
        return self._found_at

    async def _http(self) -> httpx2.AsyncClient:
        """A client that trusts the CAs of the newest file. Raises FetchFailed."""
        if self.trust is not None:
            await asyncio.to_thread(self.trust.refresh)
            if self._client is not None and self._trusted is not self.trust.value:
                client, self._client = self._client, None
                await client.aclose()
            self._trusted = self.trust.value
        if self._client is None:
            self._client = make_client(self._address or self._issuer, self._trusted)
        return self._client

    def _told_ca(self, reason: str | None) -> None:
        if reason is None:
            self._log.info("issuer ca taken", issuer=self._issuer)
        else:
            self._log.error("issuer ca refused, the last good one stays", issuer=self._issuer, reason=reason)

    def _replace(self, keys: KeySet) -> None:
        if self._keys is not None and not self._keys <= keys:
            self.epoch += 1
        if keys.passed_over and (self._keys is None or keys.passed_over != self._keys.passed_over):  # once, not at every fetch
            self._log.warning("issuer keys ignored", issuer=self._issuer, reason="; ".join(keys.passed_over)[:MAX_REASON])
        self._keys = keys

    def _succeeded(self, fresh: float | None) -> None:
        timing, now = self._timing, self._last_look
        if self._failure:
            self._log.info("issuer keys read again", issuer=self._issuer)
        self._failure, self._failures = "", 0
        self._look_at = now + (timing.default if fresh is None else max(timing.least, fresh))
        self._good_until = now + max(timing.stale_limit, self._look_at - now)

    def _failed(self, reason: str) -> None:
        timing = self._timing
        self._look_at = time.monotonic() + min(timing.patience, timing.retry * 2.0 ** min(self._failures, 16))
        self._failures += 1
        self._found_until = -math.inf  # the address of the set may have changed
        if reason != self._failure:  # once, not at every fetch
            self._log.warning("issuer keys not read", issuer=self._issuer, reason=reason)
        self._failure = reason

    def _drop(self) -> None:
        self._log.error("issuer keys too old", issuer=self._issuer, reason=self._failure)
        self._keys, self._etag = None, None
        self.epoch += 1
