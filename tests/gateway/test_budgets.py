"""Budgets on the path of a request: what is charged, what is given back, what is said of it, and when it is refused."""

from __future__ import annotations

import asyncio
import json
import re
from pathlib import Path

import httpx2
import pytest

import lacre
from lacre import problems
from lacre.evidence.audit_proof import AuditProof
from lacre.jose.jws import raw_public_key
from lacre.problems import details
from lacre_gateway.audit import feed
from lacre_gateway.audit import index as indexes
from lacre_gateway.audit.check import verify
from lacre_gateway.budget.ledger import ALIVE, GONE_AFTER
from lacre_gateway.budget.plans import LimitKind
from lacre_gateway.budget.record import Record
from parts.fake_worker import FakeWorker, Script
from parts.keys import MODEL
from parts.stage import Stage, until

from .conftest import PutUp
from .test_audit import no_space
from .test_budget_bucket import Unavailable
from .test_refusals import assert_problem
from .test_streaming import served

PRICES = '[prices."*"]\nprompt = "1"\ncached = "0.25"\ncompletion = "2"\n'
PLANS = """
default_plan = "free"
[plans]
free.user.requests_per_minute = 3
tokens.user.tokens_per_minute = 5000
daily.tenant.tokens_per_day = 6000
money.tenant.money_per_month = "0.005"
streams.everyone.concurrent_streams = 2
none.user.requests_per_minute = 0
once.everyone.tokens_per_day = 1600
small.user.tokens_per_day = 100
"""


@pytest.fixture
async def stage(put_up: PutUp) -> Stage:
    return await put_up(plans=PLANS + PRICES)


def on(stage: Stage, plan: str, **claims: str) -> str:
    return f"Bearer {stage.issuer.token(plan=plan, **claims)}"


def record(stage: Stage, prefix: str) -> Record:
    [entry] = [entry for key, entry in stage.budgets.entries.items() if key.startswith(f"{prefix}.")]
    return Record.parse(entry.value)


async def test_requests_a_minute_and_what_the_answers_say(stage: Stage, worker: FakeWorker, client: httpx2.AsyncClient) -> None:
    first = await stage.post(client)
    assert first.headers["ratelimit-policy"] == '"user/requests_per_minute";q=3;w=60;qu="requests"'
    level, _, reset = first.headers["ratelimit"].partition(";t=")
    assert level == '"user/requests_per_minute";r=2'
    assert 0 < int(reset) <= 60
    assert (first.headers["x-ratelimit-limit-requests"], first.headers["x-ratelimit-remaining-requests"]) == ("3", "2")
    assert 0 < int(first.headers["x-ratelimit-reset-requests"].removesuffix("s")) <= 60
    assert "x-ratelimit-limit-tokens" not in first.headers
    assert [(await stage.post(client)).status_code for _ in range(2)] == [200] * 2
    refused = await stage.post(client)
    met = {"limit": "requests_per_minute", "scope": "user", "unit": "requests", "ceiling": 3, "asked": 1, "remaining": 0}
    assert_problem(refused, problems.RATE_LIMITED, **met)
    assert refused.headers["ratelimit"].startswith('"user/requests_per_minute";r=0;t=')
    assert (await stage.post(client, authorization=on(stage, "free", sub="bob"))).status_code == 200
    assert len(worker.opened) == 4
    assert "ratelimit" not in (await stage.post(client, authorization=on(stage, "streams"))).headers
    [(key, entry)] = [(key, each) for key, each in stage.budgets.entries.items() if b"alice" in each.value]
    assert key.startswith("user.") and "alice" not in key  # names are for people, and keys are not
    assert json.loads(entry.value)["name"] == "alice of acme on free"


async def test_what_is_not_used_is_given_back(stage: Stage, worker: FakeWorker, client: httpx2.AsyncClient) -> None:
    """Each reserves some 3,700 of 5,000 tokens, and uses 19 of them: a second fits only once the first is settled."""
    token = on(stage, "tokens")
    for number in range(1, 5):
        response = await stage.post(client, authorization=token, lacre_max_tokens="3000")
        assert response.status_code == 200
        await stage.trail(number)
    hold = asyncio.Event()
    worker.script = Script(before=hold.wait)
    first = asyncio.create_task(stage.post(client, authorization=token, lacre_max_tokens="3000"))
    await until(lambda: len(worker.opened) == 5)
    refused = await stage.post(client, authorization=token, lacre_max_tokens="3000")
    assert_problem(refused, problems.RATE_LIMITED, limit="tokens_per_minute", unit="tokens", ceiling=5000)
    assert refused.headers["retry-after"] == "2"  # what is reserved may come back long before the minute is over
    hold.set()
    assert (await first).status_code == 200


