"""Replaces the gateways' signing key while requests run (see `keys.grant_keys`)."""

from __future__ import annotations

import time
from dataclasses import dataclass

from lacre.runtime import tasks
from lacre_fabric.nats.connection import Connection
from lacre_fabric.nats.key_holders import await_accepting
from lacre_fabric.operate.rotation import GRACE, LOAD_WAIT, NotTakenUp, publish
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
    keys = site.grant_keys
    if (leave_at := keys.leaving) is not None and not keys.due(time.time()):
        return GrantReplaced(keys.public()[0], leave_at, before=True)
    async with site.changing():
        keys.settle(time.time())
        new = keys.stage()
    await publish(site, connection)
    lacking = [f"{pool}/{node}" for pool, node in await _lacking(site, connection, new, wait)]
    if lacking:
        raise NotTakenUp(
            f"not every worker read the manifest with the new key within {wait:.0f} s ({', '.join(lacking)}): check that they "
            "are of this version, and try again"
        )
    leave_at = time.time() + grace
    async with site.changing():
        keys.switch(leave_at)
    await publish(site, connection)
    return GrantReplaced(new, leave_at)


async def _lacking(site: Site, connection: Connection, key: bytes, wait: float) -> list[tuple[str, str]]:
    async def ask(pool: str) -> list[tuple[str, str]]:
        return [(pool, node) for node in sorted(await await_accepting(connection, pool, key, wait))]

    found = await tasks.together(*map(ask, site.pools))
    return [one for each in found for one in each]
