"""200 requests at once over three gateway processes, on each kind of limit, while one of them and nats-server are killed.

Nothing here is replaced but the model: real gateways, nats-server with its files, a node that opens and seals. What is held
against the ceilings is what the gateways recorded, the killed one too, and what the worker saw.
"""

from __future__ import annotations

import asyncio
import json
import subprocess
import time
from collections import Counter, defaultdict
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import httpx2
import pytest

from lacre_gateway.audit.reader import LogReader
from lacre_gateway.budget.plans import LimitKind, parse
from parts.by_hand import opened
from parts.fleet import Fleet
from parts.up import LACRE

GATEWAYS = ("g1", "g2", "g3")
REQUESTS = 200  # at once; who is refused asks again
FREE = 6  # calls that are answered before the killing begins
HELD = 6  # and that are under way then
PAUSE = 0.3  # seconds, before it does
PATIENCE = 15.0  # seconds, after which it does no more
MAX_TOKENS = 20
CEILINGS = {
    LimitKind.REQUESTS_PER_MINUTE: 150,
    LimitKind.TOKENS_PER_MINUTE: 15_000,
    LimitKind.TOKENS_PER_DAY: 15_000,
    LimitKind.MONEY_PER_MONTH: 20_011,
    LimitKind.CONCURRENT_STREAMS: 16,
}
PRICES = '[prices."*"]\nprompt = "1.1"\ncached = "0.3"\ncompletion = "2.7"\n'
LIMITS = "longest_stream = 60.0"


def plans(kind: LimitKind) -> str:
    """One plan with one limit, for the whole tenant: all of its users race for it."""
    ceiling = f'"0.{CEILINGS[kind]:06d}"' if kind is LimitKind.MONEY_PER_MONTH else CEILINGS[kind]
    return f'default_plan = "p"\n[plans.p.tenant]\n{kind.value} = {ceiling}\n{PRICES}'


@pytest.fixture(params=list(LimitKind))
async def kind(request: pytest.FixtureRequest) -> LimitKind:
    return LimitKind(request.param)


@pytest.fixture
async def fleet(kind: LimitKind, tmp_path: Path) -> AsyncIterator[Fleet]:
    fleet = Fleet(tmp_path, GATEWAYS, plans(kind), LIMITS)
    try:
        await fleet.start(FREE, slots=64)
        yield fleet
    finally:
        fleet.stop()


class Burst:
    """Clients at once, in turns over the gateways; each asks until it is served. statuses: 200 only for whole answers, and 0
    for those that a dead gateway left.
    """

    def __init__(self, fleet: Fleet) -> None:
        self._fleet = fleet
        self.statuses: Counter[int] = Counter()
        self.problems: Counter[str] = Counter()

    async def run(self) -> None:
        tokens = [self._fleet.token(f"user-{number}", "acme") for number in range(8)]
        limits = httpx2.Limits(max_connections=REQUESTS)
        async with httpx2.AsyncClient(limits=limits, timeout=60) as client:
            await asyncio.gather(*(self._ask(client, tokens[number % 8], number) for number in range(REQUESTS)))

    async def _ask(self, client: httpx2.AsyncClient, token: str, number: int) -> None:
        until = time.monotonic() + PATIENCE
        while True:
            status = await self._once(client, token, self._fleet.gateways[GATEWAYS[number % 3]].base_url)
            self.statuses[status] += 1
            if status == 200 or time.monotonic() > until:
                return
            await asyncio.sleep(PAUSE)

    async def _once(self, client: httpx2.AsyncClient, token: str, base_url: str) -> int:
        body, opener = self._fleet.seal()
        headers = self._fleet.headers(token, MAX_TOKENS)
        try:
            response = await client.post(f"{base_url}/v1/sealed", content=body, headers=headers)
        except httpx2.HTTPError:
            return 0
        if response.status_code == 200:
            assert opened(opener, response.content)
        if response.status_code != 200:
            self.problems[response.json()["type"].rpartition(":")[2]] += 1
        return response.status_code