async def test_one_request_after_another_is_not_refused_for_the_last_ones_settlement(
    stage: Stage, worker: FakeWorker, client: httpx2.AsyncClient
) -> None:
    """As above, but the client does not wait: each request comes some 30 ms before the last one is settled."""
    token = on(stage, "tokens")
    for _ in range(8):
        assert (await stage.post(client, authorization=token, lacre_max_tokens="3000")).status_code == 200


async def test_a_caller_sees_its_own_usage(stage: Stage, worker: FakeWorker, client: httpx2.AsyncClient) -> None:
    async def usage(plan: str, **claims: str) -> httpx2.Response:
        return await client.get("/v1/me/usage", headers={"authorization": on(stage, plan, **claims)})

    for number, plan in enumerate(("money", "free", "once"), 1):
        assert (await stage.post(client, authorization=on(stage, plan))).status_code == 200
        await stage.trail(number)
    [requests] = (told := (await usage("free")).json())["limits"]
    ends = requests.pop("resets_at")
    assert (told["plan"], told["currency"]) == ("free", "USD")
    assert requests == {
        "limit": "requests_per_minute", "scope": "user", "unit": "requests", "ceiling": 3, "used": requests["used"],
        "remaining": 3 - requests["used"],
    }  # fmt: skip
    assert ends % 60 == 0 and 0 < ends - stage.gateway.clock() <= 60
    [money] = (await usage("money")).json()["limits"]
    assert (money["limit"], money["scope"], money["unit"], money["ceiling"]) == (
        "money_per_month",
        "tenant-on-plan",
        "micro-units",
        5000,
    )
    assert (await usage("once")).json()["limits"] == []  # how far a whole plan is used is for the operator
    refused = await usage("nobody-s")
    assert_problem(refused, problems.UNKNOWN_PLAN)
    stage.gateway.budgets.bucket = None
    assert_problem(await usage("free"), problems.UNAVAILABLE)
    assert_problem(await client.get("/v1/me/usage"), problems.INVALID_TOKEN)


async def test_nothing_stays_unsettled(stage: Stage, worker: FakeWorker, client: httpx2.AsyncClient) -> None:
    for _ in range(3):
        await stage.post(client)
    await stage.trail(3)
    assert not stage.gateway.budgets._lender.unsettled._ended and not stage.gateway.budgets._lender.unsettled._waiting


async def test_money_to_the_micro_unit(stage: Stage, worker: FakeWorker, client: httpx2.AsyncClient) -> None:
    """12 prompt tokens, 2 of them cached, and 7 more: 10 × 1 + 2 × 0.25 + 7 × 2 = 24.5 micro-units, rounded up."""
    for number in range(1, 4):
        response = await stage.post(client, authorization=on(stage, "money", sub=f"user-{number}"))
        assert response.status_code == 200
        await stage.trail(number)  # before it is, the tenant's money is held back for what the request may use at most
    trail = await stage.trail(3)
    assert [entry["money"] for entry in trail if entry["kind"] == "outcome"] == [25] * 3
    intent = trail[0]
    assert intent["reserved_money"] == intent["reserved_prompt_tokens"] + 2 * 256
    assert intent["lease"] == stage.gateway.budgets.holder
    assert [limit.partition("@")[0] for limit in intent["limits"]] == ["tenant-on-plan:money/money_per_month"]
    await stage.gateway.close()
    [window] = record(stage, "tenant-on-plan").windows[LimitKind.MONEY_PER_MONTH].values()
    assert window.drawn() == window.used() == 75


async def test_streams_at_once(stage: Stage, worker: FakeWorker, client: httpx2.AsyncClient) -> None:
    hold = asyncio.Event()
    worker.script = Script(before=hold.wait)
    tokens = [on(stage, "streams", sub=f"user-{number}") for number in range(3)]
    running = [asyncio.create_task(stage.post(client, authorization=token)) for token in tokens[:2]]
    await until(lambda: len(worker.opened) == 2)
    third = await stage.post(client, authorization=tokens[2])
    assert_problem(third, problems.RATE_LIMITED, limit="concurrent_streams", unit="concurrent-requests", scope="plan")
    assert "ceiling" not in details.read(third.content)  # how far a whole plan is used is for the operator
    hold.set()
    assert [(await task).status_code for task in running] == [200, 200]
    assert (await stage.post(client, authorization=tokens[2])).status_code == 200


