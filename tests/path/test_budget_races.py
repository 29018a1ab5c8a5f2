"""200 requests at once over three gateway processes, on each kind of limit, while one of them and nats-server are killed.

Nothing here is replaced but the model: real gateways, nats-server with its files, a node that opens and seals. What is held
against the ceilings is what the gateways recorded, the killed one too, and what the worker saw.
"""

from __future__ import annotations

import asyncio
import email.utils
import json
import os
import subprocess
import time
from collections import Counter, defaultdict
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import httpx2
import pytest

from lacre.wire.header import Aead, Kdf, Kem, Suite
from lacre_fabric.operate.leash import PYTHON
from lacre_gateway.budget.plans import LimitKind, parse
from parts import by_hand
from parts.stage import POOL, TINY, LiveStage, launched, own_issuer
from parts.up import run

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
READY = 240.0  # seconds; three processes that import at once, on a machine that has other things to do
SUITE = Suite(Kem.X25519, Kdf.HKDF_SHA256, Aead.AES_256_GCM)
LIMITS = "longest_stream = 60.0"


def plans(kind: LimitKind) -> str:
    """One plan with one limit, for the whole tenant: all of its users race for it."""
    ceiling = f'"0.{CEILINGS[kind]:06d}"' if kind is LimitKind.MONEY_PER_MONTH else CEILINGS[kind]
    return f'default_plan = "p"\n[plans.p.tenant]\n{kind.value} = {ceiling}\n{PRICES}'


@pytest.fixture(params=list(LimitKind))
async def kind(request: pytest.FixtureRequest) -> LimitKind:
    return LimitKind(request.param)


class HeldWorker:
    """The process of `parts/held_worker.py`."""

    def __init__(self, live: LiveStage, free: int, slots: int) -> None:
        self._log = live.site.log("worker")
        command = [*PYTHON, "-m", "parts.held_worker", str(live.site.folder), live.server.url, str(free), str(slots)]
        environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[1])}
        self._process = launched(command, self._log, stdin=subprocess.PIPE, env=environment)

    def let_go(self) -> None:
        """It holds nothing from now on."""
        assert self._process.stdin is not None
        self._process.stdin.write(b"go\n")
        self._process.stdin.flush()

    def counts(self) -> tuple[int, int, int]:
        """Calls that run, that were answered, and that ran at once at most."""
        lines = [line for line in self._log.read_text().splitlines() if line.replace(" ", "").isdigit()]
        running, answered, most = map(int, lines[-1].split()) if lines else (0, 0, 0)
        return running, answered, most

    def stop(self) -> None:
        self._process.kill()
        self._process.communicate()


@pytest.fixture
async def live(kind: LimitKind, tmp_path: Path) -> AsyncIterator[LiveStage]:
    async with LiveStage(tmp_path) as live:
        for _ in GATEWAYS:
            live.gateway(f"{own_issuer(live.site)}\n[limits]\n{LIMITS}", plans=plans(kind))
        await live.start_fabric(gateways=GATEWAYS[1:])
        live.site.save(live.server.url, live.gateways[0].base_url)
        yield live


@pytest.fixture
async def worker(live: LiveStage) -> AsyncIterator[HeldWorker]:
    worker = HeldWorker(live, FREE, slots=64)
    try:
        await live.start_gateways(READY)
        yield worker
    finally:
        worker.stop()


class Burst:
    """Clients at once, in turns over the gateways; each asks until it is served. statuses: 200 only for whole answers, and 0
    for those that a dead gateway left.
    """

    def __init__(self, live: LiveStage) -> None:
        self._live = live
        keys = live.site.generations(POOL).pool_keys(time.time(), time.time() + 600)
        self._config = next(key.config for key in keys if key.config.kem is SUITE.kem)
        self.statuses: Counter[int] = Counter()
        self.problems: Counter[str] = Counter()

    async def run(self) -> None:
        tokens = [self._live.token(f"user-{number}") for number in range(8)]
        limits = httpx2.Limits(max_connections=REQUESTS)
        async with httpx2.AsyncClient(limits=limits, timeout=60) as client:
            await asyncio.gather(*(self._ask(client, tokens[number % 8], number) for number in range(REQUESTS)))

    async def _ask(self, client: httpx2.AsyncClient, token: str, number: int) -> None:
        until = time.monotonic() + PATIENCE
        while True:
            status = await self._once(client, token, self._live.gateways[number % 3].base_url)
            self.statuses[status] += 1
            if status == 200 or time.monotonic() > until:
                return
            await asyncio.sleep(PAUSE)

    async def _once(self, client: httpx2.AsyncClient, token: str, base_url: str) -> int:
        dated = (("content-type", "application/json"), ("date", email.utils.formatdate(usegmt=True)))
        body, _, opener = by_hand.seal(self._config, by_hand.request(headers=dated), SUITE)
        headers = by_hand.outer_headers(token, lacre_model=TINY, lacre_max_tokens=str(MAX_TOKENS))
        try:
            response = await client.post(f"{base_url}/v1/sealed", content=body, headers=headers)
        except httpx2.HTTPError:
            return 0
        if response.status_code == 200:
            assert by_hand.opened(opener, response.content)
        else:
            self.problems[response.json()["type"].rpartition(":")[2]] += 1
        return response.status_code


@pytest.mark.slow
@pytest.mark.timeout(600)
async def test_no_limit_is_ever_crossed(kind: LimitKind, live: LiveStage, worker: HeldWorker) -> None:
    first = Burst(live)
    asking = asyncio.create_task(first.run())
    while (counts := worker.counts())[0] < HELD or counts[1] < FREE:
        assert not asking.done(), (first.statuses, first.problems, counts)
        await asyncio.sleep(0.02)
    live.gateways[2].kill()
    await live.restart_nats()
    live.gateways[2].start()
    worker.let_go()
    await asking
    await live.gateways_ready(READY)
    second = Burst(live)
    await second.run()
    await live.stop_gateways()
    statuses = first.statuses + second.statuses
    print(kind.value, dict(first.statuses), dict(second.statuses), "most at once", worker.counts()[2])
    assert statuses[200] > 0 and statuses[429] > 0 and statuses[0] > 0 and statuses[500] == 0

    entries = {name: live.entries(gateway=name) for name in GATEWAYS}
    check_ceilings(kind, entries)
    if kind is LimitKind.CONCURRENT_STREAMS:
        assert 0 < worker.counts()[2] <= CEILINGS[kind]
    check_books(kind, live, entries)


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


def check_books(kind: LimitKind, live: LiveStage, entries: dict[str, list[dict[str, Any]]]) -> None:
    """`lacre budget show`: what is gone from the ceiling is what receipts say, and what is listed as forfeited."""
    audits = [argument for name in GATEWAYS for argument in ("--audit", str(live.audit_of(name)))]
    shown = run("budget", "show", "--json", "--state", str(live.site.folder), *audits)
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
