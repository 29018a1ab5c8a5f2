"""Who may administer a gateway, what they can do, and what is recorded of it."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from typing import Any

import httpx2
import pytest

from lacre import problems
from parts.issuer import Issuer
from parts.stage import Stage

from .conftest import PutUp

CALLS = [
    ("GET", "/v1/status", "admin:usage"), ("GET", "/v1/revocations", "admin:revoke"), ("POST", "/v1/reload", "admin:reload"),
    ("POST", "/v1/drain", "admin:drain"),
]  # fmt: skip


@pytest.fixture
async def admin(stage: Stage) -> AsyncIterator[httpx2.AsyncClient]:
    transport = httpx2.ASGITransport(stage.admin, client=("127.0.0.1", 40001))
    async with httpx2.AsyncClient(transport=transport, base_url="http://admin.test") as client:
        yield client


def bearer(stage: Stage, scope: str = "lacre:admin", **claims: Any) -> dict[str, str]:
    return {"authorization": f"Bearer {stage.issuer.token(scope=scope, sub='root', **claims)}"}


def recorded(stage: Stage, kind: str) -> list[dict[str, Any]]:
    return [entry for entry in stage.entries() if entry["kind"] == kind]


@pytest.mark.parametrize(("method", "path", "action"), CALLS)
async def test_whoever_may_not(stage: Stage, admin: httpx2.AsyncClient, method: str, path: str, action: str) -> None:
    for headers, problem in (
        ({}, problems.INVALID_TOKEN),
        ({"authorization": "Bearer a.b.c"}, problems.INVALID_TOKEN),
        (bearer(stage, "lacre:http"), problems.FORBIDDEN),
    ):
        refused = await admin.request(method, path, headers=headers)
        assert refused.status_code == problem.status
        assert refused.json()["type"] == problem.type
    [denied] = recorded(stage, "admin")  # who has no valid token is nobody that could be recorded
    assert (denied["decision"], denied["action"], denied["subject"], denied["tenant"]) == ("deny", action, "root", "acme")
    assert not stage.gateway.draining


async def test_status(stage: Stage, admin: httpx2.AsyncClient) -> None:
    shown = (await admin.get("/v1/status", headers=bearer(stage))).json()
    assert shown["gateway"] == "g1"
    assert shown["missing"] == {}
    assert shown["pools"]["default"]["lacre"] == {"workers": 0, "busy": 0, "free": 0, "queued": 0, "demand": 0}
    assert shown["rules"]["policy_set"] == stage.gateway.rules.status.policy_set
    [allowed] = recorded(stage, "admin")
    assert (allowed["decision"], allowed["policies"], allowed["gateway"]) == ("allow", ["admin-by-scope"], "g1")


async def test_reload(stage: Stage, admin: httpx2.AsyncClient) -> None:
    done = await admin.post("/v1/reload", headers=bearer(stage))
    assert done.status_code == 200
    assert done.json()["taken"] is True
    assert recorded(stage, "admin")[0]["action"] == "admin:reload"
    while recorded(stage, "event")[-1]["event"] != "reloaded":  # what was asked is durable by now, what came of it soon
        await asyncio.sleep(0.01)
    assert recorded(stage, "event")[-1] | {"time": 0} == {
        "kind": "event", "time": 0, "event": "reloaded", "actor": "acme/root", "target": None, "count": None, "reason": None,
        "policy_set": done.json()["policy_set"], "rules": stage.gateway.rules.status.rules,
    }  # fmt: skip


async def test_drain(stage: Stage, admin: httpx2.AsyncClient, client: httpx2.AsyncClient) -> None:
    assert (await client.get("/readyz")).status_code == 200
    done = await admin.post("/v1/drain", headers=bearer(stage))
    assert (done.status_code, done.json()) == (202, {"draining": True, "streams": 0})
    ready = await client.get("/readyz")
    assert ready.status_code == 503
    assert set(ready.json()["missing"]) == {"draining"}


async def test_nothing_is_done_that_is_not_recorded(stage: Stage, admin: httpx2.AsyncClient) -> None:
    await stage.gateway.audit.close()
    refused = await admin.post("/v1/drain", headers=bearer(stage))
    assert (refused.status_code, refused.json()["type"]) == (503, problems.AUDIT_UNAVAILABLE.type)
    assert not stage.gateway.draining


async def test_the_public_app_has_none_of_it(stage: Stage, client: httpx2.AsyncClient) -> None:
    for method, path, _ in (*CALLS, ("GET", "/metrics", ""), ("GET", "/openapi.json", "")):
        assert (await client.request(method, path, headers=bearer(stage))).status_code == 404


async def test_its_description(stage: Stage, admin: httpx2.AsyncClient) -> None:
    document = (await admin.get("/openapi.json")).json()
    assert set(document["paths"]) >= {path for _, path, _ in CALLS} | {"/metrics"}
    for path, operations in document["paths"].items():
        for operation in operations.values():
            assert ("security" in operation) is (path != "/metrics")
    assert "HTTPValidationError" not in json.dumps(document)


async def test_revocation(stage: Stage, admin: httpx2.AsyncClient, client: httpx2.AsyncClient) -> None:
    token = stage.issuer.token(sub="mallory", iat=int(stage.gateway.clock()))
    before = await stage.post(client, token)
    assert before.status_code == 503  # let in: there is no worker
    done = await admin.post("/v1/revocations", headers=bearer(stage), json={"sub": "mallory"})
    assert done.status_code == 201
    after = await stage.post(client, token)
    assert after.status_code == 401
    listed = (await admin.get("/v1/revocations", headers=bearer(stage))).json()
    assert (listed["current"], listed["revocations"]) == (True, [done.json()])
    assert [entry["target"] for entry in recorded(stage, "admin")] == ["mallory", None]
    refused = await admin.post("/v1/revocations", headers=bearer(stage, ""), json={"sub": "alice"})
    assert refused.status_code == 403


@pytest.mark.parametrize(
    "asked",
    [{}, {"jti": "a", "sub": "b"}, {"sub": ""}, {"sub": "a\nb"}, {"sub": "a", "until": 1}, {"sub": "a", "issuer": "nobody"}],
)
async def test_a_revocation_that_says_nothing(stage: Stage, admin: httpx2.AsyncClient, asked: dict[str, Any]) -> None:
    refused = await admin.post("/v1/revocations", headers=bearer(stage), json=asked)
    assert (refused.status_code, refused.json()["type"]) == (422, "urn:lacre:problem:invalid-arguments")
    assert list(stage.gateway.revocations) == []


async def test_no_fabric_no_revocation(stage: Stage, admin: httpx2.AsyncClient) -> None:
    stage.gateway.fabric = None
    refused = await admin.post("/v1/revocations", headers=bearer(stage), json={"sub": "mallory"})
    assert (refused.status_code, refused.json()["type"]) == (503, problems.UNAVAILABLE.type)


async def test_usage(stage: Stage, admin: httpx2.AsyncClient, client: httpx2.AsyncClient) -> None:
    async with stage.fake_worker():
        answer = await stage.post(client)
    assert answer.status_code == 200
    await stage.trail()
    used = await admin.get("/v1/usage", params={"tenant": "acme"}, headers=bearer(stage))
    assert used.status_code == 200
    assert used.json()["tenant"] == "acme"
    assert used.json()["budgets"]
    assert recorded(stage, "admin")[-1]["target"] == "acme"
    assert (await admin.get("/v1/usage", params={"tenant": "a/b"}, headers=bearer(stage))).status_code == 422
    assert (await admin.get("/v1/usage", params={"tenant": "acme"}, headers=bearer(stage, ""))).status_code == 403


@pytest.mark.parametrize("said", [b"{", b" " * (2**14 + 1)], ids=["slow", "long"])
async def test_a_body_has_an_end(put_up: PutUp, said: bytes) -> None:
    """In time and in bytes: of whoever may use it, too."""
    stage = await put_up(limits="body_timeout = 0.2")

    async def body() -> AsyncIterator[bytes]:
        yield said
        await asyncio.Event().wait()

    transport = httpx2.ASGITransport(stage.admin, client=("127.0.0.1", 40001))
    async with httpx2.AsyncClient(transport=transport, base_url="http://admin.test") as client:
        sent = client.post("/v1/revocations", headers=bearer(stage), content=body())
        refused = await asyncio.wait_for(sent, 20)
    assert (refused.status_code, refused.json()["type"].rpartition(":")[2]) == (
        (408, "body-too-slow") if said == b"{" else (413, "body-too-large")
    )
    await stage.gateway.close()


async def test_refusals_have_a_limit(put_up: PutUp, issuer: Issuer) -> None:
    """Each denial is an entry in the audit log: whoever may do nothing must not fill the disk."""
    stage = await put_up(limits="refused_per_minute = 2")
    stage.gateway.refusals._clock = lambda: 30.0
    transport = httpx2.ASGITransport(stage.admin, client=("127.0.0.1", 40001))
    async with httpx2.AsyncClient(transport=transport, base_url="http://admin.test") as client:
        answers = [await client.get("/v1/status", headers=bearer(stage, "lacre:http")) for _ in range(5)]
        other = await client.get(
            "/v1/status", headers={"authorization": f"Bearer {issuer.token(scope='lacre:admin', sub='other')}"}
        )
    assert [answer.status_code for answer in answers] == [403, 403, 429, 429, 429]
    assert (answers[2].headers["retry-after"], other.status_code) == ("30", 200)
    assert len(recorded(stage, "admin")) == 3
    await stage.gateway.close()
    assert [(event["event"], event["count"]) for event in recorded(stage, "event")][-2:] == [
        ("unrecorded", 3),
        ("stopped", None),
    ]
