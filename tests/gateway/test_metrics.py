"""What `/metrics` says of a gateway that served, refused and broke."""

from __future__ import annotations

import asyncio
import contextlib
import re
from pathlib import Path

import httpx2
from prometheus_client.parser import text_string_to_metric_families

from lacre import problems
from lacre_fabric.nats.subjects import DEFAULT_REGION
from lacre_fabric.work.model_counts import ModelCounts
from lacre_gateway.budget.plans import PLANS_FILE
from lacre_gateway.policy.cedar import PolicyError
from parts.fake_worker import FakeWorker
from parts.issuer import Issuer
from parts.keys import MODEL
from parts.stage import Stage, until


class Samples(dict[tuple[str, frozenset[tuple[str, str]]], float]):
    """By name and labels; what is not there is 0."""

    def of(self, name: str, **labels: str) -> float:
        return self.get((f"lacre_{name}", frozenset(labels.items())), 0.0)


async def scrape(stage: Stage) -> Samples:
    async with stage.http(app=stage.admin) as admin:
        text = (await admin.get("/metrics")).text
    samples = [sample for family in text_string_to_metric_families(text) for sample in family.samples]
    return Samples({(sample.name, frozenset(sample.labels.items())): sample.value for sample in samples})


async def test_a_request_that_was_answered(stage: Stage, worker: FakeWorker, client: httpx2.AsyncClient) -> None:
    body, _, _ = stage.seal()
    answer = await stage.post(client, body=body)
    await stage.trail()
    # The disk has an entry a moment before it is counted.
    await until(lambda: b"lacre_audit_committed_entries_total 2.0" in stage.gateway.metrics.show())
    found = await scrape(stage)
    assert found.of("requests_total", outcome="answered", problem="none") == 1
    assert found.of("received_bytes_total") == len(body)
    assert found.of("sent_bytes_total") == len(answer.content)
    assert found.of("records_total") == 4
    assert found.of("request_first_byte_seconds_count") == 1
    assert found.of("request_seconds_count", outcome="answered") == 1
    assert found.of("settlements_total", result="receipted") == 1
    for kind, count in {"prompt": 12, "cached": 2, "completion": 7}.items():
        assert found.of("tokens_total", pool="default", model=MODEL, kind=kind) == count
    assert found.of("audit_committed_entries_total") == 2
    assert found.of("audit_entries") == 3  # and the start
    assert found.of("requests_in_flight") == 0


async def test_requests_that_were_refused(stage: Stage, client: httpx2.AsyncClient) -> None:
    await client.post("/v1/sealed", content=b"", headers=stage.headers("not-a-token"))
    await stage.post(client, lacre_model="nowhere")
    await stage.post(client)
    found = await scrape(stage)
    for problem in (problems.INVALID_TOKEN, problems.UNKNOWN_POOL, problems.NO_WORKER):
        assert found.of("requests_total", outcome="refused", problem=problem.slug) == 1
    assert found.of("request_first_byte_seconds_count") == 0


async def test_one_that_broke(stage: Stage, worker: FakeWorker, client: httpx2.AsyncClient) -> None:
    worker.script.ending = f"error:{problems.BUSY.type}"
    await stage.post(client)
    await stage.trail()
    found = await scrape(stage)
    assert found.of("requests_total", outcome="broken", problem="none") == 1
    assert found.of("settlements_total", result="unreceipted") == 1


async def test_what_is_under_way(stage: Stage, worker: FakeWorker, client: httpx2.AsyncClient) -> None:
    going, go_on = asyncio.Event(), asyncio.Event()

    async def pause() -> None:
        going.set()
        await go_on.wait()

    worker.script.between = pause
    asked = asyncio.create_task(stage.post(client))
    await going.wait()
    await until(lambda: any(each.started for each in stage.gateway.metrics.live))  # its first record waits for the audit log
    found = await scrape(stage)
    go_on.set()
    await asked
    assert found.of("requests_in_flight") == found.of("streams_open") == 1
    assert found.of("workers", pool="default", region="lacre") == 1
    assert found.of("worker_slots", pool="default", region="lacre", state="busy") == 1
    assert found.of("worker_slots", pool="default", region="lacre", state="free") == 3
    assert found.of("queue_requests", pool="default", region="lacre") == 0
    assert found.of("pool_demand", pool="default", region="lacre") == 1


