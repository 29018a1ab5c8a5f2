"""Receipt keys and the gateways' key are replaced while clients ask over HTTP: no request is lost or asked again."""

from __future__ import annotations

import asyncio
import json
import time
from pathlib import Path

import pytest

from lacre.jose.jws import b64u, raw_public_key
from lacre.trust.chain import verify
from lacre.trust.manifest import Manifest, Pool
from lacre_fabric.keys.pool_keys import public_receipt_key
from lacre_fabric.keys.secret_files import read_ed25519s
from lacre_gateway.audit.check import verify as audit_verify
from parts.stage import LiveStage
from parts.stage.settings import POOL
from parts.stage.steady import SteadyLoad
from parts.up import run

GRACE = 4.0  # seconds that the old key stays listed


async def keys(live: LiveStage, *arguments: str) -> str:
    """`lacre keys`, as an operator runs it."""
    done = await asyncio.to_thread(run, "keys", *arguments, "--state", str(live.site.folder))
    assert done.returncode == 0, done.stderr
    return done.stdout


async def published(live: LiveStage) -> Pool:
    return (await manifest_of(live)).pools[POOL]


async def manifest_of(live: LiveStage) -> Manifest:
    connection = await live.connect()
    document = await connection.manifest()
    await connection.close()
    assert document is not None
    return verify(document, live.site.root, time.time()).manifest


@pytest.mark.slow
@pytest.mark.timeout(500)
async def test_receipt_keys_under_a_steady_load(tmp_path: Path) -> None:
    """Twice, with two gateways and a worker, by clients that never ask again."""
    async with LiveStage.on_air(tmp_path, gateways=2, workers=1) as live:
        file = live.site.receipt_file(POOL)
        first = public_receipt_key(file)
        kept = tmp_path / "kept"
        async with live.client(live.token("alice")) as client:
            kept.write_text((await client.chat("Say hello.", max_tokens=4)).receipt.text())
        async with SteadyLoad.on(live, 4, retries=0, resume=0) as load:
            for number in (1, 2):
                before = await published(live)
                assert "new receipt key" in await keys(live, "replace", "receipt", "--grace", str(GRACE))
                overlap = await published(live)
                assert overlap.receipt_key != before.receipt_key
                assert before.receipt_key in {key.receipt_key for key in overlap.keys}
                await load.more()
                while public_receipt_key(file) != overlap.receipt_key:
                    await keys(live, "tend")
                    await load.more(1)
                after = await published(live)
                assert len(after.past_receipts) == number
                assert after.past_receipts[-1].key == before.receipt_key
                assert after.receipt_key == overlap.receipt_key
                await load.more()
        assert load.failed == {}
        told = await asyncio.to_thread(run, "receipt", "check", str(kept), "--url", live.gateways[0].url, "--json")
        assert told.returncode == 0, told.stderr
        past = json.loads(told.stdout)
        assert past["key"] == b64u(first)
        assert past["until"] == after.past_receipts[0].until
        assert first not in {public_receipt_key(path) for path in file.parent.rglob("*.receipt")}
        for process in (*live.gateways, *live.workers):
            said = process.log.read_text()
            assert "receipt refused" not in said
            assert "worker.not_ready" not in said


@pytest.mark.slow
@pytest.mark.timeout(500)
async def test_the_gateways_key_under_a_steady_load(tmp_path: Path) -> None:
    """With two gateways, by clients that never ask again. Their audit logs go on, each with the new key."""
    async with LiveStage.on_air(tmp_path, gateways=2, workers=1) as live:
        site = live.site
        first = (await manifest_of(live)).gateway_key
        async with SteadyLoad.on(live, 4, retries=0, resume=0) as load:
            said = await keys(live, "replace", "grant", "--grace", "40")
            overlap = await manifest_of(live)
            assert overlap.other_gateway_keys == (first,)
            assert b64u(overlap.gateway_key) in said
            assert "earlier run" in await keys(live, "replace", "grant")  # changes nothing
            assert (await manifest_of(live)).gateway_keys == overlap.gateway_keys
            await load.more(10)
            while (await manifest_of(live)).other_gateway_keys:
                await keys(live, "tend")
                await load.more(1)
            await load.more(10)
        assert load.failed == {}
        assert [raw_public_key(key) for key in read_ed25519s(site.grant_keys.file)] == [overlap.gateway_key]
        for process in live.gateways:
            assert '"signing key replaced"' in process.log.read_text()
    for folder in (live.audit_of("g1"), live.audit_of("g2")):
        for key in (None, first, overlap.gateway_key):
            assert audit_verify(folder, key).wrong is None
        assert audit_verify(folder).logs == 2
