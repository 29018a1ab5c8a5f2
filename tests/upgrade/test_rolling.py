"""Two versions beside each other: gateways, workers and SDK clients of the previous version and of this one."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from typing import Any

import pytest

from parts.versions import Version, previous, this
from upgrade.stage import GATEWAYS, Deployment

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def old() -> Version:
    return previous()


@pytest.mark.timeout(900)  # it takes two minutes on two free cores
async def test_both_orders_of_a_rolling_upgrade_and_back(tmp_path: Path, old: Version) -> None:
    """Under load of both versions' SDKs. No request fails, in any of the states between."""
    new = this()
    async with Deployment(tmp_path, old, new) as site:
        await site.up()
        site.begin_load()
        await site.answers("all old")
        # Workers first, and the site's commands before everything else.
        await site.publish(new)
        await site.answers("all old, a new manifest")
        await site.roll_workers(new)
        await site.answers("new workers, old gateways")
        await site.roll_gateways(new)
        await site.answers("all new")
        checks = await site.receipt_checks()
        assert checks.keys() == {"mac"}, checks
        # And back.
        await site.roll_workers(old)
        await site.answers("old workers, new gateways")
        checks = await site.receipt_checks()
        assert checks.keys() == {"mac", "signature"}, checks
        await site.roll_gateways(old)
        await site.publish(old)
        await site.answers("all old again")
        # Gateways first, and the site's commands last.
        await site.roll_gateways(new)
        await site.answers("new gateways, old workers")
        await site.roll_workers(new)
        await site.answers("all new, an old manifest")
        await site.publish(new)
        await site.answers("all new again")
        whole = {load.version.name: await load.ended() for load in site.loads}
        twice = sum(len(load.lines("whole, sent twice")) for load in site.loads)
        print(json.dumps({"whole": whole, "failed": 0, "sent twice": twice, "states": site.counts}))
        for version in (old, new):
            shown = json.loads(await asyncio.to_thread(manifest_shown, version, site))
            assert shown["pools"].keys() == {"default"}
        await site.stop_gateways()
        logs = {version.name: [audit(version, site.audit_of(name)) for name in GATEWAYS] for version in (old, new)}
    assert logs["old"] == [{name: log[name] for name in before} for before, log in zip(logs["old"], logs["new"], strict=True)]
    assert all(log["ok"] for log in logs["new"])
    assert sum(log["requests"] for log in logs["new"]) >= sum(whole.values())


def audit(version: Version, log: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(version.lacre("audit", "verify", str(log), "--json"))
    return found


def manifest_shown(version: Version, site: Deployment) -> str:
    return version.lacre(
        "manifest", "show", "--json", LACRE_URL=site.site.connection_string(site.balancer.url), XDG_STATE_HOME=str(site.folder)
    )
