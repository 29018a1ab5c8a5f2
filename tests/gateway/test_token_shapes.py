"""Real signed tokens of every shape in `token_shapes`, through the authenticator that real settings make."""

from __future__ import annotations

import asyncio
import dataclasses
import io
import json
import time
from typing import Any

import httpx2
import jwt
import pytest

from lacre.problems import details
from lacre_fabric.logs import make_log
from lacre_gateway import settings
from lacre_gateway.auth.issuers import trusted
from lacre_gateway.auth.revocation import RevocationList
from lacre_gateway.auth.throttle import FailureThrottle
from lacre_gateway.auth.tokens import Authenticator, Principal
from lacre_gateway.doctor.findings import Findings
from lacre_gateway.doctor.trust import _issuer
from lacre_gateway.http.refusal import Refusal
from parts.fake_worker import FakeWorker
from parts.issuer import Issuer
from parts.memory_fabric import MemoryFabric
from parts.stage import Stage

from .token_shapes import DROP, ROWS, At, Caller, Refused, Row

ISSUER = "https://issuer.example"


def written(claims: dict[str, Any]) -> bytes:
    """The payload: as JSON of ASCII alone, in which every text can be."""
    now = int(time.time())
    standard = {"iss": ISSUER, "aud": "lacre", "sub": "u", "iat": now - 5, "exp": now + 600}
    said = {name: value for name, value in {**standard, **claims}.items() if value is not DROP}
    return json.dumps(
        {name: value.form(now + value.seconds) if isinstance(value, At) else value for name, value in said.items()}
    ).encode()


def configured(issuer: Issuer, changes: dict[str, Any]) -> settings.Issuer:
    usual = {"issuer": ISSUER, "audience": "lacre", "algorithms": ("EdDSA",), "jwks": issuer.jwks(), "tenant": "acme"}
    return settings.Issuer.model_validate({**usual, **changes})


def authenticator(issuer: Issuer, changes: dict[str, Any]) -> Authenticator:
    log = make_log(io.StringIO())
    revocations = RevocationList(log)
    asyncio.run(revocations.refresh(MemoryFabric().gateway()))
    return Authenticator(trusted([configured(issuer, changes)], log), revocations, FailureThrottle(9), time.time)


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.name)
def test_each_is_read_or_refused_as_its_row_says(row: Row, issuer: Issuer) -> None:
    token = jwt.api_jws.encode(written(row.claims), issuer.ed, "EdDSA", headers={"kid": "ed", **row.headers})
    asking = authenticator(issuer, row.settings).authenticate(f"Bearer {token}".encode(), "192.0.2.1")
    if isinstance(expected := row.expected, Caller):
        assert asyncio.run(asking).principal == Principal(issuer=ISSUER, **dataclasses.asdict(expected))
        return
    with pytest.raises(Refusal) as refused:
        asyncio.run(asking)
    told = details.read(refused.value.body)
    said = Refused(told.get("claim"), told.get("reason"), refused.value.problem)  # type: ignore[arg-type]
    assert (said, "expired_at" in told) == (expected, expected.reason == "expired")


def test_the_table_has_each_row_once() -> None:
    assert len({row.name for row in ROWS}) == len(ROWS) >= 100


@pytest.mark.parametrize(("changes", "said"), [
    ({}, "are for the tenant acme"),
    ({"tenant": None}, "name their tenant in tenant, and those that do not are refused"),
    ({"tenant": None, "default_tenant": "all", "claims": {"tenant": "org.id"}},
     "in org.id, and those that do not speak for all"),
])  # fmt: skip
async def test_the_doctor_says_whom_an_issuer_s_tokens_speak_for(changes: dict[str, Any], said: str, issuer: Issuer) -> None:
    findings = Findings()
    await _issuer(configured(issuer, changes), "issuers.0", findings)
    [finding] = findings.found
    assert finding.detail.endswith(said)


NAMES = [row for row in ROWS if row.name.startswith("name: ")]


async def test_every_name_that_is_read_is_served(stage: Stage, worker: FakeWorker, client: httpx2.AsyncClient) -> None:
    """Policy, budgets and the audit log take them as they are."""
    for number, row in enumerate(NAMES, 1):
        response = await stage.post(client, stage.issuer.token(**row.claims))
        assert (row.name, response.status_code) == (row.name, 200)
        assert response.headers["lacre-audit"].isascii()
        intent = [entry for entry in await stage.trail(number) if entry["kind"] == "intent"][-1]
        assert (intent["subject"], intent["groups"]) == (row.claims["sub"], row.claims["groups"])


async def test_a_name_that_no_text_could_hold_safely_is_in_no_log(stage: Stage, client: httpx2.AsyncClient) -> None:
    response = await stage.post(client, stage.issuer.token(sub="mallory\u2028root"))
    assert response.status_code == 401
    line = [entry for entry in stage.logged() if entry["event"] == "request"][-1]
    assert (line["problem"], line["reason"]) == ("unusable-claims", "sub: malformed")
    assert "mallory" not in stage.log.getvalue()
