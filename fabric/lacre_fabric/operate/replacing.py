"""Replaces the gateways' signing key while requests run (see `keys.grant_keys`)."""

from __future__ import annotations

import time
from dataclasses import dataclass

from lacre.runtime import tasks
from lacre_fabric.nats.connection import Connection
from lacre_fabric.nats.key_holders import await_accepting
from lacre_fabric.operate import behind
from lacre_fabric.operate.rotation import GRACE, LOAD_WAIT, NotTakenUp, check_time, publish_now
from lacre_fabric.operate.site import Site


@dataclass(frozen=True, slots=True)
class GrantReplaced:
    """public: the key that gateways sign with now. leave_at: when the old one leaves, in seconds since the epoch. before:
    whether an earlier run replaced it.
    """

    public: bytes
    leave_at: float
    before: bool = False


async def replace_grant(site: Site, connection: Connection, *, grace: float = GRACE, wait: float = LOAD_WAIT) -> GrantReplaced:
    """Makes a new signing key for the gateways, and lets them use it. grace: seconds that the old one stays valid.

    While an old key is still to leave, it changes nothing. wait: seconds for the workers to read the manifest. Raises
    NotTakenUp if one did not, SettingsError or FabricUnavailable; then a later run continues.
    """
    check_time("the grace", grace)
    keys = site.grant_keys
    async with site.changing():
        await behind.check(site, connection)
        if keys.leaving is not None and not keys.due(time.time()):
            return await _replaced_before(site, connection)
        keys.settle(time.time())
        new = keys.stage()
        await publish_now(site, connection)
    lacking = [f"{pool}/{node}" for pool, node in await _lacking(site, connection, new, wait)]
    if lacking:
        raise NotTakenUp(
            f"not every worker read the manifest with the new key within {wait:.0f} s ({', '.join(lacking)}): check that they "
            "are of this version, and try again"
        )
    async with site.changing():
        if keys.staged != new:  # another process that waited for the same workers replaced it
            return await _replaced_before(site, connection)
        keys.switch(time.time(), grace)
        await publish_now(site, connection)
        return GrantReplaced(new, keys.leaving or time.time())


async def _replaced_before(site: Site, connection: Connection) -> GrantReplaced:
    """Publishes the manifest that names the key, if that run could not. Call it inside `Site.changing`."""
    keys = site.grant_keys
    if keys.unpublished:
        await publish_now(site, connection)
    return GrantReplaced(keys.public()[0], keys.leaving or time.time(), before=True)


async def _lacking(site: Site, connection: Connection, key: bytes, wait: float) -> list[tuple[str, str]]:
    async def ask(pool: str) -> list[tuple[str, str]]:
        return [(pool, node) for node in sorted(await await_accepting(connection, pool, key, wait))]

    found = await tasks.together(*map(ask, site.pools))
    return [one for each in found for one in each]
