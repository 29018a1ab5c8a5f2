"""`lacre pool add` and `remove`: a pool comes or goes while the other pools serve.

Order:
- A pool that comes: keys, accounts, then `site.json`, queues and manifest. Clients learn of it when it works.
- A pool that goes: manifest and `site.json`, queues, accounts, then its keys are destroyed. The ids of its keys stay reserved.
- An interrupted command can be run again. Until `site.json` names the pool, no other command knows it.
- A pool that works is not removed: its workers are stopped first, and its queue is empty then.
"""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import Final

import nats.js.errors

from lacre.errors import LacreError, SettingsError
from lacre.runtime import file_locks
from lacre.runtime.json_objects import parse_object
from lacre_fabric.keys import pool_keys
from lacre_fabric.keys.secret_files import destroy, write_secret
from lacre_fabric.nats import subjects
from lacre_fabric.nats.connection import Connection
from lacre_fabric.operate import behind, known_pools, model_routes, pool_names, pool_upstreams
from lacre_fabric.operate.account_reload import AGAIN, AccountFiles, NotTaken, bundles, connected, has_bundle, teach
from lacre_fabric.operate.allowed_check import check_allowed
from lacre_fabric.operate.chart_pools import write_values
from lacre_fabric.operate.fabric_check import Severity
from lacre_fabric.operate.pool_state import observe
from lacre_fabric.operate.pool_upstreams import UpstreamServer
from lacre_fabric.operate.rotation import publish
from lacre_fabric.operate.site import MANIFEST_LIFETIME, Site, worker_of
from lacre_fabric.operate.stores import provision_site
from lacre_fabric.work import model_names

SETTLE: Final = 20.0  # seconds until the new pool works: its queue and claims need a leader on three servers


class PoolInUse(LacreError):
    """The pool has live workers or queued requests, so it was not removed."""


async def add(
    site: Site,
    pool: str,
    models: Sequence[str],
    files: AccountFiles,
    tell: Callable[[str], None] = lambda _line: None,
    *,
    upstream: UpstreamServer | None = None,
) -> Site:
    """Adds the pool, or models to it. Returns the site that has it. tell: gets a line for each step.

    upstream: of a new pool whose workers forward to another server.

    Raises SettingsError, KmsError, StateBehind, NotTaken or FabricUnavailable. A new pool is in no manifest then.
    """
    _check(site, pool, models, upstream)
    with _only_one(site):
        async with connected(site, "provisioner") as connection:
            async with site.changing():
                await behind.check(site, connection)
                site = known_pools.current(site)
                coming = _with(site, pool, models)
                _make(coming, pool)
            tell("keys and credentials: made")
            if pool not in site.pools or await _works(coming, pool):
                await teach(((coming, (pool,)), (coming, ())), files)
                tell("accounts: every NATS server has them")
            await provision_site(coming, connection)
            await _await_working(coming, pool)
            tell("queues: made, and a request could pass")
            async with site.changing():
                _keep(coming, {pool: upstream})
            await publish(coming, connection)
            tell("manifest: published")
        _write_places(coming, pool)
    return coming


async def prepare(
    site: Site, pool: str, models: Sequence[str], files: AccountFiles, *, upstream: UpstreamServer | None = None
) -> Site:
    """Makes everything of the pool that is in the state folder, and the accounts, without contact to NATS.

    For servers that restart one after the other, and another place that publishes the manifest, as in Kubernetes. Raises
    SettingsError or KmsError.
    """
    if not has_bundle(site):
        pool_names.check_for_chart(pool)
    _check(site, pool, models, upstream)
    with _only_one(site):
        async with site.changing():
            site = known_pools.current(site)
            coming = _with(site, pool, models)
            _make(coming, pool)
            _keep(coming, {pool: upstream})
        files.write(coming, ())
        await files.applied()
        _write_places(coming, pool)
    return coming


