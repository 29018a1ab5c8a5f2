"""Rotates a pool's keys without interrupting traffic, retires old ones, and keeps the manifest fresh.

Rules:
- Workers have a key before any client can know it. The key is staged in their folder, and listed once they announce it.
- A retired key is destroyed only when no manifest lists it and no request sealed to it can be queued. An open stream does not
  need it: its response key was derived when the request was opened.
- Every step is saved before the next (see `generations`), so another process can complete it.
- Pools are independent. A failure in one is logged with its name, and the others continue. While one pool's workers load their
  key, changes to other pools do not wait.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Final

import structlog

from lacre.errors import LacreError, SettingsError
from lacre.exchange.call import REFRESH_BEFORE
from lacre.runtime import tasks
from lacre.trust.chain import MAX_FUTURE
from lacre.wire.header import KeyConfig
from lacre_fabric.keys import pool_keys
from lacre_fabric.keys.generations import Generation
from lacre_fabric.keys.root_and_signer import DAY
from lacre_fabric.nats.connection import Connection
from lacre_fabric.nats.key_holders import await_gone, await_holders
from lacre_fabric.nats.provisioning import publish_manifest
from lacre_fabric.operate import behind, known_pools
from lacre_fabric.operate.site import MANIFEST_LIFETIME, Site
from lacre_fabric.operate.stores import provision_site

EVERY: Final = DAY
# Clients refresh the manifest after half of its life, so within this time every client sees the new key.
GRACE: Final = MANIFEST_LIFETIME * REFRESH_BEFORE + 3600.0
REPUBLISH: Final = MANIFEST_LIFETIME / 4
LOAD_WAIT: Final = 30.0  # seconds for the workers to load a new key, or to drop an old one
MAX_TIME: Final = 366 * DAY
LOOK: Final = 1.0  # seconds between checks for due work
LOOK_FOR_QUEUES: Final = 10.0  # seconds between checks of the queues, which take several calls
AGAIN: Final = 30.0  # seconds from a failure to the next try, after several in a row

log = structlog.get_logger("lacre.upkeep")


class NotTakenUp(LacreError):
    """No live worker of the pool has the new key, so clients must not seal to it yet. It stays staged; a later try
    continues.
    """


class Failures:
    """Collects failures, so that each of several items gets its turn. The log names the pool, and the error names the
    workers.
    """

    def __init__(self) -> None:
        self.errors: list[LacreError | OSError] = []

    @contextmanager
    def kept(self, pool: str | None = None) -> Iterator[None]:
        try:
            yield
        except (LacreError, OSError) as exc:
            log.warning("upkeep.failed", pool=pool, kind=type(exc).__name__, reason=str(exc))
            self.errors.append(exc)

    def raised(self) -> None:
        """Raises the first failure, if any."""
        if self.errors:
            raise self.errors[0]


@dataclass(frozen=True, slots=True)
class Schedule:
    """When keys rotate. every: seconds that a pool key is current; None: forever. grace: seconds that it stays listed after
    that.

    Raises SettingsError for an invalid time.
    """

    every: float | None = EVERY
    grace: float = GRACE

    def __post_init__(self) -> None:
        check_time("the time between rotations", self.every or 0)
        check_time("the grace", self.grace)


@dataclass(frozen=True, slots=True)
class Rotated:
    """The result of a rotation. listed: the new keys. retiring: the old generations. lacking: workers that did not load the new
    keys in time.
    """

    pool: str
    listed: tuple[KeyConfig, ...]
    retiring: tuple[Generation, ...]
    lacking: frozenset[str]


async def publish(site: Site, connection: Connection, *, new_root: bool = False) -> None:
    """Signs the next manifest and publishes it on the fabric. Raises StateBehind, SettingsError or FabricUnavailable.

    new_root: also replaces the manifest of another root.
    """
    async with site.changing():
        await publish_now(site, connection, new_root=new_root)


async def publish_now(site: Site, connection: Connection, *, new_root: bool = False) -> None:
    """As `publish`, for a caller that holds `Site.changing`."""
    await behind.check(site, connection, new_root=new_root)
    now, site = time.time(), known_pools.current(site)
    await publish_manifest(connection, site.sign_manifest(now))
    site.published(now)


async def rotate(
    site: Site, connection: Connection, pool: str, *, grace: float = GRACE, wait: float = LOAD_WAIT, receipts: bool = False
) -> Rotated:
    """Makes a new generation of the pool's keys; it is listed when this returns. grace: seconds until the old ones leave the
    manifest.

    wait: seconds for the workers to load it. A worker that takes longer does not delay the others. receipts: the new keys get a
    new receipt key; then each worker must load them. Raises NotTakenUp if no worker loaded them, SettingsError or
    FabricUnavailable.
    """
    check_time("the grace", grace)
    async with site.changing():
        await behind.check(site, connection)
        staged = _staged(site, pool, receipts=receipts)
        receipt_key = _new_receipt_key(site, pool)
    listed = False
    while not listed:
        have, lacking = await await_holders(connection, pool, staged.configs, wait, receipt_key)
        _check_taken_up(site, pool, have, lacking, wait, receipts=receipt_key is not None)
        async with site.changing():
            # Another process that waited for these keys may have listed them, or given them a new receipt key.
            generations, waited_for = site.generations(pool), receipt_key
            if generations.staged == staged:
                receipt_key = _new_receipt_key(site, pool)
                if receipt_key != waited_for:
                    continue  # some workers may lack it
                site.keep_generations(pool, generations.list_staged(time.time(), grace))
            await publish_now(site, connection)
            listed = True
    live = site.generations(pool).live
    return Rotated(pool, staged.configs, tuple(one for one in live if one.retire_at is not None), lacking)


def _new_receipt_key(site: Site, pool: str) -> bytes | None:
    """The receipt key of the staged keys, if it is another one than that of the current keys."""
    generations, own = site.generations(pool), site.receipt_keys(pool)
    return own.of(generations.staged) if own.changes(generations) else None


def _check_taken_up(
    site: Site, pool: str, have: frozenset[str], lacking: frozenset[str], wait: float, *, receipts: bool
) -> None:
    """Raises NotTakenUp. receipts: the keys come with a new receipt key, so each worker must have them."""
    if lacking and receipts:
        raise NotTakenUp(
            f"not every worker of pool {pool} loaded the new receipt key within {wait:.0f} s ({', '.join(sorted(lacking))}). "
            f"Check that they are of this version and read {site.keys_folder(pool)} or a copy of it, and try again"
        )
    if lacking and not have:
        raise NotTakenUp(
            f"no worker of pool {pool} loaded the new key within {wait:.0f} s ({', '.join(sorted(lacking))}): "
            f"check that they read {site.keys_folder(pool)} or a copy of it, and try again"
        )


def check_time(what: str, seconds: float) -> None:
    if not 0 <= seconds <= MAX_TIME:  # also false for NaN
        raise SettingsError(f"{what} must be between 0 and {MAX_TIME / DAY:.0f} days")


def _staged(site: Site, pool: str, *, receipts: bool = False) -> Generation:
    """The staged generation of an earlier try, or a new one with a key for each KEM of the current one. receipts: with a new
    receipt key.
    """
    generations, folder, own = site.generations(pool), site.keys_folder(pool), site.receipt_keys(pool)
    if generations.staged is not None:
        whole = own.complete(generations.staged)
        if not whole or (receipts and not own.changes(generations)):
            with site.keeping(pool) as kept:
                own.prepare(generations.staged.ids, None, kept, anew=True)
        return generations.staged
    # A key that was made but not saved is unknown to everyone, and its id is about to be reused.
    pool_keys.keep_only(folder, (key_id for one in generations.live for key_id in one.ids))
    kems = pool_keys.DEFAULT_KEMS if generations.current is None else [key.kem for key in generations.current.configs]
    ids = generations.free_ids(len(kems), time.time())
    with site.keeping(pool) as kept:
        own.prepare(ids, generations.current, kept, anew=receipts)
        configs = pool_keys.make(folder, ids, kems, kept)
    generations = generations.stage(configs)
    site.keep_generations(pool, generations)
    return generations.live[0]


async def retire(site: Site, connection: Connection, *, wait: float = LOAD_WAIT) -> tuple[Generation, ...]:
    """Removes keys whose grace is over from the manifest, and destroys those that left it long enough ago. Returns the latter.

    A failure for one pool or of the fabric is raised at the end, after everything else was done. wait: seconds for the workers
    to drop the keys; the log names those that do not. Raises SettingsError or FabricUnavailable.
    """
    failures = Failures()
    gone = await _retire(site, connection, wait, failures)
    failures.raised()
    return gone


async def _retire(site: Site, connection: Connection, wait: float, failures: Failures) -> tuple[Generation, ...]:
    gone: dict[str, tuple[Generation, ...]] = {}
    async with site.changing():
        with failures.kept():
            if any(_leaving(site, pool) for pool in site.pools):
                await publish_now(site, connection)
        for pool in site.pools:
            with failures.kept(pool):
                gone[pool] = _destroy(site, pool, time.time())

    async def check(pool: str, generations: Sequence[Generation]) -> None:
        with failures.kept(pool):
            await _check_gone(connection, pool, [config for one in generations for config in one.configs], wait)

    await tasks.together(*(check(pool, generations) for pool, generations in gone.items()))
    return tuple(one for generations in gone.values() for one in generations)


def _leaving(site: Site, pool: str) -> bool:
    """False if the pool's file is damaged: the step that changes the file reports that."""
    try:
        return site.generations(pool).leaving(time.time())
    except SettingsError:
        return False