async def test_a_refused_request_costs_nothing(stage: Stage, client: httpx2.AsyncClient) -> None:
    """Neither one that policy refuses, nor one for which there is no worker."""
    stage.hub.max_queue = 0
    stage.hub.worker("default", ["smollm2-135m"])
    for _ in range(10):
        assert_problem(await stage.post(client, lacre_action="http"), problems.PATH_NOT_ALLOWED)
        assert_problem(await stage.post(client), problems.BUSY)
    stage.hub.max_queue, stage.hub.live = 10, []
    async with stage.fake_worker():
        assert (await stage.post(client)).status_code == 200


async def test_an_answer_that_breaks_costs_what_was_made(stage: Stage, worker: FakeWorker, client: httpx2.AsyncClient) -> None:
    worker.script = Script(beats=({"completion_tokens": 3}, {"completion_tokens": 5}), ending="error:x")
    await stage.post(client, authorization=on(stage, "money"))
    outcome = (await stage.trail())[1]
    assert (outcome["outcome"], outcome["money"]) == ("broken", 21)  # 10 × 1 + 2 × 0.25 + 5 × 2, rounded up


AUDIT = Path(__file__).resolve().parents[2] / "docs/audit.md"
REFUSED = {
    "free": (problems.RATE_LIMITED, "user:free/requests_per_minute@", {"ceiling": 3}),
    "once": (problems.BUDGET_SPENT, "plan:once/tokens_per_day@", {}),
    "small": (problems.ABOVE_LIMIT, "user:small/tokens_per_day", {"ceiling": 100}),
    "none": (problems.ABOVE_LIMIT, "user:none/requests_per_minute", {"ceiling": 0}),
    "gold": (problems.UNKNOWN_PLAN, None, {}),
    "daily": (problems.BUDGET_UNAVAILABLE, None, {}),
}


@pytest.mark.parametrize("plan", REFUSED)
async def test_a_refusal_is_recorded(plan: str, stage: Stage, worker: FakeWorker, client: httpx2.AsyncClient) -> None:
    """As a denial is: an intent with its proof, and an outcome that says why. For which limit is not for the client to know."""
    problem, exceeded, told = REFUSED[plan]
    worker.script = Script(usage={"completion_tokens": 200})
    served = {"free": 3, "once": 1}.get(plan, 0)
    for number in range(1, served + 1):
        assert (await stage.post(client, authorization=on(stage, plan))).status_code == 200
        await stage.trail(number)
    if problem is problems.BUDGET_UNAVAILABLE:
        stage.gateway.budgets.bucket = Unavailable()
    refused = await stage.post(client, authorization=on(stage, plan))
    assert_problem(refused, problem, **told)
    assert len(worker.opened) == served
    proof = AuditProof.parse_header(refused.headers["lacre-audit"])
    proof.verify(raw_public_key(stage.keys.gateway))
    intent, outcome = (await stage.trail(served + 1))[2 * served :]
    assert json.loads(proof.entry) == intent and "exceeded" not in intent
    assert (intent["request_id"], intent["subject"]) == (refused.headers["lacre-request-id"], "alice")
    assert (intent["decision"], intent["policies"]) == ("allow", ["models-for-everyone"])
    assert (intent["reserved_tokens"], intent["lease"], intent["limits"]) == (None, None, [])
    assert (outcome["outcome"], outcome["status"], outcome["money"]) == ("refused", problem.status, None)
    assert outcome["problem"] == problem.slug
    assert (outcome["exceeded"] and outcome["exceeded"].rstrip("0123456789")) == exceeded
    await stage.gateway.close()
    assert verify(stage.folder / "audit").wrong is None


async def test_the_client_keeps_the_proof_of_a_refusal(stage: Stage) -> None:
    """The SDK checks that it is of what was sent, and the error has it."""
    with pytest.raises(lacre.Forbidden) as refused:
        await stage.client(token=stage.issuer.token(plan="none")).chat("Hello.", model=MODEL)
    assert refused.value.problem == problems.ABOVE_LIMIT.type
    assert refused.value.verification is not None and refused.value.verification.audit is not None
    [intent, _] = await stage.trail()
    assert refused.value.verification.audit.members == intent


