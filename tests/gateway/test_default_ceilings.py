"""A ceiling that the caller left open: the client asks for the model's, and the gateway grants what there is."""

from __future__ import annotations

import asyncio
import json
import shutil
from collections.abc import AsyncIterator
from dataclasses import replace

import httpx2
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lacre import problems
from lacre.trust.manifest import MAX_OUTPUT, ModelEntry
from lacre_backend.api.app import create_app
from lacre_gateway.budget import fitting
from lacre_gateway.budget.callers import BudgetScope, Caller, ceiling_of
from lacre_gateway.budget.fitting import LEAST, LEAST_OUTPUT
from lacre_gateway.budget.holds import AboveLimit
from lacre_gateway.budget.in_flight import Reservation
from lacre_gateway.budget.plans import LimitKind, Price
from parts.echo_engine import EchoEngine
from parts.fake_worker import FakeWorker, Script
from parts.keys import MODEL
from parts.stage import Stage, until

from .conftest import PutUp
from .test_refusals import assert_problem

PLANS = """
default_plan = "ample"
[plans]
ample.user.tokens_per_day = 1000000
tight.user.tokens_per_day = 5000
narrow.user.tokens_per_minute = 300
money.user.money_per_month = "0.003"
[prices."*"]
prompt = "0.50"
cached = "0.10"
completion = "1.00"
"""
DEFAULT = {"lacre_max_tokens": str(MAX_OUTPUT), "lacre_max_tokens_default": "?1", "lacre_shape": "pad"}
FEW = {"prompt_tokens": 31, "cached_tokens": 0, "completion_tokens": 16}


@pytest.fixture
async def stage(put_up: PutUp) -> Stage:
    return await put_up(plans=PLANS)


@pytest.fixture
async def worker(stage: Stage) -> AsyncIterator[FakeWorker]:
    async with stage.fake_worker() as worker:
        worker.script = Script(usage=FEW)
        yield worker


async def ask(stage: Stage, client: httpx2.AsyncClient, plan: str, **headers: str) -> httpx2.Response:
    return await stage.post(client, stage.issuer.token(plan=plan), **{**DEFAULT, **headers})


async def test_where_there_is_enough_the_model_s_own_is_granted(
    stage: Stage, worker: FakeWorker, client: httpx2.AsyncClient
) -> None:
    assert (await ask(stage, client, "ample")).status_code == 200
    assert worker.grants[0].max_tokens == MAX_OUTPUT
    intent, _ = await stage.trail()
    assert (intent["max_tokens"], intent["reserved_tokens"], intent["allowed_tokens"]) == (MAX_OUTPUT, MAX_OUTPUT, None)


@pytest.mark.parametrize("plan", ["tight", "money"])
async def test_where_the_budget_has_less_the_grant_does(
    stage: Stage, worker: FakeWorker, client: httpx2.AsyncClient, plan: str
) -> None:
    """Down to the floor, and then it is refused as before. Each request settles at what it used."""
    worker.script = Script(usage=FEW | {"completion_tokens": LEAST_OUTPUT})
    statuses = []
    while 429 not in statuses:
        statuses.append((await ask(stage, client, plan)).status_code)
        await stage.trail(len(statuses))
    granted = [grant.max_tokens for grant in worker.grants]
    assert len(granted) == len(statuses) - 1 > 2
    assert granted == sorted(granted, reverse=True)
    assert granted[0] > granted[-2]
    assert granted[-1] >= LEAST_OUTPUT
    intents = stage.entries("intent")[:-1]
    assert [intent["reserved_tokens"] for intent in intents] == granted
    assert {intent["max_tokens"] for intent in intents} == {MAX_OUTPUT}, "what the client sent, for its proof"