def _destroy(site: Site, pool: str, now: float) -> tuple[Generation, ...]:
    before = after = site.generations(pool)
    due = before.to_destroy(now)
    for generation in due:
        after = after.destroyed(generation, now, MANIFEST_LIFETIME)
    if due:
        pool_keys.keep_only(site.keys_folder(pool), (key_id for one in after.live for key_id in one.ids))
        site.receipt_keys(pool).settle(after, now)
        site.keep_generations(pool, after)
    return due


async def _check_gone(connection: Connection, pool: str, configs: Sequence[KeyConfig], wait: float) -> None:
    """Checks that the workers dropped destroyed keys. One that still has a key has another copy, which only its operator can
    remove.
    """
    if configs:
        for node in sorted(await await_gone(connection, pool, configs, wait)):
            log.warning("key.still_held", pool=pool, node=node, remedy="destroy this worker's own copy, then restart it")


async def tend(site: Site, connection: Connection, schedule: Schedule, *, wait: float = LOAD_WAIT) -> None:
    """Does what is due now: publishes a fresh manifest, makes new keys, destroys old ones. A failure is logged and does not
    stop the rest.

    wait: seconds for workers to load or drop a key. Raises the first failure once everything was tried. A state folder that is
    behind the fabric does nothing: its keys may be older than those in use. A manifest that NATS lost is due at once: a process
    that starts without a memory has none.
    """
    failures = Failures()
    now, there = time.time(), True
    with failures.kept():
        there = await behind.check(site, connection)
    if any(isinstance(error, behind.StateBehind) for error in failures.errors):
        failures.raised()
    failures.errors.clear()  # without the fabric, each step below fails by itself or does not need it
    with failures.kept():
        fresh = -MAX_FUTURE <= now - site.published_at < REPUBLISH  # below -MAX_FUTURE the clock was set back
        if not there or not fresh or site.grant_keys.to_publish(now):
            await publish(site, connection)

    async def renew(pool: str) -> None:
        with failures.kept(pool):
            if _rotation_due(site, pool, now, schedule.every):
                _tell_rotated(await rotate(site, connection, pool, grace=schedule.grace, wait=wait))

    await tasks.together(*map(renew, site.pools))
    with failures.kept():
        if any(_retirement_due(site, pool, time.time()) for pool in site.pools):
            await _retire(site, connection, wait, failures)
    failures.raised()


