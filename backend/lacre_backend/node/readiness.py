"""Decides whether this worker can work, and if not, why. Checked before it announces itself, and continuously after.

Rules:
- A worker announces and takes work only for models without a fault.
- Each reason is published: in the log when it appears, in presence for `lacre doctor`, in the health file, and by `lacre worker
  check`.
- The decision (`against`) takes values and does no I/O. Background checks of the upstream or the claims bucket report their
  last result.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Final, Protocol

import structlog

from lacre.errors import Expired, LacreError, UntrustedRoot
from lacre.trust.manifest import Manifest, Pool, fingerprint
from lacre_fabric.nats.manifest_feed import ManifestFeed

LOOK: Final = 1.0  # seconds: as often as presence is sent

log = structlog.get_logger("lacre.worker")


@dataclass(frozen=True, slots=True)
class Reason:
    """Why a worker cannot work. kind: for programs. model: the model that it cannot serve; None for all."""

    kind: str
    detail: str
    remedy: str
    model: str | None = None


Part = Callable[[], Reason | None]  # the fault that one part of the worker reports now, if any


@dataclass(frozen=True, slots=True)
class Holding:
    """What the worker has. keys: fingerprints of the pool's keys. receipt_key: the public part, 32 bytes. digests: of models
    with a file, as receipts name them. receipts: public receipt keys of those keys that have their own, by fingerprint.
    """

    pool: str
    models: tuple[str, ...]
    keys: frozenset[str]
    receipt_key: bytes
    digests: Mapping[str, str] = field(default_factory=dict)
    receipts: Mapping[str, bytes] = field(default_factory=dict)


def against(manifest: Manifest, holding: Holding, now: float) -> list[Reason]:
    """The manifest's objections to a worker with these keys and models. now: seconds since the epoch."""
    pool = manifest.pools.get(holding.pool)
    if now >= manifest.expires_at:
        remedy = "publish one with `lacre manifest publish`; if it is current, correct this machine's clock"
        return [Reason("manifest", "the manifest has expired, so its key no longer verifies grants", remedy)]
    if pool is None:
        known = ", ".join(sorted(manifest.pools)) or "none"
        return [Reason("pool", f"the manifest has no pool {holding.pool}, but: {known}", "correct `pool`, or publish the pool")]
    reasons = [_receipt_key(manifest, holding, now), _keys(pool, holding, now)]
    for model in holding.models:
        if model not in pool.models:
            detail = f"the manifest does not have {model} in pool {holding.pool}"
            reasons.append(Reason("model", detail, "correct the model's name, or publish the model", model))
        elif (named := pool.models[model].digests) and holding.digests.get(model) not in named:
            served = holding.digests.get(model, "no file")
            detail = (
                f"the manifest names other files for {model} than this worker's ({served}). Clients would reject its receipts"
            )
            remedy = "serve the named file, or name this one: `lacre manifest publish --model`, or a new start of `lacre up`"
            reasons.append(Reason("model", detail, remedy, model))
    return [reason for reason in reasons if reason is not None]


def _receipt_key(manifest: Manifest, holding: Holding, now: float) -> Reason | None:
    """Each listed key that the worker holds has its receipt key; without such a key, the pool's counts."""
    pool = manifest.pools[holding.pool]
    held = [(fingerprint(key.config), key) for key in pool.keys if now < key.not_after]
    due = {name: key.receipt_key or pool.receipt_key for name, key in held if name in holding.keys} or {"": pool.receipt_key}
    if all(holding.receipts.get(name, holding.receipt_key) == key for name, key in due.items()):
        return None
    of = next((name for name, pool in manifest.pools.items() if pool.receipt_key == holding.receipt_key), None)
    if of == holding.pool:
        detail = (
            "it lacks a receipt key that the manifest names for one of its keys. Clients and gateway would reject its receipts"
        )
        return Reason("receipt_key", detail, "copy all of the pool's folder `keys` to this worker, the .receipt files too")
    told = "the manifest has no pool with it" if of is None else f"it is pool {of}'s"
    detail = f"receipt_key is not the one of pool {holding.pool}: {told}. Clients and gateway would reject its receipts"
    return Reason("receipt_key", detail, "give this worker the receipt key of its pool")


