"""Keys that live and die: rotates a pool's keys under the traffic, retires the old ones, and keeps the manifest fresh.

Rules:
- Workers have a key before any client can know of it: it is staged in their folder, and listed once they say that they hold it.
- A retired key is destroyed only when no manifest lists it and nothing sealed to it can wait in the queue. A stream under way
  needs it no more: its answer's key was derived when the request was opened.
- Every step is written down before the next (see `generations`), so what one process began another one ends.
- Pools are independent: what fails for one is logged with its name, and the others get what is due to them. Nobody else's
  change waits while the workers of a pool take up their key.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterator, Sequence
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
from lacre_fabric.nats.provisioning import provision, publish_manifest
from lacre_fabric.operate.site import MANIFEST_LIFETIME, Site

EVERY: Final = DAY
# A client fetches the manifest anew after half of its life: within that time every one has met the new key by itself.
GRACE: Final = MANIFEST_LIFETIME * REFRESH_BEFORE + 3600.0
REPUBLISH: Final = MANIFEST_LIFETIME / 4
LOAD_WAIT: Final = 30.0  # seconds for the workers to take up a new key, or to let go of an old one
MAX_TIME: Final = 366 * DAY
LOOK: Final = 1.0  # seconds between looks at what is due
LOOK_FOR_QUEUES: Final = 10.0  # and, at some calls each, at whether the queues are there
AGAIN: Final = 30.0  # seconds from a failure to the next try

log = structlog.get_logger("lacre.upkeep")


class NotTakenUp(LacreError):
    """No live worker of the pool has the new key: nobody may seal to it yet. It stays staged, and is tried again."""


class Failures:
    """What failed for one of several, each of which gets its turn. The log names the pool, and the error the workers."""

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
        """Raises the first of them, if any."""
        if self.errors:
            raise self.errors[0]


@dataclass(frozen=True, slots=True)
class Schedule:
    """every: seconds that a pool key is the current one; None for ever. grace: seconds that it is listed after that.

    Raises SettingsError for what is no time.
    """

    every: float | None = EVERY
    grace: float = GRACE

    def __post_init__(self) -> None:
        _check_time("the time between rotations", self.every or 0)
        _check_time("the grace", self.grace)


@dataclass(frozen=True, slots=True)
class Rotated:
    """listed: the new keys. retiring: the old generations. lacking: workers that had not taken up the new keys in time."""

    pool: str
    listed: tuple[KeyConfig, ...]
    retiring: tuple[Generation, ...]
    lacking: frozenset[str]


async def publish(site: Site, connection: Connection) -> None:
    """Signs the next manifest and puts it on the fabric. Raises SettingsError or FabricUnavailable."""
    async with site.changing():
        await _publish(site, connection)


async def _publish(site: Site, connection: Connection) -> None:
    now = time.time()
    await publish_manifest(connection, site.sign_manifest(now))
    site.published(now)


async def rotate(site: Site, connection: Connection, pool: str, *, grace: float = GRACE, wait: float = LOAD_WAIT) -> Rotated:
    """A new generation of the pool's keys, listed when this returns. grace: seconds until the old ones leave the manifest.

    wait: seconds for the workers to take it up. One that does not in this time does not hold up the others.
    Raises NotTakenUp where none did, SettingsError or FabricUnavailable.
    """
    _check_time("the grace", grace)
    async with site.changing():
        staged = _staged(site, pool)
    have, lacking = await await_holders(connection, pool, staged.configs, wait)
    if lacking and not have:
        raise NotTakenUp(
            f"no worker of pool {pool} took up the new key within {wait:.0f} s ({', '.join(sorted(lacking))}): "
            f"see that they read {site.keys_folder(pool)} or a copy of it, and try again"
        )
    async with site.changing():
        generations = site.generations(pool)
        if generations.staged == staged:  # or else another process, which waited for the same, has listed it
            site.keep_generations(pool, generations.list_staged(time.time(), grace))
        await _publish(site, connection)
    live = site.generations(pool).live
    return Rotated(pool, staged.configs, tuple(one for one in live if one.retire_at is not None), lacking)


def _check_time(what: str, seconds: float) -> None:
    if not 0 <= seconds <= MAX_TIME:  # which no NaN is
        raise SettingsError(f"{what} must be between 0 and {MAX_TIME / DAY:.0f} days")


def _staged(site: Site, pool: str) -> Generation:
    """The staged generation: the one that another try left, or a new one with a key for each KEM of the current one."""
    generations, folder = site.generations(pool), site.keys_folder(pool)
    if generations.staged is not None:
        return generations.staged
    # A key that was made and not written down is known to nobody, and its id is about to be used.
    pool_keys.keep_only(folder, (key_id for one in generations.live for key_id in one.ids))
    kems = pool_keys.DEFAULT_KEMS if generations.current is None else [key.kem for key in generations.current.configs]
    with site.keeping(pool) as kept:
        configs = pool_keys.make(folder, generations.free_ids(len(kems), time.time()), kems, kept)
    generations = generations.stage(configs)
    site.keep_generations(pool, generations)
    return generations.live[0]


async def retire(site: Site, connection: Connection, *, wait: float = LOAD_WAIT) -> tuple[Generation, ...]:
    """Takes keys whose grace is over out of the manifest, and destroys those that are out long enough. The destroyed ones.

    What cannot be done for one pool, or for want of the fabric, is raised after everything else was.
    wait: seconds for the workers to let go of them; the log names those that do not. Raises SettingsError or FabricUnavailable.
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
                await _publish(site, connection)
        for pool in site.pools:
            with failures.kept(pool):
                gone[pool] = _destroy(site, pool, time.time())

    async def check(pool: str, generations: Sequence[Generation]) -> None:
        with failures.kept(pool):
            await _check_gone(connection, pool, [config for one in generations for config in one.configs], wait)

    await tasks.together(*(check(pool, generations) for pool, generations in gone.items()))
    return tuple(one for generations in gone.values() for one in generations)


