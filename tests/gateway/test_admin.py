"""Who may administer a gateway, what they can do, and what is recorded of it."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from typing import Any

import httpx2
import pytest
from pydantic import ValidationError

from lacre import problems
from lacre_gateway.admin.reports import Reset
from parts.stage import Stage, until

from .conftest import PutUp

CALLS = [
    ("GET", "/v1/status", "admin:usage"), ("GET", "/v1/revocations", "admin:revoke"), ("POST", "/v1/reload", "admin:reload"),
    ("POST", "/v1/drain", "admin:drain"),
]  # fmt: skip


@pytest.fixture
async def admin(stage: Stage) -> AsyncIterator[httpx2.AsyncClient]:
    async with stage.http(app=stage.admin) as client:
        yield client


def said(answer: httpx2.Response) -> tuple[int, str]:
    """A refusal's status and the last part of its type."""
    return answer.status_code, answer.json()["type"].rpartition(":")[2]


def bearer(stage: Stage, scope: str = "lacre:admin", **claims: Any) -> dict[str, str]:
    return {"authorization": f"Bearer {stage.issuer.token(**{'scope': scope, 'sub': 'root', **claims})}"}


def recorded(stage: Stage, kind: str) -> list[dict[str, Any]]:
    return [entry for entry in stage.entries() if entry["kind"] == kind]


@pytest.mark.parametrize(("method", "path", "action"), CALLS)
async def test_whoever_may_not(stage: Stage, admin: httpx2.AsyncClient, method: str, path: str, action: str) -> None:
    for headers, problem in (
        ({}, problems.INVALID_TOKEN),
        ({"authorization": "Bearer a.b.c"}, problems.INVALID_TOKEN),
        (bearer(stage, "lacre:http"), problems.FORBIDDEN),
    ):
        assert said(await admin.request(method, path, headers=headers)) == (problem.status, problem.slug)
    [denied] = recorded(stage, "admin")  # who has no valid token is nobody that could be recorded
    assert (denied["decision"], denied["action"], denied["subject"], denied["tenant"]) == ("deny", action, "root", "acme")
    assert not stage.gateway.draining


async def test_status(stage: Stage, admin: httpx2.AsyncClient) -> None:
    shown = (await admin.get("/v1/status", headers=bearer(stage))).json()
    assert (shown["gateway"], shown["missing"]) == ("g1", {})
    assert shown["pools"]["default"]["lacre"] == {"workers": 0, "busy": 0, "free": 0, "queued": 0, "demand": 0}
    assert shown["rules"]["policy_set"] == stage.gateway.rules.status.policy_set
    [allowed] = recorded(stage, "admin")
    assert (allowed["decision"], allowed["policies"], allowed["gateway"]) == ("allow", ["admin-by-scope"], "g1")


async def test_reload(stage: Stage, admin: httpx2.AsyncClient) -> None:
    done = await admin.post("/v1/reload", headers=bearer(stage))
    assert (done.status_code, done.json()["taken"]) == (200, True)
    assert recorded(stage, "admin")[0]["action"] == "admin:reload"
    # What was asked is durable by now, what came of it soon.
    await until(lambda: recorded(stage, "event")[-1]["event"] == "reloaded")
    assert recorded(stage, "event")[-1] | {"time": 0} == {
        "kind": "event", "time": 0, "event": "reloaded", "actor": "acme/root", "target": None, "count": None, "reason": None,
        "policy_set": done.json()["policy_set"], "rules": stage.gateway.rules.status.rules,
    }  # fmt: skip


async def test_drain(stage: Stage, admin: httpx2.AsyncClient, client: httpx2.AsyncClient) -> None:
    assert (await client.get("/readyz")).status_code == 200
    done = await admin.post("/v1/drain", headers=bearer(stage))
    assert (done.status_code, done.json()) == (202, {"draining": True, "streams": 0})
    ready = await client.get("/readyz")
    assert (ready.status_code, set(ready.json()["missing"])) == (503, {"draining"})


