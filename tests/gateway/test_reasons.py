"""Every refusal: its reason in the gateway's log, and its request id in what the caller sees; and no flood of lines.

`conftest.put_up` holds every other test of this folder to the first of these.
"""

from __future__ import annotations

import asyncio
import io
import json
from collections.abc import Callable
from typing import Any

import httpx2
import pytest

from lacre import problems
from lacre.problems import Problem, details
from lacre_fabric.logs import make_log
from lacre_gateway.http import line_limit
from lacre_gateway.http.line_limit import ALTOGETHER, PER_ADDRESS, LineLimit
from parts.fake_worker import FakeWorker, Script
from parts.stage import Stage
from parts.waiting import until

from .conftest import PutUp

PLANS = """currency = "EUR"
default_plan = "small"

[plans.small.user]
requests_per_minute = 1

[plans.tiny.user]
tokens_per_minute = 10
"""
ROUTED = {"pool": "default", "model": "smollm2-135m", "action": "chat"}


def last(stage: Stage) -> dict[str, Any]:
    return [line for line in stage.logged() if line["event"] == "request"][-1]


def check(stage: Stage, response: httpx2.Response, problem: Problem, reason: str, **fields: str) -> None:
    line = last(stage)
    assert (response.status_code, Problem.type_in(response.content)) == (problem.status, problem.type)
    assert (line["problem"], line["status"], line["reason"]) == (problem.slug, problem.status, reason)
    assert {name: line.get(name) for name in fields} == fields
    assert details.read(response.content)["request_id"] == response.headers["lacre-request-id"] == line["request_id"]


async def test_which_rule(stage: Stage, client: httpx2.AsyncClient) -> None:
    asked = await stage.post(client, lacre_max_tokens="40000")
    check(stage, asked, problems.TOO_MANY_TOKENS, "policy: forbidden by output-ceiling", limit="max_tokens", **ROUTED)
    asked = await stage.post(client, lacre_action="http")
    check(stage, asked, problems.PATH_NOT_ALLOWED, "policy: no rule permits it", **{**ROUTED, "action": "http"})


async def test_which_limit(put_up: PutUp) -> None:
    stage = await put_up(plans=PLANS)
    async with stage.http() as client, stage.fake_worker():
        token = stage.issuer.token
        assert (await stage.post(client, token())).status_code == 200
        asked = await stage.post(client, token())
        line = last(stage)
        assert line["reason"].startswith("used up: user:small/requests_per_minute@")
        check(stage, asked, problems.RATE_LIMITED, line["reason"], limit="requests_per_minute", scope="user", **ROUTED)
        asked = await stage.post(client, token(sub="bob", plan="tiny"), lacre_max_tokens="11")
        check(stage, asked, problems.ABOVE_LIMIT, "above user:tiny/tokens_per_minute", limit="tokens_per_minute", **ROUTED)
        asked = await stage.post(client, token(sub="bob", plan="secret-plan"))
        check(stage, asked, problems.UNKNOWN_PLAN, "plan: not in plans.toml", **ROUTED)
        assert "secret-plan" not in stage.log.getvalue()


async def test_which_limit_of_the_process(put_up: PutUp) -> None:
    stage = await put_up(limits="concurrent_per_subject = 1\nrequests_in_flight = 2\nfailed_auth_per_minute = 1")
    hold = asyncio.Event()
    async with stage.http() as client, stage.fake_worker() as worker:
        worker.script = Script(before=hold.wait)
        running = [asyncio.create_task(stage.post(client))]
        await until(lambda: len(worker.opened) == 1)
        own = await stage.post(client)
        check(stage, own, problems.RATE_LIMITED, "limit: concurrent_per_subject", limit="concurrent_per_subject", scope="user")
        running.append(asyncio.create_task(stage.post(client, stage.issuer.token(sub="bob"))))
        await until(lambda: len(worker.opened) == 2)
        full = await stage.post(client, stage.issuer.token(sub="carol"))
        check(stage, full, problems.OVERLOADED, "limit: requests_in_flight", limit="requests_in_flight", scope="gateway")
        hold.set()
        await asyncio.gather(*running)
        await stage.post(client, "a.b.c")
        failed = await stage.post(client, "a.b.c")
        check(stage, failed, problems.RATE_LIMITED, "limit: failed_auth_per_minute", scope="address")