def _leaving(site: Site, pool: str) -> bool:
    """False for a pool whose file is damaged: to say so is for what changes that file."""
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
        site.keep_generations(pool, after)
    return due


async def _check_gone(connection: Connection, pool: str, configs: Sequence[KeyConfig], wait: float) -> None:
    """A worker that goes on with a destroyed key has it from elsewhere: only its operator can end that."""
    if configs:
        for node in sorted(await await_gone(connection, pool, configs, wait)):
            log.warning("key.still_held", pool=pool, node=node, remedy="destroy this worker's own copy, and restart it")


async def tend(site: Site, connection: Connection, schedule: Schedule, *, wait: float = LOAD_WAIT) -> None:
    """Whatever is due now: a fresh manifest, new keys, an end to old ones. What fails is logged, and does not keep the rest.

    wait: seconds for workers to take up a key, or to let go of one. Raises the first of what failed, once all was tried.
    """
    failures = Failures()
    now = time.time()
    with failures.kept():
        if not -MAX_FUTURE <= now - site.published_at < REPUBLISH:  # before -MAX_FUTURE: the clock was set back since
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
        log.warning("key.not_taken_up", pool=rotated.pool, node=node, remedy="see that this worker reads the pool's keys")


def _retirement_due(site: Site, pool: str, now: float) -> bool:
    """True for a pool whose file is damaged: retiring says so, and goes on with the others."""
    try:
        return site.generations(pool).retirement_due(now)
    except SettingsError:
        return True


def _rotation_due(site: Site, pool: str, now: float, every: float | None) -> bool:
    current = site.generations(pool).current
    return every is not None and (current is None or current.listed_at is None or now >= current.listed_at + every)


KEPT_UP: Final = tasks.Restart("each round looks anew at what is due, and every step of it may be taken twice", after=AGAIN)


async def upkeep(
    site: Site, connection: Connection, schedule: Schedule, *, again: float = AGAIN, provisioning: bool = False
) -> None:
    """`tend`, for ever. What fails is tried again after so many seconds: the fabric comes back, a disk gets room.

    provisioning: where the message server is not restarted together with this process, its queues are looked after too.
    """
    while True:
        failures = Failures()
        if provisioning:
            with failures.kept():
                await provision(connection, site.pools, replicas=site.replicas, regions=site.regions)
        with suppress(LacreError, OSError):  # it has logged what failed
            await tend(site, connection, schedule)
            if not failures.errors:
                await asyncio.sleep(LOOK_FOR_QUEUES if provisioning else LOOK)
                continue
        await asyncio.sleep(again)