async def remove(
    site: Site, pool: str, files: AccountFiles, tell: Callable[[str], None] = lambda _line: None, *, force: bool = False
) -> Site:
    """Removes the pool, and destroys its keys. Returns the site without it. An interrupted removal can be repeated.

    force: also if it has workers or requests, which end. Otherwise that raises PoolInUse. Raises SettingsError, StateBehind,
    NotTaken or FabricUnavailable.
    """
    with _only_one(site):
        site, gone = site_without(site, pool)
        if not force:
            _check_routes(gone, pool)
        async with connected(site, "provisioner") as connection:
            if not force:
                await _check_unused(site, connection, pool)
            async with site.changing():
                await behind.check(site, connection)
                _keep(gone)
            await publish(gone, connection)
            tell("manifest: published without it")
            await _drop_streams(connection, pool, site.regions)
            tell("queues: deleted")
            leaving = replace(site, pools={**gone.pools, pool: site.pools.get(pool, ())})
            await teach(((leaving, (pool,)), (gone, ())), files)
            tell("accounts: every NATS server has dropped them")
        write_values(gone)
        async with site.changing():
            _destroy(site, pool)  # last: what it leaves makes the pool known, so that an interrupted removal can go on
        tell("keys: destroyed")
    return gone


async def withdraw(site: Site, pool: str, files: AccountFiles, *, force: bool = False) -> Site:
    """Takes the pool out of the state folder and the accounts, and destroys its keys here, without contact to NATS.

    Counterpart of `prepare`. For a pool that was removed before, it does the same again. force: also if routes lead only there;
    otherwise that raises PoolInUse. Raises SettingsError.
    """
    with _only_one(site):
        site, gone = site_without(site, pool, again=True)
        if not force:
            _check_routes(gone, pool)
        async with site.changing():
            _keep(gone)
        files.write(gone, ())
        await files.applied()
        write_values(gone)
        async with site.changing():
            _destroy(site, pool)
    return gone


def _check(site: Site, pool: str, models: Sequence[str], upstream: UpstreamServer | None) -> None:
    """Raises SettingsError."""
    if pool not in site.pools:
        pool_names.check_new(pool, site.pools)
    for model in models:
        if not model_names.is_name(model):
            raise SettingsError(
                f"{model!r} is not a valid model id: use 1 to {model_names.MAX_NAME} printable ASCII characters, no space"
            )
    if not models and pool in site.pools:
        raise SettingsError(f"the pool {pool} exists, with {', '.join(site.pools[pool])}: name a model to add with --model")
    if not models:
        raise SettingsError(f"name a model of the new pool {pool} with --model")
    if upstream is not None:
        upstream.check()
        if pool in site.pools and pool_upstreams.of_site(site.folder).get(pool) != upstream:
            raise SettingsError(
                f"the pool {pool} exists: change its [upstream] in its worker's settings, or choose another name"
            )
    _check_deployed(site)


def _check_deployed(site: Site) -> None:
    if site.is_of_one_machine and not has_bundle(site):
        raise SettingsError(
            "`lacre up` starts the workers of one pool: make a deployment of separate processes first (lacre fabric bundles)"
        )


async def _check_unused(site: Site, connection: Connection, pool: str) -> None:
    """Raises PoolInUse or FabricUnavailable."""
    state = (await observe(connection, (pool,), site.regions))[pool]
    if state.in_use:
        raise PoolInUse(
            f"the pool {pool} has {state.in_use}: stop its workers, which finish their requests first, or add --force"
        )


def _check_routes(gone: Site, pool: str) -> None:
    """Raises PoolInUse."""
    if left := model_routes.without(gone.folder, gone.pools):
        named = ", ".join(left)
        raise PoolInUse(
            f"without the pool {pool} these routes lead nowhere: {named}; publish others with "
            "`lacre manifest publish --routes`, or add --force"
        )


def _with(site: Site, pool: str, models: Sequence[str]) -> Site:
    return replace(site, pools={**site.pools, pool: _merged(site.pools.get(pool, ()), models)})


def _merged(before: Sequence[str], models: Sequence[str]) -> list[str]:
    return list(dict.fromkeys((*before, *models)))


def _make(site: Site, pool: str) -> None:
    site.replicated_roles()  # makes its credentials, or refuses its name
    site.create()
    _renew_keys(site, pool)


def _renew_keys(site: Site, pool: str) -> None:
    """Makes keys for a pool that was removed before. The ids that clients may still know are not used again."""
    generations, now = site.generations(pool), time.time()
    if not generations.live:
        with site.keeping(pool) as kept:
            ids = generations.free_ids(len(pool_keys.DEFAULT_KEMS), now)
            configs = pool_keys.make(site.keys_folder(pool), ids, pool_keys.DEFAULT_KEMS, kept)
        site.keep_generations(pool, generations.stage(configs).list_staged(now, 0))