async def test_which_pool(stage: Stage, client: httpx2.AsyncClient) -> None:
    reason = "no live worker of the pool serves the model"
    check(stage, await stage.post(client), problems.NO_WORKER, reason, **ROUTED)
    stage.gateway.fabric = None
    reason = "the gateway is not connected to its message fabric yet"
    check(stage, await stage.post(client), problems.UNAVAILABLE, reason, **ROUTED)
    assert (await client.get("/readyz")).status_code == 503
    assert last(stage)["reason"] == "fabric: not connected to NATS"


async def test_a_pool_that_the_manifest_does_not_have_stays_out_of_the_log(stage: Stage, client: httpx2.AsyncClient) -> None:
    assert (await stage.post(client, lacre_pool="pasted-by-mistake")).status_code == 404
    assert "pasted-by-mistake" not in stage.log.getvalue() and "pool" not in last(stage)


async def test_an_answered_request_tells_no_more_than_before(
    stage: Stage, worker: FakeWorker, client: httpx2.AsyncClient
) -> None:
    assert (await stage.post(client)).status_code == 200
    assert not {"pool", "model", "reason", "problem"} & set(last(stage))


async def test_the_audit_log(stage: Stage, worker: FakeWorker, client: httpx2.AsyncClient) -> None:
    await stage.gateway.audit.close()
    check(stage, await stage.post(client), problems.AUDIT_UNAVAILABLE, "the audit log is closed", **ROUTED)


async def test_an_issuer_is_named(stage: Stage, client: httpx2.AsyncClient) -> None:
    response = await stage.post(client, stage.issuer.token(aud="x"))
    check(stage, response, problems.INVALID_TOKEN, "aud: for-another-audience", issuer="https://issuer.example")


# A flood of callers without a token


class Clock:
    def __init__(self) -> None:
        self.now = 600.0

    def __call__(self) -> float:
        return self.now


def limited() -> tuple[LineLimit, Clock, Callable[[], list[dict[str, Any]]]]:
    stream, clock = io.StringIO(), Clock()
    return LineLimit(make_log(stream), clock), clock, lambda: [json.loads(line) for line in stream.getvalue().splitlines()]


def test_of_one_address() -> None:
    lines, clock, told = limited()
    own = [lines.allows("192.0.2.1", "invalid-token", "exp: expired") for _ in range(PER_ADDRESS + 7)]
    assert own == [True] * PER_ADDRESS + [False] * 7
    assert lines.allows("192.0.2.2", "invalid-token", "exp: expired") and not told()
    clock.now += 60
    assert lines.allows("192.0.2.1", "invalid-token", "exp: expired")
    [line] = told()
    assert (line["problem"], line["reason"], line["number"]) == ("invalid-token", "exp: expired", 7)
    lines.close()
    assert len(told()) == 1


def test_of_all_addresses_with_bounded_memory() -> None:
    lines, _, told = limited()
    allowed = sum(lines.allows(f"10.{i >> 16}.{i >> 8 & 255}.{i & 255}", "rate-limited", "") for i in range(ALTOGETHER + 1000))
    assert allowed == ALTOGETHER and len(lines._lines) <= ALTOGETHER
    for number in range(1000):
        lines.allows("192.0.2.1", "invalid-token", str(number))
    lines.close()
    assert len(told()) == line_limit._MAX_KINDS + 1
    assert sum(line["number"] for line in told()) == 2000
    assert sum(line["number"] for line in told() if line["problem"] == "other") == 1000 - (line_limit._MAX_KINDS - 1)


async def test_a_flood_of_bad_tokens_is_counted_and_a_known_caller_s_refusal_still_has_its_line(
    stage: Stage, client: httpx2.AsyncClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(line_limit, "PER_ADDRESS", 5)
    stage.gateway.lines._clock = Clock()
    good = stage.issuer.token()
    assert (await stage.post(client, good)).status_code == 503  # its verdict is remembered
    for _ in range(9):
        assert (await stage.post(client, "a.b.c")).status_code == 401
    check(stage, await stage.post(client, good), problems.NO_WORKER, "no live worker of the pool serves the model")
    assert len([line for line in stage.logged() if line.get("status") == 401]) == 5
    stage.gateway.lines.close()
    assert (stage.logged()[-1]["problem"], stage.logged()[-1]["number"]) == ("invalid-token", 4)