def _tell_rotated(rotated: Rotated) -> None:
    log.info("key.rotated", pool=rotated.pool)
    for node in sorted(rotated.lacking):
        log.warning("key.not_taken_up", pool=rotated.pool, node=node, remedy="check that this worker reads the pool's keys")


def _retirement_due(site: Site, pool: str, now: float) -> bool:
    """True if the pool's file is damaged: retiring reports that and continues with the others."""
    try:
        return site.generations(pool).retirement_due(now)
    except SettingsError:
        return True


def _rotation_due(site: Site, pool: str, now: float, every: float | None) -> bool:
    current = site.generations(pool).current
    return every is not None and (current is None or current.listed_at is None or now >= current.listed_at + every)


KEPT_UP: Final = tasks.Restart("each round checks again what is due, and every step may be repeated", after=AGAIN)


def pauses(most: float) -> Iterator[float]:
    """Seconds before each next try in a row of failures: 1, 2, 4, … and at most `most`."""
    pause = 1.0
    while True:
        yield min(pause, most)
        pause = min(2 * pause, most)


async def upkeep(
    site: Site,
    connection: Connection,
    schedule: Schedule,
    *,
    again: float = AGAIN,
    provisioning: bool = False,
    sleep: Callable[[float], Awaitable[object]] = asyncio.sleep,
) -> None:
    """Runs `tend` forever. After failures it retries as `pauses(again)` says, and after a success as often as before.

    The fabric may come back, a disk may get space, and a cluster that has just started chooses its leaders.

    provisioning: also recreates missing queues, for a NATS server that does not restart together with this process.
    """
    before_next = pauses(again)
    while True:
        failures, site = Failures(), known_pools.current(site)
        if provisioning:
            with failures.kept():
                await behind.check(site, connection)
                await provision_site(site, connection)
        with suppress(LacreError, OSError):  # `tend` has logged the failure
            await tend(site, connection, schedule)
            if not failures.errors:
                before_next = pauses(again)
                await sleep(LOOK_FOR_QUEUES if provisioning else LOOK)
                continue
        await sleep(next(before_next))
