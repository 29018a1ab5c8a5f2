"""A short prompt under a stage limit: its padding does not keep it out, and never is less reserved than can be used."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

import httpx2
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lacre import problems
from lacre.problems import details
from lacre.wire.bhttp import Request, encode_request
from lacre.wire.ohttp import seal_request
from lacre.wire.outer import MAX_LENS_LAYERS, MAX_LENS_TOKENS, MAX_PARTS
from lacre.wire.padding import SMALLEST, request_length
from lacre_gateway.budget import fitting
from lacre_gateway.budget.callers import BudgetScope, Caller, ceiling_of
from lacre_gateway.budget.holds import AboveLimit
from lacre_gateway.budget.in_flight import Reservation
from lacre_gateway.budget.plans import LimitKind, Price
from parts.fake_worker import FakeWorker, Script
from parts.issuer import Issuer
from parts.stage import Stage, until

from .conftest import PutUp
from .test_refusals import assert_problem

PLANS = """
default_plan = "minute"
[plans]
minute.user.tokens_per_minute = 300
day.tenant.tokens_per_day = 300
money.user.money_per_month = "0.0003"
whole.everyone.tokens_per_day = 300
ample.user.tokens_per_minute = 3000
plenty.user.tokens_per_day = 1000000
filled.user.tokens_per_day = 5000
shut.user.tokens_per_minute = 0
[prices."*"]
prompt = "1.00"
cached = "0.10"
completion = "1.00"
"""
OUTPUT = 16
USED = {"prompt_tokens": 31, "cached_tokens": 0, "completion_tokens": 16}  # a greeting in SmolLM2's template, and an answer


@pytest.fixture
async def stage(put_up: PutUp) -> Stage:
    return await put_up(plans=PLANS)


@pytest.fixture
async def worker(stage: Stage) -> AsyncIterator[FakeWorker]:
    async with stage.fake_worker() as worker:
        worker.script = Script(usage=USED)
        yield worker


def padded(stage: Stage) -> bytes:
    """A "hi", sealed as the SDK seals it."""
    body = b'{"model":"smollm2-135m","messages":[{"role":"user","content":"hi"}],"max_tokens":16}'
    message = encode_request(Request("POST", "https", "lacre.invalid", "/v1/chat/completions", (), body))
    filled = message + bytes(request_length(len(message)) - len(message))
    return seal_request(stage.held[1].config, filled)[0]


async def hi(stage: Stage, client: httpx2.AsyncClient, plan: str = "minute", output: int = OUTPUT) -> httpx2.Response:
    token = stage.issuer.token(plan=plan)
    return await stage.post(client, token, body=padded(stage), lacre_shape="pad", lacre_max_tokens=str(output))


@pytest.mark.parametrize("plan", ["minute", "day", "money", "whole"])
async def test_a_greeting_fits_a_limit_of_300(stage: Stage, worker: FakeWorker, client: httpx2.AsyncClient, plan: str) -> None:
    """Again and again, for as long as there is room for it: five take 47 each of 300, and the sixth finds 65."""
    assert len(padded(stage)) > 5000
    for number in range(1, 6):
        response = await hi(stage, client, plan)
        assert response.status_code == 200, response.text
        await stage.trail(number)
    granted = [grant.max_prompt_tokens for grant in worker.grants]
    assert granted == [300 - 47 * number - OUTPUT for number in range(5)]
    intent, outcome = (await stage.trail(5))[:2]
    assert (intent["reserved_prompt_tokens"], intent["reserved_tokens"]) == (284, OUTPUT)
    assert (outcome["prompt_tokens"], outcome["unreceipted"]) == (31, False)
    refused = await hi(stage, client, plan)
    assert refused.status_code == 429, "less than a short prompt is left: to wait helps"
    assert int(refused.headers["retry-after"]) >= 1


async def test_a_worker_that_bills_more_than_was_reserved_is_not_believed(
    stage: Stage, worker: FakeWorker, client: httpx2.AsyncClient
) -> None:
    """And what fits the limit whole is reserved whole."""
    worker.script = Script(usage=USED | {"prompt_tokens": 285})
    assert (await hi(stage, client)).status_code == 200
    assert (await stage.trail())[1]["unreceipted"]
    assert (await hi(stage, client, "ample")).status_code == 200
    assert worker.grants[1].max_prompt_tokens == 2048, "the context"


async def test_a_limit_is_used_up_by_what_is_used(stage: Stage, client: httpx2.AsyncClient) -> None:
    """Of 5,000, not only until the padding does not fit any more: until ordinary text of the padded size does not."""
    async with stage.fake_worker() as worker:
        worker.script = Script(usage=USED | {"completion_tokens": 569})  # 600 each
        granted = []
        for number in range(1, 7):
            assert (await hi(stage, client, "filled", output=600)).status_code == 200
            await stage.trail(number)
            granted.append(worker.grants[-1].max_prompt_tokens)
        assert granted == [2048, 2048, 2048, 2048, 2000, 1400]
        refused = await hi(stage, client, "filled", output=600)
        assert_problem(refused, problems.BUDGET_SPENT, limit="tokens_per_day", ceiling=5000, remaining=1400)
        worker.script = Script(usage=USED)
        refused = await stage.post(client, stage.issuer.token(plan="filled"))  # not padded: all that it may be has to fit
        assert refused.status_code == 429


async def test_what_is_sealed_bounds_the_prompt_and_not_the_seal(put_up: PutUp, issuer: Issuer) -> None:
    """Of a model whose context the gateway does not know: the padded length, without the encapsulated key."""
    stage = await put_up(plans=PLANS)
    stage.gateway.settings.models.clear()
    async with stage.fake_worker() as worker, stage.http() as client:
        token = stage.issuer.token(plan="plenty")
        for body in (padded(stage), stage.seal()[0]):
            response = await stage.post(client, token, body=body)
            assert response.status_code == 200
            assert worker.grants[-1].max_prompt_tokens == (SMALLEST if len(body) > 5000 else len(body))


async def test_an_explanation_reserves_each_of_its_runs(put_up: PutUp, issuer: Issuer) -> None:
    """Whatever the number of its parts, which the gateway cannot see; each run has the answer behind the prompt."""
    stage = await put_up(plans=PLANS)
    async with stage.fake_worker() as worker, stage.http() as client:
        for context, each in ((2048, 2048), (None, SMALLEST + 16)):
            if context is None:
                stage.gateway.settings.models.clear()
            token = stage.issuer.token(plan="plenty", scope="lacre:explain")
            outer = {"lacre_action": "explain", "lacre_max_tokens": "16"}
            assert (await stage.post(client, token, body=padded(stage), **outer)).status_code == 200
            assert worker.grants[-1].max_prompt_tokens == (MAX_PARTS + 1) * each
        refused = await stage.post(client, stage.issuer.token(plan="plenty"), body=padded(stage), **outer)
        assert_problem(refused, problems.FORBIDDEN)


async def test_explanations_shrink_with_what_is_left_and_end_with_it(put_up: PutUp, issuer: Issuer) -> None:
    """Each reserves what is left, down to all of its runs in ordinary text. Below that it is refused before anything runs."""
    limit, used, least = 60_000, 3000, (MAX_PARTS + 1) * (SMALLEST // 4 + OUTPUT)
    stage = await put_up(plans=PLANS.replace("[prices", f"explained.user.tokens_per_day = {limit}\n[prices"))
    async with stage.fake_worker() as worker, stage.http() as client:
        worker.script = Script(usage={"prompt_tokens": used - OUTPUT, "cached_tokens": 0, "completion_tokens": OUTPUT})
        token = stage.issuer.token(plan="explained", scope="lacre:explain")
        outer = {"lacre_action": "explain", "lacre_max_tokens": str(OUTPUT)}
        statuses = []
        while 200 not in statuses or statuses[-1] == 200:
            statuses.append((await stage.post(client, token, body=padded(stage), **outer)).status_code)
            await stage.trail(len(statuses))
        served = statuses.index(429)
        assert [grant.max_prompt_tokens for grant in worker.grants] == [
            min((MAX_PARTS + 1) * 2048, limit - used * number - OUTPUT) for number in range(served)
        ]
        assert limit - used * served < least + OUTPUT <= limit - used * (served - 1)


async def test_a_lens_reserves_one_run_more_and_each_state(put_up: PutUp, issuer: Issuer) -> None:
    stage = await put_up(plans=PLANS)
    async with stage.fake_worker() as worker, stage.http() as client:
        token = stage.issuer.token(plan="plenty", scope="lacre:explain lacre:explain:lens")
        outer = {"lacre_action": "lens", "lacre_max_tokens": "16"}
        assert (await stage.post(client, token, body=padded(stage), **outer)).status_code == 200
        assert worker.grants[-1].max_prompt_tokens == (MAX_PARTS + 2) * 2048 + MAX_LENS_TOKENS * MAX_LENS_LAYERS
        for scope in ("lacre:explain", "lacre:explain:lens"):
            refused = await stage.post(client, stage.issuer.token(plan="plenty", scope=scope), body=padded(stage), **outer)
            assert_problem(refused, problems.FORBIDDEN)


async def test_two_at_once_never_reserve_more_than_there_is(
    stage: Stage, worker: FakeWorker, client: httpx2.AsyncClient
) -> None:
    hold = asyncio.Event()
    worker.script = Script(before=hold.wait, usage=USED)
    first = asyncio.create_task(hi(stage, client))
    await until(lambda: worker.opened)
    second = await hi(stage, client)
    assert_problem(second, problems.RATE_LIMITED, limit="tokens_per_minute", ceiling=300)
    assert second.headers["retry-after"] == "2"
    hold.set()
    assert (await first).status_code == 200


async def test_a_refusal_says_what_would_fit(stage: Stage, client: httpx2.AsyncClient) -> None:
    refused = await hi(stage, client, output=512)
    said = problems.ABOVE_LIMIT.exception(details=details.read(refused.content))
    assert "max_tokens of 236 or less would fit" in str(said)
    assert_problem(refused, problems.ABOVE_LIMIT, limit="tokens_per_minute", ceiling=300, asked=513, fits=236)
    assert (await hi(stage, client, "money", output=512)).json()["fits"] == 236
    assert "fits" not in (await hi(stage, client, "shut")).json()


async def test_an_application_s_bytes_are_not_cut(stage: Stage, worker: FakeWorker, client: httpx2.AsyncClient) -> None:
    """Of `http`, the size is known: less than it has would help nobody."""
    body, token = stage.seal(content=b"x" * 400_000)[0], stage.issuer.token(scope="lacre:http")
    refused = await stage.post(client, token, body=body, lacre_action="http", lacre_max_tokens="16")
    assert_problem(refused, problems.ABOVE_LIMIT)


# Nothing is under-reserved, whatever the numbers

amounts = st.integers(0, 5000)


@given(
    st.dictionaries(st.sampled_from(LimitKind), amounts, min_size=1),
    st.integers(1, 6000),
    st.integers(1, 600),
    st.tuples(*[st.sampled_from([0, 1, 333_333, 10**6, 3 * 10**6])] * 3),
)
def test_what_is_reserved_fits_each_limit(
    ceilings: dict[LimitKind, int], prompt: int, output: int, prices: tuple[int, int, int]
) -> None:
    price = Price(*prices)
    caller = Caller("p", (BudgetScope("user", "user.x", "x", tuple(ceilings.items())),))

    def above(prompt_tokens: int) -> set[LimitKind]:
        asked = ceiling_of(price, prompt_tokens, output)
        return {kind for kind, ceiling in ceilings.items() if asked.of(kind) > ceiling}

    try:
        most = fitting.most(caller, price, Reservation(prompt, output, shrinks=True))
    except AboveLimit as refused:
        assert refused.kind in above(1), "not even one token of a prompt fits"
        if refused.met.fits is not None:
            asked = ceiling_of(price, min(fitting.LEAST, prompt), refused.met.fits)
            assert asked.of(refused.kind) <= ceilings[refused.kind]
        return
    assert 1 <= most <= prompt
    assert not above(most)
    assert most == prompt or above(most + 1)


@given(st.dictionaries(st.sampled_from(LimitKind), amounts), st.integers(1, 6000), st.integers(1, 600))
def test_what_must_not_shrink_is_reserved_whole_or_refused(ceilings: dict[LimitKind, int], prompt: int, output: int) -> None:
    price = Price(10**6, 10**5, 10**6)
    caller = Caller("p", (BudgetScope("user", "user.x", "x", tuple(ceilings.items())),))
    asked = ceiling_of(price, prompt, output)
    try:
        assert fitting.most(caller, price, Reservation(prompt, output)) == prompt
    except AboveLimit as refused:
        assert asked.of(refused.kind) > ceilings[refused.kind]
    else:
        assert all(asked.of(kind) <= ceiling for kind, ceiling in ceilings.items())
