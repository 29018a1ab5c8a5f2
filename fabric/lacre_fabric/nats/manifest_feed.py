"""Keeps a process's manifest current: read from the fabric, verified against the pinned root, never an older one."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Final

import structlog

from lacre.errors import LacreError, UsageError
from lacre.runtime import tasks
from lacre.trust.chain import Trusted
from lacre.trust.manifest import Manifest
from lacre.trust.manifest_store import Memory, VersionFile, VersionMemory, accept

POLL: Final = 2.0  # seconds; a rotation is live in gateways and workers this soon
CATCH_UP: Final = 0.5  # seconds between looks that requests ask for: key ids that nobody has must not load the fabric

log = structlog.get_logger("lacre.trust.manifest")


def memory_in(folder: Path | None) -> Memory:
    """What remembers manifests in `folder`; without one, in this process alone."""
    return VersionMemory() if folder is None else VersionFile(folder)


class ManifestFeed:
    """fetch: the served document, or None where none was published; root: the pinned root key. clock: seconds.
    poll: seconds from one reading to the next.
    """  # fmt: skip

    def __init__(
        self,
        fetch: Callable[[], Awaitable[bytes | None]],
        root: bytes,
        *,
        memory: Memory | None = None,
        clock: Callable[[], float] = time.time,
        poll: float = POLL,
    ) -> None:
        self._fetch = fetch
        self._root = root
        self._memory = VersionMemory() if memory is None else memory
        self._clock = clock
        self._interval = poll
        self.failure: Exception | None = None  # why the last reading gave no manifest
        self._trusted: Trusted | None = None
        self._polling: tasks.Background | None = None
        self._catching_up = asyncio.Lock()
        self._refreshing = asyncio.Lock()  # what was read first must not be taken last
        self._caught_up = float("-inf")

    @property
    def ready(self) -> bool:
        return self._trusted is not None and self._clock() < self._trusted.manifest.expires_at

    @property
    def known(self) -> bool:
        """Whether a manifest was verified; it may have expired since."""
        return self._trusted is not None

    @property
    def manifest(self) -> Manifest:
        """The current manifest; UsageError while there is none (`ready` is False)."""
        return self._current().manifest

    @property
    def document(self) -> bytes:
        """What `GET /v1/manifest` serves."""
        return self._current().document

    async def refresh(self) -> None:
        """Reads and verifies once. Raises what failed, and keeps what was there."""
        async with self._refreshing:
            document = await self._fetch()
            if document is not None and (self._trusted is None or document != self._trusted.document):
                # In a thread: it verifies signatures, and waits for the file's lock.
                self._trusted = await asyncio.to_thread(accept, document, self._root, self._memory, self._clock())

    async def start(self) -> None:
        """A first read (its failure is not fatal: the fabric may come up later), then one each `poll` seconds. Idempotent."""
        await self._try()
        if self._polling is None:
            self._polling = tasks.start("manifest", self._poll)

    async def close(self) -> None:
        if self._polling is not None:
            await self._polling.close()
            self._polling = None

    async def catch_up(self) -> None:
        """Looks now, for a request that names what this manifest does not have."""
        async with self._catching_up:
            if time.monotonic() >= self._caught_up + CATCH_UP:
                await self._try()
                self._caught_up = time.monotonic()

    async def _poll(self) -> None:
        while True:
            await asyncio.sleep(self._interval)
            await self._try()

    async def _try(self) -> None:
        try:
            await self.refresh()
        except LacreError as exc:
            if type(exc) is not type(self.failure):  # once, not with every reading
                log.warning("manifest.not_taken", kind=type(exc).__name__)
            self.failure = exc
        except Exception as exc:  # noqa: BLE001 - others wrote what is read: a failed look is a failed look
            if type(exc) is not type(self.failure):
                tasks.failed("manifest", exc)
            self.failure = exc
        else:
            self.failure = None

    def _current(self) -> Trusted:
        if self._polling is not None:
            self._polling.check()
        if self._trusted is None:
            raise UsageError("no manifest yet: `lacre manifest publish` puts one on the fabric")
        return self._trusted
