"""`Lacre-Affinity` at the gateway: one form, kept nowhere, and for policy to forbid."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from dataclasses import replace

import httpx2
import pytest

from lacre import problems
from lacre.wire.header import Kem
from lacre_gateway.audit.entries import parse_known
from lacre_gateway.auth.tokens import Principal
from lacre_gateway.budget.plans import PLANS_FILE
from lacre_gateway.http.headers import Action, Fields, Shape
from lacre_gateway.policy.cedar import PolicySet
from lacre_gateway.policy.denial import denied
from lacre_gateway.policy.question import Question
from lacre_gateway.policy.replay import question_of
from lacre_gateway.policy.rules import SCHEMA_FILE
from lacre_gateway.settings import shipped
from parts.fake_worker import FakeWorker
from parts.stage import Stage

from .conftest import PutUp
from .test_refusals import assert_problem

VALUE = "q83vASNFZ4mrze8BI0VniQ"
WHO = Principal("ann", "acme", "https://id.example", (), (), None)
CHAT = Question(WHO, Action.CHAT, "p", "m", 10, 100, Kem.XWING, Shape.NONE, "192.0.2.1", 1.0, affinity=True)
FORBIDDEN = '@id("all") permit(principal, action, resource); @id("no") forbid(principal, action, resource) when { CONDITION };'


@pytest.fixture
async def stage(put_up: PutUp) -> Stage:
    return await put_up(plans=(shipped() / PLANS_FILE).read_text())


async def forbidden(stage: Stage) -> None:
    """To whoever is in another tenant: so the rules read it, and allow it here."""
    rule = 'forbid(principal, action, resource) when { context has affinity && principal in Tenant::"other" };'
    (stage.folder / "policies" / "affinity.cedar").write_text(f'@id("no-affinity") {rule}')
    await stage.gateway.reload()


@pytest.fixture
async def worker(stage: Stage) -> AsyncIterator[FakeWorker]:
    async with stage.fake_worker() as worker:
        yield worker


async def test_it_is_kept_nowhere(
    stage: Stage, worker: FakeWorker, client: httpx2.AsyncClient, capfd: pytest.CaptureFixture[str]
) -> None:
    for said in (VALUE, None):
        assert (await stage.post(client, lacre_affinity=said)).status_code == 200
    await stage.trail(2)
    intents = stage.entries("intent")
    assert not [intent for intent in intents if "affinity" in intent], "verifiers of the version before know no such member"
    out, err = capfd.readouterr()
    everything = json.dumps(intents) + out + err + repr(worker.grants) + str([vars(d) for d in map(type, worker.grants)])
    assert VALUE not in everything
    headers = Fields.collect([
        (b"lacre-pool", b"p"), (b"lacre-model", b"m"), (b"lacre-action", b"chat"), (b"lacre-max-tokens", b"1"),
        (b"lacre-shape", b"none"), (b"lacre-affinity", VALUE.encode()),
    ])  # fmt: skip
    assert headers.outer().affinity == bytes.fromhex("abcdef0123456789abcdef0123456789")
    assert "affinity" not in repr(headers.outer()) + repr(headers)


@pytest.mark.parametrize(
    "said", ["", VALUE[:-1], VALUE + "A", VALUE[:-1] + "R", VALUE[:-1] + "=", f"{VALUE}, {VALUE}", "é" * 11]
)
async def test_it_has_one_form(stage: Stage, worker: FakeWorker, client: httpx2.AsyncClient, said: str) -> None:
    refused = await stage.post(client, lacre_affinity=said.encode())  # type: ignore[arg-type]
    assert_problem(refused, problems.INVALID_HEADERS, header="lacre-affinity")
    assert not worker.grants


@pytest.mark.parametrize("condition", ["context has affinity", "context has affinity && context.affinity"])
def test_policy_can_forbid_it(condition: str) -> None:
    schema = (shipped() / SCHEMA_FILE).read_text()
    rules = PolicySet.parse(schema, {"rules.cedar": FORBIDDEN.replace("CONDITION", condition)})
    without = replace(CHAT, affinity=False)
    assert [rules.decide(asked).allowed for asked in (CHAT, without, CHAT)] == [False, True, False]
    refusal = denied(lambda asked: rules.decide(asked).allowed, CHAT, ["m"], ["no"])
    assert (refusal.problem, refusal.details) == (problems.FORBIDDEN, {"reason": "affinity"})
    assert "affinity=False" in problems.details.told(refusal.details)


async def test_a_decision_about_it_can_be_repeated(stage: Stage, worker: FakeWorker, client: httpx2.AsyncClient) -> None:
    await forbidden(stage)
    tokens = [stage.issuer.token(), stage.issuer.token(tenant="other")]
    statuses = [
        (await stage.post(client, token, lacre_affinity=said)).status_code for said in (VALUE, None) for token in tokens
    ]
    assert statuses == [200, 403, 200, 200]
    await stage.trail(4)
    intents = stage.entries("intent")
    assert [intent.get("affinity") for intent in intents] == [True, True, None, None]
    for intent in intents:
        parse_known(json.dumps(intent).encode())
        again = stage.gateway.rules.decide(question_of(intent))
        assert (again.allowed, list(again.policies)) == (intent["decision"] == "allow", list(intent["policies"]))