async def test_who_met_a_limit(stage: Stage, worker: FakeWorker, client: httpx2.AsyncClient) -> None:
    """As docs/audit.md asks for it."""
    for subject, requests in (("alice", 5), ("bob", 4), ("carol", 3)):
        for _ in range(requests):
            await stage.post(client, authorization=on(stage, "free", sub=subject))
    await stage.gateway.close()
    document = AUDIT.read_text()
    [sql] = re.findall(r'--sql "(SELECT [^"]*exceeded[^"]*)"', document)
    entries = (entry for entry in feed.read(stage.folder / "audit", None) if entry is not None)
    names, rows = indexes.ask(indexes.build(entries), sql)
    assert names == ["subject", "exceeded", "requests"]
    assert [(who, limit.partition("@")[0], times) for who, limit, times in rows] == [
        ("alice", "user:free/requests_per_minute", 2), ("bob", "user:free/requests_per_minute", 1),
    ]  # fmt: skip


SCOPES = ("user", "tenant", "everyone")


def left(response: httpx2.Response) -> dict[str, int]:
    """What remains of each limit that the caller is told of."""
    return {limit: int(remaining) for limit, remaining in re.findall(r'"([^"]+)";r=(\d+)', response.headers["ratelimit"])}


@pytest.mark.parametrize("ample", [10_000, 1_000_000])  # of which a lease has no spare for another request, and has one
@pytest.mark.parametrize("short", SCOPES)
async def test_all_budgets_or_none(put_up: PutUp, short: str, ample: int) -> None:
    """One of three is used up: nothing is charged to the other two."""
    labels = {"user": "user", "tenant": "tenant-on-plan", "everyone": "plan"}
    ceilings, used = {scope: 1600 if scope == short else ample for scope in SCOPES}, 212
    tables = "".join(f"[plans.p.{scope}]\ntokens_per_day = {ceiling}\n" for scope, ceiling in ceilings.items())
    stage = await put_up(plans=f'default_plan = "p"\n{tables}')
    async with stage.fake_worker() as worker, stage.http() as client:
        worker.script = Script(usage={"completion_tokens": 200})
        assert (await stage.post(client)).status_code == 200
        await stage.trail(1)
        after = {f"{labels[scope]}/tokens_per_day": ceilings[scope] - used for scope in ("user", "tenant")}
        others = [key for key in stage.budgets.entries if not key.startswith(f"{labels[short]}.")]
        before = [stage.budgets.entries[key].value for key in others]
        assert len(others) == 2
        for _ in range(3):
            refused = await stage.post(client)
            assert_problem(refused, problems.BUDGET_SPENT)
            assert left(refused) == after
            assert refused.headers["retry-after"] == refused.headers["ratelimit"].rpartition(";t=")[2]
        if ample == 1_000_000:
            assert [stage.budgets.entries[key].value for key in others] == before
        assert len(worker.opened) == 1
    await stage.gateway.close()
    met = [entry["exceeded"] for entry in await stage.trail(4) if entry["kind"] == "outcome"]
    assert [limit and limit.partition("@")[0] for limit in met] == [None, *[f"{labels[short]}:p/tokens_per_day"] * 3]
    for prefix in labels.values():
        [window] = record(stage, prefix).windows[LimitKind.TOKENS_PER_DAY].values()
        assert window.drawn() == window.used() == used


async def test_what_no_log_has_is_not_charged(stage: Stage, worker: FakeWorker) -> None:
    """The disk is full, and the client leaves before it learns of it."""
    asked, forever = asyncio.Event(), asyncio.Event()

    async def before() -> None:
        asked.set()
        await forever.wait()

    worker.script = Script(before=before, parting={"completion_tokens": 7})
    async with served(stage) as url, httpx2.AsyncClient(base_url=url) as http:
        with no_space(stage.folder / "audit"):
            headers = stage.headers(authorization=on(stage, "free"))
            asking = asyncio.create_task(http.post("/v1/sealed", content=stage.seal()[0], headers=headers))
            await asked.wait()
            await until(lambda: not stage.gateway.audit.writable, 15)
            asking.cancel()
            await asyncio.gather(asking, return_exceptions=True)
            await until(lambda: not stage.gateway.limits.running, 15)
    await stage.gateway.close()
    assert not [entry for entry in stage.entries() if entry["kind"] != "event"]
    [window] = record(stage, "user").windows[LimitKind.REQUESTS_PER_MINUTE].values()
    assert (window.drawn(), window.used()) == (0, 0)