@pytest.mark.slow
@pytest.mark.timeout(600)
async def test_no_limit_is_ever_crossed(kind: LimitKind, fleet: Fleet) -> None:
    first = Burst(fleet)
    asking = asyncio.create_task(first.run())
    while (counts := fleet.counts())[0] < HELD or counts[1] < FREE:
        assert not asking.done(), (first.statuses, first.problems, counts)
        await asyncio.sleep(0.02)
    fleet.gateways["g3"].process.kill()
    fleet.gateways["g3"].process.wait()
    await fleet.restart_nats()
    fleet.gateways["g3"].start()
    fleet.let_go()
    await asking
    await fleet.ready()
    second = Burst(fleet)
    await second.run()
    await fleet.stop_gateways()
    statuses = first.statuses + second.statuses
    print(kind.value, dict(first.statuses), dict(second.statuses), "most at once", fleet.counts()[2])
    assert statuses[200] > 0 and statuses[429] > 0 and statuses[0] > 0 and statuses[500] == 0

    entries = {name: [json.loads(entry) for entry in LogReader(fleet.audit(name)).entries()] for name in GATEWAYS}
    check_ceilings(kind, entries)
    if kind is LimitKind.CONCURRENT_STREAMS:
        assert 0 < fleet.counts()[2] <= CEILINGS[kind]
    check_books(kind, fleet, entries)


def check_ceilings(kind: LimitKind, entries: dict[str, list[dict[str, Any]]]) -> None:
    """What was settled, and of what no outcome is known all that was reserved, window by window."""
    price = parse(plans(kind), Path("plans.toml")).price_of("any")
    assert price is not None
    spent: Counter[str] = Counter()
    for log in entries.values():
        outcomes = {entry["request_id"]: entry for entry in log if entry["kind"] == "outcome"}
        for intent in (entry for entry in log if entry["kind"] == "intent"):
            outcome = outcomes[intent["request_id"]]
            if not intent["limits"]:  # a budget refused it: nothing was charged
                assert outcome["outcome"] in ("refused", "interrupted")
                continue
            [limit] = intent["limits"]
            unknown = outcome["duration"] is None
            prompt = intent["reserved_prompt_tokens"] if unknown else outcome["prompt_tokens"] or 0
            completion = intent["reserved_tokens"] if unknown else outcome["completion_tokens"] or 0
            money = intent["reserved_money"] if unknown else price.of(prompt, outcome["cached_tokens"] or 0, completion)
            if not unknown and outcome["outcome"] != "refused":
                assert outcome["money"] == money
            used = {LimitKind.MONEY_PER_MONTH: money, LimitKind.REQUESTS_PER_MINUTE: 1}.get(kind, prompt + completion)
            spent[limit] += 0 if outcome["outcome"] == "refused" else used
    assert spent
    if kind is not LimitKind.CONCURRENT_STREAMS:
        assert all(used <= CEILINGS[kind] for used in spent.values()), spent


def check_books(kind: LimitKind, fleet: Fleet, entries: dict[str, list[dict[str, Any]]]) -> None:
    """`lacre budget show`: what is gone from the ceiling is what receipts say, and what is listed as forfeited."""
    audits = [argument for name in GATEWAYS for argument in ("--audit", str(fleet.audit(name)))]
    command = [*LACRE, "budget", "show", "--json", "--state", str(fleet.site.folder), *audits]
    shown = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert shown.returncode == 0, shown.stdout + shown.stderr
    lines = [json.loads(line) for line in shown.stdout.splitlines()]
    if kind is LimitKind.CONCURRENT_STREAMS:
        return
    assert lines
    settled: dict[int, int] = defaultdict(int)
    for log in entries.values():
        windows = {entry["request_id"]: entry["limits"] for entry in log if entry["kind"] == "intent" and entry["limits"]}
        for outcome in (entry for entry in log if entry["kind"] == "outcome" and entry["duration"] is not None):
            if outcome["request_id"] not in windows:
                continue
            window = int(windows[outcome["request_id"]][0].partition("@")[2])
            tokens = (outcome["prompt_tokens"] or 0) + (outcome["completion_tokens"] or 0)
            amount = {LimitKind.MONEY_PER_MONTH: outcome["money"], LimitKind.REQUESTS_PER_MINUTE: 1}.get(kind, tokens)
            settled[window] += 0 if outcome["outcome"] == "refused" else amount
    for line in lines:
        print(line)
        assert line["wrong"] is None
        assert line["drawn"] == settled[line["window"]] + line["forfeited"] <= CEILINGS[kind]
        assert {lease["holder"].partition(".")[0] for lease in line["leases"] if lease["forfeited"]} <= {"g3"}