def _credential_files(site: Site, pool: str) -> list[Path]:
    return [site.credential_file(worker_of(pool, region)) for region in site.regions]


def site_without(site: Site, pool: str, *, again: bool = False) -> tuple[Site, Site]:
    """The site now, and without the pool. Raises SettingsError for an unknown pool.

    A pool of which an interrupted removal left something is known. again: so is one that was removed.
    """
    subjects.check_name("pool", pool)
    site = known_pools.current(site)
    gone = replace(site, pools={name: models for name, models in site.pools.items() if name != pool})
    left = (site.receipt_file(pool), *_credential_files(site, pool))
    known = pool in site.pools or any(path.exists() for path in left)
    if not known and not (again and site.receipt_file(pool).parent.is_dir()):
        raise SettingsError(f"unknown pool {pool}: this state has {', '.join(sorted(site.pools))}")
    if not gone.pools:
        raise SettingsError(f"{pool} is the only pool, and a site needs one: add another first")
    _check_deployed(site)
    return site, gone


def _destroy(site: Site, pool: str) -> None:
    """Destroys the pool's keys, its credentials and its bundle. What is gone already is no error."""
    generations, now = site.generations(pool), time.time()
    for generation in generations.live:
        generations = generations.destroyed(generation, now, MANIFEST_LIFETIME)
    pool_keys.keep_only(site.keys_folder(pool), ())
    site.keep_generations(pool, generations)
    for folder in bundles(site).worker_folders(pool):
        for path in folder.iterdir() if folder.is_dir() else ():
            destroy(path)
        if folder.is_dir():
            folder.rmdir()
    for path in (*_credential_files(site, pool), site.receipt_file(pool)):
        destroy(path)


@contextmanager
def _only_one(site: Site) -> Iterator[None]:
    """Two at a time would each write accounts that lack the other's pool. Raises SettingsError."""
    busy = f"another `lacre pool` command changes {site.folder}: wait until it ends"
    with file_locks.held(site.folder / "pools" / ".lock", busy):
        yield


def _keep(site: Site, upstreams: Mapping[str, UpstreamServer | None] | None = None) -> None:
    """Saves the pools; other members of `site.json` stay. upstreams: those of new pools. Call it inside `Site.changing`."""
    path = site.folder / "site.json"
    members = parse_object(path.read_bytes(), "it")
    known = pool_upstreams.of_site(site.folder)
    known |= {pool: upstream for pool, upstream in (upstreams or {}).items() if upstream is not None}
    members["pools"] = {name: list(models) for name, models in site.pools.items()}
    members[pool_upstreams.UPSTREAMS] = {pool: one.members() for pool, one in known.items() if pool in site.pools}
    if not members[pool_upstreams.UPSTREAMS]:
        del members[pool_upstreams.UPSTREAMS]
    write_secret(path, json.dumps(members).encode())


def _write_places(site: Site, pool: str) -> None:
    """What the pool's workers and the chart need. Raises SettingsError."""
    if has_bundle(site):
        bundles(site).write_workers(pool)
    write_values(site, pool)


async def _works(site: Site, pool: str) -> str:
    """Why a request cannot pass through the pool; empty if it can."""
    servers, regions = site.servers, site.regions
    found = await check_allowed(servers, (pool,), site.credentials(), regions)
    return "; ".join(f"{one.check}: {one.detail}" for one in found if one.verdict is not Severity.OK)


async def _await_working(site: Site, pool: str) -> None:
    deadline = time.monotonic() + SETTLE
    while why := await _works(site, pool):
        if time.monotonic() >= deadline:
            raise NotTaken(f"pool {pool} is there, but does not work ({why}): run `lacre fabric check`, then this again")
        await asyncio.sleep(AGAIN)


async def _drop_streams(connection: Connection, pool: str, regions: Sequence[str]) -> None:
    names = [*(subjects.work_stream(pool, region) for region in regions), f"KV_{subjects.claims_bucket(pool)}"]
    for name in names:
        async with connection.mapped():
            with suppress(nats.js.errors.NotFoundError):
                await connection.jetstream.delete_stream(name)