async def test_a_named_ceiling_is_never_lowered(stage: Stage, worker: FakeWorker, client: httpx2.AsyncClient) -> None:
    for said in (None, "?0"):
        refused = await ask(stage, client, "narrow", lacre_max_tokens_default=said)  # type: ignore[arg-type]
        assert_problem(refused, problems.ABOVE_LIMIT, limit="tokens_per_minute", ceiling=300, fits=300 - LEAST)
    assert not worker.grants
    assert (await ask(stage, client, "narrow")).status_code == 200
    assert (worker.grants[0].max_tokens, worker.grants[0].max_prompt_tokens) == (LEAST_OUTPUT, 300 - LEAST_OUTPUT)


@pytest.mark.parametrize("said", ["?2", "", "1", "true", "?1, ?1", "%3F1"])
async def test_the_flag_has_one_form(stage: Stage, worker: FakeWorker, client: httpx2.AsyncClient, said: str) -> None:
    assert_problem(
        await ask(stage, client, "ample", lacre_max_tokens_default=said),
        problems.INVALID_HEADERS,
        header="lacre-max-tokens-default",
    )
    assert not worker.grants


async def test_only_answers_that_can_end_anywhere_are_lowered(
    stage: Stage, worker: FakeWorker, client: httpx2.AsyncClient
) -> None:
    token = stage.issuer.token(plan="narrow", scope="lacre:explain lacre:http")
    for action in ("explain", "embed", "http"):
        refused = await stage.post(client, token, **{**DEFAULT, "lacre_action": action})
        assert_problem(refused, problems.ABOVE_LIMIT)
    assert not worker.grants


async def test_two_at_once_share_what_there_is(stage: Stage, worker: FakeWorker, client: httpx2.AsyncClient) -> None:
    hold = asyncio.Event()
    worker.script = Script(before=hold.wait, usage=FEW)
    first = asyncio.create_task(ask(stage, client, "tight"))
    await until(lambda: worker.opened)
    refused = await ask(stage, client, "tight")
    assert_problem(refused, problems.BUDGET_SPENT, limit="tokens_per_day")
    hold.set()
    assert (await first).status_code == 200
    assert worker.grants[0].max_tokens + worker.grants[0].max_prompt_tokens <= 5000


async def test_a_worker_that_ignores_a_lowered_ceiling_is_not_paid(
    stage: Stage, worker: FakeWorker, client: httpx2.AsyncClient
) -> None:
    worker.script = Script(usage=FEW | {"completion_tokens": LEAST_OUTPUT + 1})
    assert (await ask(stage, client, "narrow")).status_code == 200
    _, outcome = await stage.trail()
    assert (outcome["unreceipted"], outcome["refused_receipt"]) == (True, "above-the-grant")


LIMIT = '@id("at-most") forbid (principal, action in Action::"sealed", resource) when {{ context.max_tokens > {most} }};'


@pytest.mark.parametrize(("most", "granted"), [(1000, 1000), (LEAST_OUTPUT, LEAST_OUTPUT), (LEAST_OUTPUT - 1, None)])
async def test_where_policy_allows_fewer_these_are_granted(
    stage: Stage, worker: FakeWorker, client: httpx2.AsyncClient, most: int, granted: int | None
) -> None:
    shutil.rmtree(stage.folder / "policies/cases")  # they are of the rules that ship
    (stage.folder / "policies/no-cases").touch()
    (stage.folder / "policies/at-most.cedar").write_text(LIMIT.format(most=most))
    await stage.gateway.reload()
    response = await ask(stage, client, "ample")
    named = await ask(stage, client, "ample", lacre_max_tokens_default="?0")
    assert_problem(named, problems.TOO_MANY_TOKENS, ceiling=most, asked=MAX_OUTPUT)
    intent = (await stage.trail(2))[0]
    if granted is None:
        assert_problem(response, problems.TOO_MANY_TOKENS, ceiling=most, asked=MAX_OUTPUT)
        assert (intent["decision"], intent["allowed_tokens"]) == ("deny", None)
        return
    assert response.status_code == 200
    assert worker.grants[0].max_tokens == granted
    assert (intent["decision"], intent["max_tokens"], intent["allowed_tokens"]) == ("allow", MAX_OUTPUT, granted)