async def test_nothing_is_done_that_is_not_recorded(stage: Stage, admin: httpx2.AsyncClient) -> None:
    await stage.gateway.audit.close()
    assert said(await admin.post("/v1/drain", headers=bearer(stage))) == (503, problems.AUDIT_UNAVAILABLE.slug)
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
    assert (await stage.post(client, token)).status_code == 503  # let in: there is no worker
    done = await admin.post("/v1/revocations", headers=bearer(stage), json={"sub": "mallory"})
    assert (done.status_code, (await stage.post(client, token)).status_code) == (201, 401)
    listed = (await admin.get("/v1/revocations", headers=bearer(stage))).json()
    assert (listed["current"], listed["revocations"]) == (True, [done.json()])
    assert [entry["target"] for entry in recorded(stage, "admin")] == ["mallory", None]
    assert (await admin.post("/v1/revocations", headers=bearer(stage, ""), json={"sub": "alice"})).status_code == 403
    stage.gateway.fabric = None
    answer = await admin.post("/v1/revocations", headers=bearer(stage), json={"sub": "alice"})
    assert said(answer) == (503, problems.UNAVAILABLE.slug)


@pytest.mark.parametrize(
    "asked",
    [{}, {"jti": "a", "sub": "b"}, {"sub": ""}, {"sub": "a\nb"}, {"sub": "a", "until": 1}, {"sub": "a", "issuer": "nobody"}],
)
async def test_a_revocation_that_says_nothing(stage: Stage, admin: httpx2.AsyncClient, asked: dict[str, Any]) -> None:
    assert said(await admin.post("/v1/revocations", headers=bearer(stage), json=asked)) == (422, "invalid-arguments")
    assert list(stage.gateway.revocations) == []


async def test_usage(stage: Stage, admin: httpx2.AsyncClient, client: httpx2.AsyncClient) -> None:
    async with stage.fake_worker():
        assert (await stage.post(client)).status_code == 200
    await stage.trail()
    used = await admin.get("/v1/usage", params={"tenant": "acme"}, headers=bearer(stage))
    assert (used.status_code, used.json()["tenant"]) == (200, "acme")
    assert used.json()["budgets"]
    assert recorded(stage, "admin")[-1]["target"] == "acme"
    assert (await admin.get("/v1/usage", params={"tenant": "a/b"}, headers=bearer(stage))).status_code == 422
    assert (await admin.get("/v1/usage", params={"tenant": "acme"}, headers=bearer(stage, ""))).status_code == 403


@pytest.mark.parametrize(
    ("start", "status", "problem"), [(b"{", 408, "body-too-slow"), (b" " * (2**14 + 1), 413, "body-too-large")]
)
async def test_a_body_has_an_end(put_up: PutUp, start: bytes, status: int, problem: str) -> None:
    """In time and in bytes: of whoever may use it, too."""
    stage = await put_up(limits="body_timeout = 0.2")

    async def body() -> AsyncIterator[bytes]:
        yield start
        await asyncio.Event().wait()

    async with stage.http(app=stage.admin) as client, asyncio.timeout(20):
        refused = await client.post("/v1/revocations", headers=bearer(stage), content=body())
    assert said(refused) == (status, problem)


async def test_refusals_have_a_limit(put_up: PutUp) -> None:
    """Each denial is an entry in the audit log: whoever may do nothing must not fill the disk."""
    stage = await put_up(limits="refused_per_minute = 2")
    stage.gateway.refusals._clock = lambda: 30.0
    async with stage.http(app=stage.admin) as client:
        answers = [await client.get("/v1/status", headers=bearer(stage, "lacre:http")) for _ in range(5)]
        other = await client.get("/v1/status", headers=bearer(stage, sub="other"))
    assert [answer.status_code for answer in answers] == [403, 403, 429, 429, 429]
    assert (answers[2].headers["retry-after"], other.status_code) == ("30", 200)
    assert len(recorded(stage, "admin")) == 3
    await stage.gateway.close()
    events = [(event["event"], event["count"]) for event in recorded(stage, "event")]
    assert events[-2:] == [("unrecorded", 3), ("stopped", None)]


@pytest.mark.parametrize("odd", ["a\u2028b", "a\x9bb", "a\x7fb", "a\nb"])
def test_names_of_budgets_are_names(odd: str) -> None:
    """They go into the audit log before anyone is asked whether the caller may do that."""
    for names in ({"scope": "user", "tenant": "acme", "sub": odd, "plan": "free"}, {"scope": "plan", "plan": odd}):
        with pytest.raises(ValidationError, match="characters that no name has"):
            Reset.model_validate({**names, "limit": "tokens_per_day"})