def _keys(pool: Pool, holding: Holding, now: float) -> Reason | None:
    listed = {fingerprint(key.config): key.config.key_id for key in pool.keys if now < key.not_after}
    missing = sorted(key_id for name, key_id in listed.items() if name not in holding.keys)
    if listed and not missing:
        return None
    if not listed:
        detail = "the manifest lists no key of this pool that is valid now"
        return Reason("keys", detail, "rotate the pool's keys: `lacre keys rotate`")
    told = "none of the keys" if len(missing) == len(listed) else f"not the keys {', '.join(map(str, missing))}"
    detail = f"it holds {told} that the manifest tells clients to use"
    return Reason("keys", detail, "put the pool's current keys into the folder `keys`, and check that the worker may read them")


def unread(feed: ManifestFeed | None) -> Reason:
    """Why there is no manifest to check."""
    failure = None if feed is None else feed.failure
    if failure is None:
        return Reason("manifest", "no manifest has been read yet", "publish one with `lacre manifest publish`")
    if not isinstance(failure, LacreError):
        return Reason("manifest", f"it could not be read ({type(failure).__name__})", "look in the log for the traceback")
    if isinstance(failure, Expired):
        return Reason("manifest", str(failure), failure.remedy)
    remedy = "compare `trust` with the published root" if isinstance(failure, UntrustedRoot) else failure.remedy
    return Reason("trust" if isinstance(failure, UntrustedRoot) else "manifest", str(failure), remedy)


class Readiness:
    """Knows whether the worker can work, and why not.

    holding: what the worker has now. parts: report other faults. clock: seconds since the epoch.
    """

    def __init__(
        self, holding: Callable[[], Holding], parts: Sequence[Part] = (), *, clock: Callable[[], float] = time.time
    ) -> None:
        self._holding = holding
        self._parts = parts
        self._clock = clock
        self._feed: ManifestFeed | None = None
        self._told: frozenset[Reason] | None = None

    def follow(self, feed: ManifestFeed) -> None:
        """Sets the source of manifests, once there is a connection."""
        self._feed = feed

    def reasons(self) -> list[Reason]:
        found = [reason for reason in (part() for part in self._parts) if reason is not None]
        if self._feed is None or not self._feed.known:
            return [*found, unread(self._feed)]
        return found + against(self._feed.manifest, self._holding(), self._clock())

    def models(self) -> frozenset[str]:
        """The models that this worker can serve now."""
        reasons = self.reasons()
        if any(reason.model is None for reason in reasons):
            return frozenset()
        return frozenset(self._holding().models) - {reason.model for reason in reasons if reason.model is not None}

    def kinds(self) -> list[str]:
        """The kinds of faults, for presence."""
        return sorted({reason.kind for reason in self.reasons()})

    def tell(self) -> None:
        """Logs what changed since the last call."""
        now = frozenset(self.reasons())
        if now == self._told:
            return
        holding, before = self._holding(), self._told or frozenset()
        for reason in sorted(now - before, key=lambda reason: (reason.kind, reason.model or "")):
            told = {"kind": reason.kind, "reason": reason.detail, "remedy": reason.remedy}
            log.warning("worker.not_ready", pool=holding.pool, model=reason.model, **told)
        if not now or self.models():
            log.info("worker.ready", pool=holding.pool, model=next(iter(sorted(self.models())), None))
        self._told = now

    async def watch(self) -> None:
        while True:
            self.tell()
            await asyncio.sleep(LOOK)


class Mortal(Protocol):
    """An engine, or an app in its own thread."""

    @property
    def died(self) -> bool: ...

    @property
    def stuck(self) -> bool: ...


def alive(*parts: Mortal) -> Part:
    """Reports a dead or stuck part. The process ends when a part dies; until then the worker is not ready. A stuck part may
    recover.
    """

    def look() -> Reason | None:
        if any(part.died for part in parts):
            return Reason("engine", "a thread that answers requests has died", "look in the log for its traceback")
        if any(part.stuck for part in parts):
            return Reason(
                "engine", "an engine has been computing one step for minutes", "restart the worker; check its GPU and memory"
            )
        return None

    return look
