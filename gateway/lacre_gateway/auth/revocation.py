"""Which tokens are refused before they expire. The fabric holds the list; every gateway keeps a copy, and checks it for new
entries several times a second.

Rules:
- A gateway whose list may be outdated refuses every request: one that has never read it, or not for `MAX_AGE`. That costs
  nothing, because the list is read over the same connection that requests use.
- An entry stays until its time is over, even if the bucket loses it.
"""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Final, Protocol

from lacre.errors import LacreError, UsageError
from lacre.runtime import tasks
from lacre_fabric.logs import Log
from lacre_fabric.work.contract import GatewayFabric
from lacre_fabric.work.revocations import Revocation, StoreMark, subject_key, token_key
from lacre_gateway.settings import Issuer

LOOK: Final = 0.1  # seconds between two checks: a busy machine may take longer, and the promise is one second
# Seconds. NATS takes some to choose a new leader for a bucket, and most of a request needs that leader too.
MAX_AGE: Final = 10.0
_SWEEP: Final = 60.0  # seconds between removals of expired entries


class RevocationSource(Protocol):
    """Where revocations are read: the fabric."""

    async def revoked(self) -> list[Revocation]:
        """Those since the last call. Raises FabricUnavailable."""
        ...

    @property
    def store_mark(self) -> StoreMark: ...


class RevocationList:
    """One gateway's copy. clock: seconds since the epoch."""

    def __init__(self, log: Log, clock: Callable[[], float] = time.time) -> None:
        self.report: Callable[[Sequence[str]], None] | None = None  # hears the keys of revocations that others made
        self._log = log
        self._clock = clock
        self._entries: dict[str, tuple[float, float]] = {}  # by key: until, and the last time of issue that it revokes
        self._read_at = -math.inf  # on the monotonic clock: when the last successful check began
        self._sweep_at = time.monotonic() + _SWEEP
        self._failure = ""
        self._mark = StoreMark()
        self._following: tasks.Background | None = None

    def __len__(self) -> int:
        return len(self._entries)

    def __iter__(self) -> Iterator[Revocation]:
        """Entries that have not expired."""
        now = self._clock()
        for key, (until, meant) in self._entries.items():
            if now < until:
                yield Revocation(key, until, None if meant == math.inf else meant)

    @property
    def current(self) -> bool:
        """Whether the copy is recent enough to decide by, and the fabric has lost none of it."""
        return time.monotonic() < self._read_at + MAX_AGE and not self._mark.lost

    @property
    def lost(self) -> tuple[str, ...]:
        """The stores that NATS lost and nobody has settled: see `lacre_fabric.operate.stores`."""
        return self._mark.lost

    @property
    def fault(self) -> str:
        """Why the copy is not `current`, for the log."""
        if self.lost:
            return f"stores: NATS lost {', '.join(self.lost)}: run `lacre state settle`"
        return "revocations: the list is not current"

    def refuses(self, keys: Sequence[str], issued: float) -> bool:
        """keys: the token's own and its subject's. issued: when the token was issued, in seconds since the epoch."""
        if issued <= self._mark.tokens_from:
            return True
        for key in keys:
            entry = self._entries.get(key)
            if entry is not None and issued <= entry[1] and self._clock() < entry[0]:
                return True
        return False

    def add(self, revocation: Revocation) -> bool:
        """Of two entries for one key, keeps one that refuses everything that either does. Returns whether it changed."""
        meant = math.inf if revocation.issued_until is None else revocation.issued_until
        until, before = self._entries.get(revocation.key, (-math.inf, -math.inf))
        entry = max(until, revocation.until), max(before, meant)
        if self._entries.get(revocation.key) == entry:
            return False
        self._entries[revocation.key] = entry
        return True

    async def refresh(self, fabric: RevocationSource) -> None:
        """Reads the list once. Raises FabricUnavailable, and keeps the known entries."""
        began = time.monotonic()
        new = [revocation.key for revocation in await fabric.revoked() if self.add(revocation)]
        if new and self.report is not None and self._read_at > -math.inf:  # the first read has all that exist
            self.report(new)
        if fabric.store_mark != self._mark:
            self._mark = fabric.store_mark
            if self._mark.lost:
                self._log.error("stores.lost", reason=", ".join(self._mark.lost), remedy="run `lacre state settle`")
            else:
                self._log.warning("stores.settled")
        self._read_at = began
        if began >= self._sweep_at:
            self._sweep_at = began + _SWEEP
            now = self._clock()
            self._entries = {key: entry for key, entry in self._entries.items() if now < entry[0]}

    async def start(self, fabric: Callable[[], GatewayFabric]) -> None:
        """Checks once (a failure is not fatal: the fabric may start later), then every `LOOK` seconds. Idempotent."""
        await self._try(fabric)
        if self._following is None:
            self._following = tasks.start("revocations", partial(self._follow, fabric))

    async def close(self) -> None:
        if self._following is not None:
            await self._following.close()
            self._following = None

    async def _follow(self, fabric: Callable[[], GatewayFabric]) -> None:
        while True:
            await asyncio.sleep(LOOK)
            await self._try(fabric)

    async def _try(self, fabric: Callable[[], GatewayFabric]) -> None:
        try:
            await self.refresh(fabric())
        except LacreError as exc:
            failure = str(exc)
        except Exception as exc:  # noqa: BLE001 - foreign text: any failure is a failed check
            failure = f"unforeseen {type(exc).__name__}"
            if failure != self._failure:
                tasks.failed("revocations", exc)
        else:
            failure = ""
        if failure and failure != self._failure:  # once, not at every check
            self._log.warning("revocations not read", reason=failure)
        self._failure = failure


def revocation(
    issuers: Sequence[Issuer],
    *,
    jti: str | None = None,
    subject: str | None = None,
    issuer: str | None = None,
    until: float | None = None,
    now: float,
) -> Revocation:
    """The revocation of one token, or of all that a subject was issued until `now`. Raises UsageError.

    issuer: may be omitted if there is only one. until: when the last such token expires; default: the maximum token lifetime of
    this issuer from now on, which is always enough. Times in seconds since the epoch.
    """
    trusted = issuer_named(issuers, issuer)
    # An issuer's clock may be ahead by the leeway, and the gateway accepts a token for that much longer than it says.
    longest = now + trusted.token_lifetime + 2 * trusted.leeway
    until = longest if until is None else min(until + trusted.leeway, longest)
    if until <= now:
        raise UsageError("--until is in the past: tokens that expired by then are refused anyway")
    if not all(name is None or name.strip() for name in (jti, subject)):
        raise UsageError("--jti or --sub is empty and would revoke nothing: pass the token's id, or the subject")
    if jti is not None and subject is None:
        return Revocation(token_key(trusted.issuer, jti), until)
    if subject is not None and jti is None:
        return Revocation(subject_key(trusted.issuer, subject), until, issued_until=now)
    raise UsageError("pass either --jti for one token, or --sub for all tokens of a subject")


def issuer_named(issuers: Sequence[Issuer], name: str | None) -> Issuer:
    """The issuer of this name; None: the only one. Raises UsageError."""
    named = [issuer for issuer in issuers if name in (None, issuer.issuer)]
    if len(named) != 1:
        raise UsageError(f"name the token's issuer with --issuer, one of: {', '.join(issuer.issuer for issuer in issuers)}")
    return named[0]
