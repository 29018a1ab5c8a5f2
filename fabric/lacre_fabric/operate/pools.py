"""`lacre pool add` and `remove`: a pool comes or goes while the other pools serve.

Why the servers read their accounts twice, each time all of them (nats-server 2.15):
- A reload makes a new account without the subscriptions behind its imports. So its workers reach no queue, and requests get
  "nobody answers", although the reload said ok. The next reload makes these subscriptions.
- A server drops a subscription from another server for an account that it does not know yet, and nobody sends it again. So no
  gateway may listen to the new pool before every server knows the pool's account.

So the first accounts have the pool, but no listener to it, and the second ones are whole. A server that does not take the order
to reload can be restarted instead, one at a time.

Order:
- A pool that comes: keys, accounts, then `site.json`, queues and manifest. Clients learn of it when it works.
- A pool that goes: manifest and `site.json`, queues, accounts, then its keys are destroyed. The ids of its keys stay reserved.
- An interrupted command can be run again. Until `site.json` names the pool, no other command knows it.
"""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncIterator, Callable, Collection, Iterator, Mapping, Sequence
from contextlib import asynccontextmanager, contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final

import nats.js.errors

from lacre.errors import LacreError, SettingsError
from lacre.runtime import file_locks
from lacre.runtime.json_objects import object_in, parse_object
from lacre_fabric.keys import pool_keys
from lacre_fabric.keys.secret_files import destroy, write_secret
from lacre_fabric.nats import subjects
from lacre_fabric.nats.accounts import accounts
from lacre_fabric.nats.connection import Connection
from lacre_fabric.operate import behind, known_pools, nats_conf
from lacre_fabric.operate.allowed_check import check_allowed
from lacre_fabric.operate.bundles import Bundles
from lacre_fabric.operate.fabric_check import Severity, server_reports
from lacre_fabric.operate.rotation import publish
from lacre_fabric.operate.site import MANIFEST_LIFETIME, Site, worker_of
from lacre_fabric.operate.stores import provision_site
from lacre_fabric.work import model_names
from lacre_fabric.work.contract import FabricUnavailable

WAIT: Final = 60.0  # seconds for all servers to take new accounts; a mounted Secret may take longer
SETTLE: Final = 20.0  # seconds until the new pool works: its queue and claims need a leader on three servers
APPLY_LIMIT: Final = 300.0  # seconds for the operator's own command, which copies a file to a few machines
_AGAIN: Final = 1.0  # seconds between two orders to reload
_RELOAD_LIMIT: Final = 5.0  # seconds for a server to read its configuration
_MAX_OUTPUT: Final = 500  # characters of a failed command that the error shows


class NotTaken(LacreError):
    """Some NATS servers did not take the new accounts in time. Every step so far may be repeated."""


@dataclass(frozen=True, slots=True)
class AccountFiles:
    """Where the accounts are written for the NATS servers, and how they get there.

    named: files that the servers include, or that `apply` brings to them. apply: a shell command to run after each writing.
    Without `named`, it is the bundle of NATS if there is one, or else `accounts.json` in the state folder.
    """

    named: tuple[Path, ...] = ()
    apply: str | None = None
    wait: float = WAIT

    def paths(self, site: Site) -> tuple[Path, ...]:
        if self.named:
            return self.named
        bundle = site.folder / "bundles" / "nats" / "lacre.conf"
        return (bundle if bundle.exists() else site.folder / "accounts.json",)

    def write(self, site: Site, unheard: Collection[str]) -> bool:
        """Whether the content changed. Raises SettingsError."""
        before = [_content(path) for path in self.paths(site)]
        if _has_bundle(site):
            _bundles(site).write_nats(unheard)
        content = nats_conf.encode({"accounts": accounts(site.replicated_roles(), unheard)})
        for path in self.paths(site) if self.named or not _has_bundle(site) else ():
            try:
                write_secret(path.resolve(), content)
            except OSError as exc:
                raise SettingsError(f"{path} cannot be written ({exc.strerror}): correct --accounts") from exc
        return before != [_content(path) for path in self.paths(site)]

    async def applied(self) -> None:
        """Runs the operator's command. Raises SettingsError if it fails."""
        if self.apply is None:
            return
        process = await asyncio.create_subprocess_shell(
            self.apply, stdin=asyncio.subprocess.DEVNULL, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.STDOUT
        )
        try:
            async with asyncio.timeout(APPLY_LIMIT):
                output, _ = await process.communicate()
        except TimeoutError as exc:
            raise SettingsError(f"--apply: the command did not end within {APPLY_LIMIT:.0f} s") from exc
        finally:
            if process.returncode is None:
                process.kill()
                await process.wait()
        if process.returncode:
            said = output.decode(errors="replace").strip()[-_MAX_OUTPUT:]
            raise SettingsError(f"--apply: the command ended with {process.returncode}: {said}")


