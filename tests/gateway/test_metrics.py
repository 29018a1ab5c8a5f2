"""What `/metrics` says of a gateway that served, refused and broke."""

from __future__ import annotations

import asyncio
import contextlib
import re
from collections.abc import Iterator
from pathlib import Path

import httpx2
from prometheus_client.parser import text_string_to_metric_families

from lacre import problems
from lacre_gateway.admin.api import create_admin
from lacre_gateway.budget.plans import PLANS_FILE
from lacre_gateway.policy.cedar import PolicyError
from parts.fake_worker import FakeWorker
from parts.issuer import Issuer
from parts.keys import MODEL
from parts.stage import Stage

Samples = dict[tuple[str, tuple[tuple[str, str], ...]], float]


async def scrape(stage: Stage) -> Samples:
    transport = httpx2.ASGITransport(stage.admin, client=("127.0.0.1", 40001))
    async with httpx2.AsyncClient(transport=transport, base_url="http://admin.test") as admin:
        return samples((await admin.get("/metrics")).text)


def samples(text: str) -> Samples:
    return {
        (sample.name, tuple(sorted(sample.labels.items()))): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }


def value(found: Samples, name: str, **labels: str) -> float:
    return found.get((name, tuple(sorted(labels.items()))), 0.0)


async def ask(stage: Stage, client: httpx2.AsyncClient, **headers: str | None) -> httpx2.Response:
    return await stage.post(client, **headers)


async def test_a_request_that_was_answered(stage: Stage, worker: FakeWorker, client: httpx2.AsyncClient) -> None:
    body, _, _ = stage.seal()
    answer = await stage.post(client, body=body)
    await stage.trail()
    found = await scrape(stage)
    assert value(found, "lacre_requests_total", outcome="answered", problem="none") == 1
    assert value(found, "lacre_received_bytes_total") == len(body)
    assert value(found, "lacre_sent_bytes_total") == len(answer.content)
    assert value(found, "lacre_records_total") == 4
    assert value(found, "lacre_request_first_byte_seconds_count") == 1
    assert value(found, "lacre_request_seconds_count", outcome="answered") == 1
    assert value(found, "lacre_settlements_total", result="receipted") == 1
    for kind, count in {"prompt": 12, "cached": 2, "completion": 7}.items():
        assert value(found, "lacre_tokens_total", pool="default", model=MODEL, kind=kind) == count
    assert value(found, "lacre_audit_committed_entries_total") == 2
    assert value(found, "lacre_audit_entries") == 3  # and the start
    assert value(found, "lacre_requests_in_flight") == 0


async def test_requests_that_were_refused(stage: Stage, client: httpx2.AsyncClient) -> None:
    await client.post("/v1/sealed", content=b"", headers=stage.headers("not-a-token"))
    await ask(stage, client, lacre_model="nowhere")
    await ask(stage, client)
    found = await scrape(stage)
    for problem in (problems.INVALID_TOKEN, problems.UNKNOWN_POOL, problems.NO_WORKER):
        assert value(found, "lacre_requests_total", outcome="refused", problem=problem.slug) == 1
    assert value(found, "lacre_request_first_byte_seconds_count") == 0


async def test_one_that_broke(stage: Stage, worker: FakeWorker, client: httpx2.AsyncClient) -> None:
    worker.script.ending = f"error:{problems.BUSY.type}"
    await ask(stage, client)
    await stage.trail()
    found = await scrape(stage)
    assert value(found, "lacre_requests_total", outcome="broken", problem="none") == 1
    assert value(found, "lacre_settlements_total", result="unreceipted") == 1