# Through the whole path, with a worker and a client of ours


async def test_the_answer_ends_with_length_and_no_more_is_paid(put_up: PutUp) -> None:
    stage = await put_up(plans=PLANS)
    await stage.worker(create_app([EchoEngine(name=MODEL)]))
    client = stage.client(token=stage.issuer.token(plan="narrow"))
    reply = await client.chat("x" * 20)
    assert (reply.finish_reason, reply.text) == ("stop", "x" * 20)


async def test_an_answer_of_more_than_512_tokens_without_a_limit(put_up: PutUp) -> None:
    stage = await put_up(plans=PLANS)
    stage.gateway.settings.models.clear()
    await stage.worker(create_app([EchoEngine(name=MODEL, repeat=2)]))
    client = stage.client(token=stage.issuer.token(plan="ample"))
    reply = await client.chat("x" * 700)
    assert (reply.finish_reason, reply.usage.completion) == ("stop", 1400)
    assert (await client.chat("x" * 700, max_tokens=600)).usage.completion == 600


async def test_the_manifest_s_max_output_is_what_is_asked_for(put_up: PutUp) -> None:
    stage = await put_up(plans=PLANS)
    stage.named[MODEL] = ModelEntry(context=4096, max_output=40)
    await stage.publish(stage.document(2))
    await stage.worker(create_app([EchoEngine(name=MODEL)]))
    client = stage.client(token=stage.issuer.token(plan="ample"))
    reply = await client.chat("x" * 100)
    assert (reply.finish_reason, reply.usage.completion, reply.text) == ("length", 40, "x" * 40)


async def test_a_client_that_lies_harms_only_itself(stage: Stage, client: httpx2.AsyncClient) -> None:
    """It calls a ceiling of its own a default: lowered, the grant contradicts the body, and the worker refuses."""
    worker = await stage.worker(create_app([EchoEngine(name=MODEL)]))
    content = json.dumps({"model": MODEL, "messages": [{"role": "user", "content": "hi"}], "max_tokens": MAX_OUTPUT}).encode()
    body = stage.seal({"lacre-max-tokens": None}, content=content)[0]
    response = await stage.post(client, stage.issuer.token(plan="narrow"), body=body, **DEFAULT)
    assert (response.status_code, worker.calls) == (200, 1)
    _, outcome = await stage.trail()
    assert outcome["completion_tokens"] == 0


amounts = st.integers(0, 9000)


@given(
    amounts,
    st.sampled_from([LimitKind.TOKENS_PER_MINUTE, LimitKind.TOKENS_PER_DAY, LimitKind.MONEY_PER_MONTH]),
    st.integers(1, 6000),
    st.integers(1, 6000),
    st.integers(1, 2000),
    st.tuples(*[st.sampled_from([0, 1, 333_333, 10**6, 3 * 10**6])] * 3),
)
def test_what_is_lowered_fits_and_stays_above_the_floor(
    ceiling: int, kind: LimitKind, prompt: int, output: int, enough: int, prices: tuple[int, int, int]
) -> None:
    price = Price(*prices)
    caller = Caller("p", (BudgetScope("user", "user.x", "x", ((kind, ceiling),)),))
    asked = Reservation(prompt, output, shrinks=True, enough=enough, least_tokens=LEAST_OUTPUT)
    found = fitting.lowered(asked, price, fitting.at_ceilings(caller))
    assert min(output, LEAST_OUTPUT) <= found.max_tokens <= output
    assert found.max_prompt_tokens == prompt
    try:
        most = fitting.most(caller, price, found)
    except AboveLimit:
        with pytest.raises(AboveLimit):  # nothing is refused that could be lowered further
            fitting.most(caller, price, replace(found, max_tokens=found.floor))
        return
    assert ceiling_of(price, most, found.max_tokens).of(kind) <= ceiling
    named = Reservation(prompt, output, shrinks=True, enough=enough)
    assert fitting.lowered(named, price, fitting.at_ceilings(caller)) == named