async def add(
    site: Site, pool: str, models: Sequence[str], files: AccountFiles, tell: Callable[[str], None] = lambda _line: None
) -> Site:
    """Adds the pool, or models to it. Returns the site that has it. tell: gets a line for each step.

    Raises SettingsError, KmsError, StateBehind, NotTaken or FabricUnavailable. A new pool is in no manifest then.
    """
    _check(site, pool, models)
    with _only_one(site):
        async with _connected(site, "provisioner") as connection:
            async with site.changing():
                await behind.check(site, connection)
                site = known_pools.current(site)
                coming = replace(site, pools={**site.pools, pool: _merged(site.pools.get(pool, ()), models)})
                _make(coming, pool)
            tell("keys and credentials: made")
            if pool not in site.pools or await _works(coming, pool):
                await _teach(((coming, (pool,)), (coming, ())), files)
                tell("accounts: every NATS server has them")
            await provision_site(coming, connection)
            await _await_working(coming, pool)
            tell("queues: made, and a request could pass")
            async with site.changing():
                _keep(coming)
            await publish(coming, connection)
            tell("manifest: published")
        if _has_bundle(coming):
            _bundles(coming).write_workers(pool)
        write_values(coming)
    return coming


async def prepare(site: Site, pool: str, models: Sequence[str], files: AccountFiles) -> Site:
    """Makes everything of the pool that is in the state folder, and the accounts, without contact to NATS.

    For servers that restart one after the other, and another place that publishes the manifest, as in Kubernetes. Raises
    SettingsError or KmsError.
    """
    _check(site, pool, models)
    with _only_one(site):
        async with site.changing():
            site = known_pools.current(site)
            coming = replace(site, pools={**site.pools, pool: _merged(site.pools.get(pool, ()), models)})
            _make(coming, pool)
            _keep(coming)
        files.write(coming, ())
        await files.applied()
        if _has_bundle(coming):
            _bundles(coming).write_workers(pool)
        write_values(coming)
    return coming


async def remove(site: Site, pool: str, files: AccountFiles, tell: Callable[[str], None] = lambda _line: None) -> Site:
    """Removes the pool, and destroys its keys. Returns the site without it. An interrupted removal can be repeated.

    Raises SettingsError, StateBehind, NotTaken or FabricUnavailable.
    """
    with _only_one(site):
        site = known_pools.current(site)
        gone = replace(site, pools={name: models for name, models in site.pools.items() if name != pool})
        _check_leaving(site, gone, pool)
        async with _connected(site, "provisioner") as connection:
            async with site.changing():
                await behind.check(site, connection)
                _keep(gone)
            await publish(gone, connection)
            tell("manifest: published without it")
            await _drop_streams(connection, pool, site.regions)
            tell("queues: deleted")
            leaving = replace(site, pools={**gone.pools, pool: site.pools.get(pool, ())})
            await _teach(((leaving, (pool,)), (gone, ())), files)
            tell("accounts: every NATS server has dropped them")
        async with site.changing():
            _destroy(site, pool)
        tell("keys: destroyed")
        write_values(gone)
    return gone


def write_values(site: Site) -> Path:
    """Writes `chart/pools.yaml`, for the Helm chart: every pool with its models. JSON is YAML too."""
    path = site.folder / "chart" / "pools.yaml"
    pools = {
        pool: {"models": [{"name": model, "path": f"/models/{model}.gguf"} for model in models]}
        for pool, models in site.pools.items()
    }
    write_secret(path, json.dumps({"pools": pools}, indent=2).encode() + b"\n")
    return path


def _check(site: Site, pool: str, models: Sequence[str]) -> None:
    """Raises SettingsError."""
    subjects.check_name("pool", pool)
    for model in models:
        if not model_names.is_name(model):
            raise SettingsError(
                f"{model!r} is not a valid model id: use 1 to {model_names.MAX_NAME} printable ASCII characters, no space"
            )
    if not models and pool not in site.pools:
        raise SettingsError(f"name a model of the new pool {pool} with --model")
    _check_deployed(site)


def _check_deployed(site: Site) -> None:
    if site.is_of_one_machine and not _has_bundle(site):
        raise SettingsError(
            "`lacre up` starts the workers of one pool: make a deployment of separate processes first (lacre fabric bundles)"
        )


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


def _check_leaving(site: Site, gone: Site, pool: str) -> None:
    """Raises SettingsError for an unknown pool. A pool of which an interrupted removal left something is known."""
    subjects.check_name("pool", pool)
    left = (site.receipt_file(pool), *_credential_files(site, pool))
    if pool not in site.pools and not any(path.exists() for path in left):
        raise SettingsError(f"unknown pool {pool}: this state has {', '.join(sorted(site.pools))}")
    if not gone.pools:
        raise SettingsError(f"{pool} is the only pool, and a site needs one: add another first")
    _check_deployed(site)