async def test_plans_change_while_requests_are_served(stage: Stage, worker: FakeWorker, client: httpx2.AsyncClient) -> None:
    assert [(await stage.post(client)).status_code for _ in range(4)] == [200, 200, 200, 429]
    plans = PLANS.replace("requests_per_minute = 3", "requests_per_minute = 5") + PRICES
    (stage.folder / "policies" / "plans.toml").write_text(plans)
    await stage.gateway.reload()
    assert [(await stage.post(client)).status_code for _ in range(3)] == [200, 200, 429]


async def test_a_bucket_that_takes_no_writes_is_said(stage: Stage) -> None:
    """Reads, and the leases in hand, go on: nobody would hear of it for a while."""
    ledger, budgets = stage.gateway.budgets, stage.budgets
    ledger.start()
    while not await budgets.read(f"{ALIVE}.{stage.gateway.settings.gateway}"):
        await asyncio.sleep(0.01)
    assert "budgets" not in stage.gateway.missing()
    ledger._kept_at -= GONE_AFTER  # so long ago
    assert "lacre fabric check" in stage.gateway.missing()["budgets"]
    ledger.start()  # with the next sign of life it is good again
    await until(lambda: "budgets" not in stage.gateway.missing())


def admin_headers(stage: Stage, scope: str = "lacre:admin") -> dict[str, str]:
    return {"authorization": f"Bearer {stage.issuer.token(scope=scope, sub='root')}"}


OF_ALICE = {"scope": "user", "tenant": "acme", "sub": "alice"}


async def test_a_top_up_serves_more_until_the_window_ends(stage: Stage, worker: FakeWorker, client: httpx2.AsyncClient) -> None:
    """Repeated under its id, it adds nothing. Caller and operator see it, and the audit log has who did it."""
    for _ in range(3):
        assert (await stage.post(client)).status_code == 200
    assert (await stage.post(client)).status_code == 429
    asked = {**OF_ALICE, "plan": "free", "limit": "requests_per_minute", "amount": 2, "id": "ticket-7"}
    async with stage.http(app=stage.admin) as admin:
        denied = await admin.post("/v1/budgets/top-up", json=asked, headers=admin_headers(stage, ""))
        assert denied.status_code == 403
        for _ in range(2):
            done = await admin.post("/v1/budgets/top-up", json=asked, headers=admin_headers(stage))
            assert (done.status_code, done.json()["added"], done.json()["id"]) == (200, 2, "ticket-7")
        assert [(await stage.post(client)).status_code for _ in range(3)] == [200, 200, 429]
        own = (await client.get("/v1/me/usage", headers={"authorization": on(stage, "free")})).json()["limits"]
        assert [(each["ceiling"], each["remaining"]) for each in own] == [(5, 0)]
        told = await admin.get("/v1/usage", params={"tenant": "acme"}, headers=admin_headers(stage))
        assert [(each["ceiling"], each["raised"]) for each in told.json()["budgets"]] == [(5, 2)]
    events = [entry for entry in stage.entries() if entry["kind"] == "event" and entry["event"] == "budget-topped-up"]
    target = f"alice of acme on free/requests_per_minute@{done.json()['window']}"
    assert [(each["actor"], each["target"], each["count"]) for each in events] == [("acme/root", target, 2)] * 2


async def test_a_reset_gives_back_what_was_used(stage: Stage, worker: FakeWorker, client: httpx2.AsyncClient) -> None:
    worker.script = Script(usage={"completion_tokens": 90})
    assert (await stage.post(client, authorization=on(stage, "daily"))).status_code == 200
    await stage.trail(1)
    asked = {"scope": "tenant-on-plan", "tenant": "acme", "plan": "daily", "limit": "tokens_per_day"}
    async with stage.http(app=stage.admin) as admin:
        added = [
            (await admin.post("/v1/budgets/reset", json=asked, headers=admin_headers(stage))).json()["added"] for _ in range(2)
        ]
    assert added == [102, 0]
    [limit] = (await client.get("/v1/me/usage", headers={"authorization": on(stage, "daily")})).json()["limits"]
    assert (limit["ceiling"], limit["used"], limit["remaining"]) == (6102, 102, 6000)