async def test_what_is_under_way(stage: Stage, worker: FakeWorker, client: httpx2.AsyncClient) -> None:
    going, go_on = asyncio.Event(), asyncio.Event()

    async def pause() -> None:
        going.set()
        await go_on.wait()

    worker.script.between = pause
    asked = asyncio.create_task(ask(stage, client))
    await going.wait()
    while not any(each.started for each in stage.gateway.metrics.live):  # its first record waits for the audit log
        await asyncio.sleep(0.01)
    found = await scrape(stage)
    go_on.set()
    await asked
    assert value(found, "lacre_requests_in_flight") == value(found, "lacre_streams_open") == 1
    assert value(found, "lacre_workers", pool="default", region="lacre") == 1
    assert value(found, "lacre_worker_slots", pool="default", region="lacre", state="busy") == 1
    assert value(found, "lacre_worker_slots", pool="default", region="lacre", state="free") == 3
    assert value(found, "lacre_queue_requests", pool="default", region="lacre") == 0
    assert value(found, "lacre_pool_demand", pool="default", region="lacre") == 1


async def test_rules_that_were_refused(tmp_path: Path, issuer: Issuer) -> None:
    plans = 'default_plan = "p"\n[plans.p.user]\nrequests_per_minute = 9\n'
    stage = Stage.with_gateway(tmp_path, issuer, plans=plans)
    file = tmp_path / "policies" / PLANS_FILE
    for content, expected in ((plans, (0, 0, 0)), ("no such thing", (1, 1, 0)), (plans.replace("9", "8"), (0, 1, 1))):
        file.write_text(content)
        with contextlib.suppress(PolicyError):
            await stage.gateway.reload()
        found = await scrape(stage)
        names = ("lacre_rules_refused", "lacre_rules_refusals", "lacre_rules_reloads")
        assert tuple(value(found, name) for name in names) == expected
    await stage.gateway.close()


async def test_states(stage: Stage) -> None:
    found = await scrape(stage)
    assert value(found, "lacre_ready") == value(found, "lacre_fabric_connected") == value(found, "lacre_audit_writable") == 1
    assert value(found, "lacre_manifest_version") == 1
    assert value(found, "lacre_pool_away", pool="default") == 0
    stage.hub.cut_off |= {"default", "of no manifest"}
    found = await scrape(stage)
    assert value(found, "lacre_pool_away", pool="default") == 1
    assert [at for at in found if "of no manifest" in str(at)] == []
    stage.gateway.drain()
    stage.gateway.fabric = None
    found = await scrape(stage)
    assert value(found, "lacre_ready") == value(found, "lacre_fabric_connected") == 0
    assert value(found, "lacre_draining") == 1
    assert not [at for at in found if at[0] == "lacre_queue_requests"]  # rather nothing than a number that may be wrong


async def test_labels_are_of_closed_sets(stage: Stage, worker: FakeWorker, client: httpx2.AsyncClient) -> None:
    """Whatever callers write, nothing of it becomes a label."""
    for name in ("lacre_pool", "lacre_model", "lacre_action", "lacre_shape", "lacre_max_tokens", "content_type"):
        await ask(stage, client, **{name: "canary-7"})
    await client.post("/v1/canary-7", content=b"", headers=stage.headers(stage.issuer.token(sub="canary-7", tenant="canary-7")))
    await stage.post(client, stage.issuer.token(sub="canary-7"))
    await stage.trail()
    found = await scrape(stage)
    assert value(found, "lacre_requests_total", outcome="answered", problem="none") == 1
    assert not [at for at in found if "canary-7" in repr(at)]
    allowed = {problem.slug for problem in problems.BY_TYPE.values()} | {"none"}
    assert {labels["problem"] for labels in labels_of(found) if "problem" in labels} <= allowed


def labels_of(found: Samples) -> Iterator[dict[str, str]]:
    return (dict(labels) for _, labels in found)


async def test_every_metric_says_what_it_is(stage: Stage) -> None:
    await scrape(stage)
    text = stage.gateway.metrics.show().decode()
    ours = {name for name in re.findall(r"^# TYPE (\S+)", text, re.MULTILINE) if name.startswith("lacre_")}
    assert len(ours) > 20
    for name in ours:
        assert re.search(rf"^# HELP {name} \S", text, re.MULTILINE), name
    assert create_admin  # every app has a registry of its own: another one for the same process must not clash
