"""Keeps a process's manifest current: reads it from the fabric, verifies it against the pinned root, and never takes an older
one.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Final

import structlog

from lacre.errors import LacreError, Rollback, UsageError
from lacre.runtime import tasks
from lacre.trust.chain import Trusted
from lacre.trust.manifest import Manifest
from lacre.trust.manifest_store import Memory, VersionFile, VersionMemory, accept

POLL: Final = 2.0  # seconds; gateways and workers see a rotation this soon
CATCH_UP: Final = 0.5  # seconds between reads that requests trigger: unknown key ids must not load the fabric

_OLDER: Final = "the fabric has an older manifest than this process has seen"
_PUT_BACK: Final = "the publisher's state folder is an old copy: see docs/rotation.md, After a restore"

log = structlog.get_logger("lacre.trust.manifest")


def memory_in(folder: Path | None) -> Memory:
    """The memory of accepted manifests, in `folder`; None: in this process only."""
    return VersionMemory() if folder is None else VersionFile(folder)


class ManifestFeed:
    """Polls the fabric for the manifest, and keeps the newest valid one.

    fetch: returns the served document; None if none was published. root: the pinned root key. clock: seconds. poll: seconds
    between reads.
    """

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
        self.failure: Exception | None = None  # why the last read gave no manifest
        self.report: Callable[[Manifest, Manifest], None] = lambda _before, _now: None  # told of each newer manifest
        self.ignored = 0  # older manifests that the fabric offered
        self._ignored: bytes | None = None  # the last one of them
        self._trusted: Trusted | None = None
        self._polling: tasks.Background | None = None
        self._catching_up = asyncio.Lock()
        self._refreshing = asyncio.Lock()  # so that an older read never replaces a newer one
        self._caught_up = float("-inf")

    @property
    def ready(self) -> bool:
        return self._trusted is not None and self._clock() < self._trusted.manifest.expires_at

    @property
    def known(self) -> bool:
        """Whether a manifest was verified. It may have expired since."""
        return self._trusted is not None

    @property
    def manifest(self) -> Manifest:
        """The current manifest. Raises UsageError while there is none."""
        return self._current().manifest

    @property
    def document(self) -> bytes:
        """The document that `GET /v1/manifest` serves."""
        return self._current().document

    async def refresh(self) -> None:
        """Reads and verifies once. On failure it raises and keeps the old manifest."""
        async with self._refreshing:
            document = await self._fetch()
            if document is not None and (self._trusted is None or document != self._trusted.document):
                # In a thread, because it verifies signatures and waits for the file's lock.
                before = self._trusted
                try:
                    self._trusted = await asyncio.to_thread(accept, document, self._root, self._memory, self._clock())
                except Rollback:
                    self._ignore(document, None)
                    raise
                if before is not None and before.manifest.version != self._trusted.manifest.version:
                    self.report(before.manifest, self._trusted.manifest)
                if self._trusted.document != document:
                    self._ignore(document, self._trusted.manifest.version)

    def _ignore(self, document: bytes, version: int | None) -> None:
        """Logs and counts an older manifest once, however often it is read. version: of the one that stays in use."""
        if document != self._ignored:
            self._ignored = document
            self.ignored += 1
            log.warning("manifest.ignored", version=version, reason=_OLDER, remedy=_PUT_BACK)

    async def start(self) -> None:
        """Reads once, then every `poll` seconds. A first failure is not fatal: the fabric may come up later. Idempotent."""
        await self._try()
        if self._polling is None:
            self._polling = tasks.start("manifest", self._poll)

    async def close(self) -> None:
        if self._polling is not None:
            await self._polling.close()
            self._polling = None

    async def catch_up(self) -> None:
        """Reads now, for a request that names something this manifest does not have."""
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
            if type(exc) is not type(self.failure):  # log once, not with every read
                log.warning("manifest.not_taken", kind=type(exc).__name__)
            self.failure = exc
        except Exception as exc:  # noqa: BLE001 - others wrote the data: any error is a failed read
            if type(exc) is not type(self.failure):
                tasks.failed("manifest", exc)
            self.failure = exc
        else:
            self.failure = None

    def _current(self) -> Trusted:
        if self._polling is not None:
            self._polling.check()
        if self._trusted is None:
            raise UsageError("no manifest yet: publish one with `lacre manifest publish`")
        return self._trusted