async def test_a_request_above_the_plans_limit_fits_after_a_top_up(
    stage: Stage, worker: FakeWorker, client: httpx2.AsyncClient
) -> None:
    """A gateway that knows nothing of it reads the budget before it refuses such a request for good."""
    token = on(stage, "small")
    assert_problem(await stage.post(client, authorization=token), problems.ABOVE_LIMIT, ceiling=100)
    asked = {**OF_ALICE, "plan": "small", "limit": "tokens_per_day", "amount": 50_000}
    async with stage.http(app=stage.admin) as admin:
        assert (await admin.post("/v1/budgets/top-up", json=asked, headers=admin_headers(stage))).status_code == 200
    stage.gateway.budgets._draws.clear()  # as another gateway
    assert (await stage.post(client, authorization=token)).status_code == 200


@pytest.mark.parametrize(
    "change",
    [
        {"amount": 0}, {"amount": -1}, {"amount": "2"}, {"amount": 2.5}, {"amount": True}, {"amount": 2**60}, {"plan": None},
        {"plan": "gold"}, {"limit": "tokens_per_day"}, {"limit": "concurrent_streams"}, {"scope": "tenant"}, {"sub": None},
        {"id": "a b"}, {"id": ""}, {"colour": "red"}, {"issuer": "https://nobody.example"}, {"tenant": "a/b"},
        {"limit": "money_per_month", "amount": 5}, {"limit": "money_per_month", "amount": "0.0000001"},
    ],
)  # fmt: skip
async def test_a_change_that_says_nothing_changes_nothing(stage: Stage, change: dict[str, object]) -> None:
    asked = {**OF_ALICE, "plan": "free", "limit": "requests_per_minute", "amount": 2, **change}
    asked = {name: value for name, value in asked.items() if value is not None}
    async with stage.http(app=stage.admin) as admin:
        done = await admin.post("/v1/budgets/top-up", json=asked, headers=admin_headers(stage))
    assert done.status_code == 422
    assert stage.budgets.entries == {}


async def test_a_change_without_the_bucket(stage: Stage) -> None:
    """Whether it happened is unknown after a failure; the same id makes it safe to ask again."""
    bucket, stage.gateway.budgets.bucket = stage.gateway.budgets.bucket, Unavailable()
    asked = {"scope": "plan", "plan": "once", "limit": "tokens_per_day", "amount": 1000, "id": "x"}
    async with stage.http(app=stage.admin) as admin:
        assert (await admin.post("/v1/budgets/top-up", json=asked, headers=admin_headers(stage))).status_code == 503
        stage.gateway.budgets.bucket = bucket
        done = await admin.post("/v1/budgets/top-up", json=asked, headers=admin_headers(stage))
    assert done.json()["added"] == 1000


async def test_all_tenants_in_one_call(put_up: PutUp) -> None:
    """Those of the plans file, and those that have used something: also if a user's name looks like another tenant's."""
    tables = '[tenants.idle]\nplan = "big"\n[users]\n"mapped/x" = "big"\n[plans.big.tenant]\ntokens_per_day = 9000\n'
    stage = await put_up(plans=f'default_plan = "free"\n[plans.free.user]\ntokens_per_day = 5000\n{tables}')
    async with stage.fake_worker(), stage.http() as client, stage.http(app=stage.admin) as admin:
        for number, (subject, tenant, plan) in enumerate(
            [("alice", "acme", "free"), ("evil of acme on free", "other", "free"), ("bob", "acme", "big")], 1
        ):
            token = f"Bearer {stage.issuer.token(sub=subject, tenant=tenant, plan=plan)}"
            assert (await stage.post(client, authorization=token)).status_code == 200
            await stage.trail(number)
        await stage.gateway.budgets.close()
        assert (await admin.get("/v1/tenants", headers=admin_headers(stage, ""))).status_code == 403
        told = (await admin.get("/v1/tenants", headers=admin_headers(stage))).json()
        stage.gateway.budgets.bucket = None
        assert (await admin.get("/v1/tenants", headers=admin_headers(stage))).status_code == 503
    assert (told["currency"], told["complete"]) == ("USD", True)
    listed = {each["tenant"]: (each["plan"], each["users"], each["used"]) for each in told["tenants"]}
    assert listed == {
        "acme": ("free", 1, {"tokens_per_day": 19}), "idle": ("big", 0, {}), "mapped": ("free", 0, {}),
        "other": ("free", 1, {"tokens_per_day": 19}),
    }  # fmt: skip
    [shared] = told["tenants"][0]["budgets"]
    assert (shared["name"], shared["used"], shared["ceiling"]) == ("acme on big", 19, 9000)