async def test_rules_that_were_refused(tmp_path: Path, issuer: Issuer) -> None:
    plans = 'default_plan = "p"\n[plans.p.user]\nrequests_per_minute = 9\n'
    stage = Stage.with_gateway(tmp_path, issuer, plans=plans)
    file = tmp_path / "policies" / PLANS_FILE
    for content, expected in ((plans, (0, 0, 0)), ("no such thing", (1, 1, 0)), (plans.replace("9", "8"), (0, 1, 1))):
        file.write_text(content)
        with contextlib.suppress(PolicyError):
            await stage.gateway.reload()
        found = await scrape(stage)
        names = ("rules_refused", "rules_refusals", "rules_reloads")
        assert tuple(found.of(name) for name in names) == expected
    await stage.gateway.close()


async def test_states(stage: Stage) -> None:
    found = await scrape(stage)
    assert found.of("ready") == found.of("fabric_connected") == found.of("audit_writable") == 1
    assert found.of("manifest_version") == 1
    assert found.of("pool_away", pool="default") == 0
    stage.hub.cut_off |= {"default", "of no manifest"}
    found = await scrape(stage)
    assert found.of("pool_away", pool="default") == 1
    assert [at for at in found if "of no manifest" in str(at)] == []
    stage.gateway.drain()
    stage.gateway.fabric = None
    found = await scrape(stage)
    assert found.of("ready") == found.of("fabric_connected") == 0
    assert found.of("draining") == 1
    assert not [at for at in found if at[0] == "lacre_queue_requests"]  # rather nothing than a number that may be wrong


async def test_what_workers_do_is_shown_by_model(stage: Stage) -> None:
    """Of models of the manifest alone: a worker may announce any name."""
    at_first = (0, 1, *(0,) * 14, 2)
    for pool, model in (("default", MODEL), ("default", "of no manifest"), ("of no manifest", MODEL)):
        stage.hub.counts[pool, DEFAULT_REGION, model] = ModelCounts(3, 100, 40, 7, at_first, 21.5)
    found = await scrape(stage)
    place = {"pool": "default", "region": DEFAULT_REGION}
    shown = {
        name: value for (name, labels), value in found.items() if frozenset({**place, "model_name": MODEL}.items()) == labels
    }
    assert shown == {
        "vllm:num_requests_running": 3, "vllm:num_requests_waiting": 0, "vllm:prompt_tokens_total": 100,
        "vllm:generation_tokens_total": 7, "vllm:prefix_cache_queries_total": 100, "vllm:prefix_cache_hits_total": 40,
    }  # fmt: skip
    first = "gen_ai_server_time_to_first_token_seconds"
    of_model = frozenset({**place, "gen_ai_request_model": MODEL}.items())
    assert (found[f"{first}_count", of_model], found[f"{first}_sum", of_model]) == (3, 21.5)
    buckets = {dict(labels)["le"]: value for (name, labels), value in found.items() if name == f"{first}_bucket"}
    assert (buckets["0.001"], buckets["0.005"], buckets["10.0"], buckets["+Inf"]) == (0, 1, 1, 3)
    assert [at for at in found if "of no manifest" in repr(at)] == []


async def test_labels_are_of_closed_sets(stage: Stage, worker: FakeWorker, client: httpx2.AsyncClient) -> None:
    """Whatever callers write, nothing of it becomes a label."""
    for name in ("lacre_pool", "lacre_model", "lacre_action", "lacre_shape", "lacre_max_tokens", "content_type"):
        await stage.post(client, **{name: "canary-7"})
    await client.post("/v1/canary-7", content=b"", headers=stage.headers(stage.issuer.token(sub="canary-7", tenant="canary-7")))
    await stage.post(client, stage.issuer.token(sub="canary-7"))
    await stage.trail()
    found = await scrape(stage)
    assert found.of("requests_total", outcome="answered", problem="none") == 1
    assert not [at for at in found if "canary-7" in repr(at)]
    allowed = {problem.slug for problem in problems.BY_TYPE.values()} | {"none"}
    assert {value for _, labels in found for name, value in labels if name == "problem"} <= allowed


async def test_every_metric_says_what_it_is(stage: Stage) -> None:
    await scrape(stage)
    text = stage.gateway.metrics.show().decode()
    ours = {
        name for name in re.findall(r"^# TYPE (\S+)", text, re.MULTILINE) if name.startswith(("lacre_", "vllm:", "gen_ai_"))
    }
    assert len(ours) > 26
    for name in ours:
        assert re.search(rf"^# HELP {name} \S", text, re.MULTILINE), name