def _destroy(site: Site, pool: str) -> None:
    """Destroys the pool's keys, its credentials and its bundle. What is gone already is no error."""
    generations, now = site.generations(pool), time.time()
    for generation in generations.live:
        generations = generations.destroyed(generation, now, MANIFEST_LIFETIME)
    pool_keys.keep_only(site.keys_folder(pool), ())
    site.keep_generations(pool, generations)
    for folder in _bundles(site).worker_folders(pool):
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
    with file_locks.held(site.folder / "pools" / "lock", busy):
        yield


def _keep(site: Site) -> None:
    """Saves the pools; other members of `site.json` stay. Call it inside `Site.changing`."""
    path = site.folder / "site.json"
    members = parse_object(path.read_bytes(), "it")
    write_secret(path, json.dumps({**members, "pools": {name: list(models) for name, models in site.pools.items()}}).encode())


def _has_bundle(site: Site) -> bool:
    return (site.folder / "bundles" / "nats" / "lacre.conf").exists()


def _bundles(site: Site) -> Bundles:
    return Bundles(site, site.servers.urls[0] if len(site.servers.urls) == 1 else list(site.servers.urls), site.base_url)


def _content(path: Path) -> bytes | None:
    try:
        return path.read_bytes()
    except FileNotFoundError:
        return None
    except OSError as exc:
        raise SettingsError(f"{path} cannot be read ({exc.strerror}): correct --accounts") from exc


# The servers


async def _teach(steps: Sequence[tuple[Site, Collection[str]]], files: AccountFiles) -> None:
    """Every server reads each of the accounts before any server reads the next.

    steps: a site, and pools that nobody listens to. Raises NotTaken, SettingsError or FabricUnavailable.
    """
    site = steps[0][0]
    async with _connected(site, "inspector") as inspector, _connected(site, "warden") as warden:
        known = await server_reports(inspector)
        needed = site.replicas * len(site.regions)
        if len(known) < needed:
            raise NotTaken(f"{len(known)} NATS servers answer, and {needed} are needed: start the others, then run this again")
        before = _digests(known)
        for each, unheard in steps:
            changed = files.write(each, unheard)
            await files.applied()
            before = await _reload(inspector, warden, before if changed else dict.fromkeys(before, ""), files, each)
        await _order(warden, await server_reports(inspector))  # for one that skipped a step of an interrupted command


async def _reload(
    inspector: Connection, warden: Connection, before: Mapping[str, str], files: AccountFiles, site: Site
) -> dict[str, str]:
    """Orders it until every server has other accounts than `before`. Returns what they have. Raises NotTaken."""
    deadline = time.monotonic() + files.wait
    while True:
        refused = await _order(warden, await server_reports(inspector))
        now = _digests(await server_reports(inspector))
        late = sorted(name for name, digest in before.items() if name not in now or (digest and now[name] == digest))
        if not late and not refused:
            return now
        if time.monotonic() >= deadline:
            told = "; ".join(refused) or f"the old accounts are still those of {', '.join(late)}"
            named = " and ".join(map(str, files.paths(site)))
            raise NotTaken(
                f"{told}. Bring {named} to every NATS server, have each read it (nats-server --signal reload, or a restart, "
                "one server after the other), then run this again"
            )
        await asyncio.sleep(_AGAIN)


async def _order(warden: Connection, servers: Sequence[Mapping[str, Any]]) -> list[str]:
    """Has each server read its configuration again. Returns why servers refuse."""
    refused = []
    for server in servers:
        name, number = str(server.get("server_name", "?")), str(server.get("server_id", ""))
        try:
            async with warden.mapped():
                answer = await warden.client.request(subjects.reload(number), b"", timeout=_RELOAD_LIMIT)
        except FabricUnavailable as exc:
            refused.append(f"{name} takes no order to reload ({exc})")
            continue
        error = (object_in(answer.data) or {}).get("error")
        if error:
            said = error.get("description", error) if isinstance(error, dict) else error
            refused.append(f"{name} refuses the accounts ({str(said)[:_MAX_OUTPUT]})")
    return refused


def _digests(servers: Sequence[Mapping[str, Any]]) -> dict[str, str]:
    """By name, the digest of each server's configuration."""
    return {str(server.get("server_name", "?")): str(server.get("config_digest", "")) for server in servers}


@asynccontextmanager
async def _connected(site: Site, role: str) -> AsyncIterator[Connection]:
    connection = await Connection.open(site.servers, site.credential(role))
    try:
        yield connection
    finally:
        await connection.close()


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
        await asyncio.sleep(_AGAIN)


async def _drop_streams(connection: Connection, pool: str, regions: Sequence[str]) -> None:
    names = [*(subjects.work_stream(pool, region) for region in regions), f"KV_{subjects.claims_bucket(pool)}"]
    for name in names:
        async with connection.mapped():
            with suppress(nats.js.errors.NotFoundError):
                await connection.jetstream.delete_stream(name)
