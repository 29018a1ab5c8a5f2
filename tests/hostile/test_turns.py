"""Whose turn it is at a worker: what a caller can do to come before others, and what the pseudonyms tell that decide it."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any, Literal

import pytest

from hostile.adversary import HostileFabric, HttpWire
from hostile.attacks import attack
from hostile.shapes import Test, granted
from hostile.test_workers import LyingWorker
from lacre import problems
from lacre.jose.jws import b64u_decode
from lacre.runtime import tasks
from lacre_backend.api.app import WEIGHED, create_app
from lacre_backend.engine.adapted import AdaptedEngine
from lacre_backend.engine.adapters import AdapterFile
from lacre_backend.engine.generate import LlamaEngine, LlamaSettings
from lacre_backend.engine.plan import EngineLimits
from lacre_backend.engine.reuse import MIN_REUSE
from lacre_backend.engine.scheduler import COMPARED, Scheduler
from lacre_gateway.auth.claims import Principal
from lacre_gateway.auth.pseudonyms import HOUR, Pseudonyms
from parts.echo_engine import EchoEngine
from parts.issuer import ISSUER, Issuer
from parts.keys import MODEL, OTHER_MODEL
from parts.stage import Stage
from parts.tiny_model import tiny_lora, tiny_model
from parts.waiting import until

FLOOD = 8
TOKENS = 300  # of each answer: all of the flood waits when the other one comes


@pytest.fixture
def engine(tmp_path: Path) -> Iterator[LlamaEngine]:
    """With one slot: who waits, waits for the others."""
    settings = LlamaSettings(n_ctx=1024, slots=1, threads=1)
    engine = LlamaEngine(tiny_model(tmp_path / "tiny.gguf"), name=MODEL, digest="sha256:tiny", settings=settings)
    yield engine
    engine.close()


@attack("send many requests at once, each with its own salt, to be served first", "client",
        "only the grant's pseudonyms of tenant and caller decide the order",
        gain="nothing; another caller's single request is served next", cases=[1, 4])  # fmt: skip
async def test_salts(stage: Stage, honest: Stage, wire: HttpWire, issuer: Issuer, engine: LlamaEngine, case: int) -> None:
    await stage.worker(create_app([engine]), models=[MODEL], slots=4 * FLOOD)
    victim = stage.client(wire, issuer.token(sub="bob", tenant="other"))
    await victim.chat(stage.prompt, max_tokens=1)
    done = 0

    async def ask() -> None:
        nonlocal done
        while True:
            client = stage.client(wire, honest.token)  # each draws its own salt
            await client.chat(stage.prompt, max_tokens=case * TOKENS, n=case)
            done += case

    flood = [tasks.spawn("flood", ask()) for _ in range(FLOOD // case)]
    await until(lambda: engine.held[0] >= FLOOD - 1, 60)
    assert not any(task.done() for task in flood)
    before = done
    await victim.chat(stage.prompt, max_tokens=TOKENS)
    assert done - before <= FLOOD // 2, "those that ran, and what ended while the victim's request was on its way"
    await tasks.end(*flood)


async def flooding(stage: Stage, honest: Stage, wire: HttpWire, engine: EchoEngine, n: int) -> list[asyncio.Task[Any]]:
    """More requests for one model than the worker has slots, which take long. They began when this returns."""

    async def ask() -> None:
        await stage.client(wire, honest.token).chat(stage.prompt, model=MODEL, max_tokens=TOKENS // n, n=n)

    flood = [tasks.spawn("flood", ask()) for _ in range(FLOOD)]
    await until(lambda: engine.running)
    assert not any(task.done() for task in flood)
    return flood


@attack("flood one model, so that a worker has no slot left for another", "client",
        "a worker pulls for each model by that model's own slots",
        gain="nothing; the other model is served at once")  # fmt: skip
async def test_other_model(stage: Stage, honest: Stage, wire: HttpWire, issuer: Issuer) -> None:
    slow, other = EchoEngine(name=MODEL, delay=0.2, repeat=TOKENS), EchoEngine(name=OTHER_MODEL)
    await stage.worker(create_app([slow, other]), slots=4, each={MODEL: 2, OTHER_MODEL: 2})
    flood = await flooding(stage, honest, wire, slow, 1)
    victim = stage.client(wire, issuer.token(sub="bob", tenant="other"))
    async with asyncio.timeout(5):  # each of the flood takes a minute
        await victim.chat(stage.prompt, model=OTHER_MODEL, max_tokens=1)
    assert slow.running == 2
    await tasks.end(*flood)
    slow.close()
    other.close()


@attack("ask for 16 choices at a time, which would count as one request", "client",
        "a request takes a slot for each choice, and the worker pulls no more until it knows their number",
        gain="nothing; requests that the worker cannot begin stay in the queue for others")  # fmt: skip
async def test_choices(stage: Stage, honest: Stage, wire: HttpWire) -> None:
    slow = EchoEngine(name=MODEL, delay=0.2, repeat=TOKENS)
    await stage.worker(create_app([slow]), models=[MODEL], slots=4, weighs=WEIGHED)
    flood = await flooding(stage, honest, wire, slow, 16)
    for _ in range(20):
        await asyncio.sleep(0.01)
        assert slow.running <= 16
    await tasks.end(*flood)
    slow.close()


@attack("ask an adapter for what the base model has cached under the same salt, to see what other weights computed", "client",
        "caches are kept apart by adapter, whatever the salt",
        gain="nothing; nothing of it is cached for the adapter",
        cases=[False, True], ids=["from the base", "from the adapter"])  # fmt: skip
async def test_adapters(stage: Stage, honest: Stage, wire: HttpWire, tmp_path: Path, case: bool) -> None:
    path, settings = tiny_model(tmp_path / "tiny.gguf"), LlamaSettings(n_ctx=1024, slots=4, threads=1)
    lora = AdapterFile("other", tiny_lora(tmp_path / "lora.gguf"), "sha256:lora")
    with closing(LlamaEngine(path, name=MODEL, digest="sha256:tiny", settings=settings, adapters=[lora])) as engine:
        engines = [engine, AdaptedEngine(engine, lora.name, lora.digest, OTHER_MODEL)]
        await stage.worker(create_app(engines), models=[MODEL, OTHER_MODEL])
        client = stage.client(wire, honest.token)
        names = [MODEL, OTHER_MODEL][:: -1 if case else 1]
        cached = []
        for name in (names[0], names[1], *names):
            reply = await client.chat(stage.prompt * 8, model=name, max_tokens=1)
            cached.append(reply.receipt.cached_tokens)
        assert cached[0] == cached[1] == 0
        assert min(cached[2:]) > MIN_REUSE, "each reads its own again"


def linked(name: str, by: Literal["worker", "fabric"]) -> Test:
    @attack(name, by, "pseudonyms under a key that only gateways have, new ones every hour",
            gain="which requests are from one caller, and which callers from one tenant, within an hour; no names")  # fmt: skip
    async def test(stage: Stage, honest: Stage, wire: HttpWire, issuer: Issuer, fabric: HostileFabric) -> None:
        """Two requests of alice under two salts, then one of a colleague's and one of another tenant's."""
        tokens = [honest.token, honest.token, issuer.token(sub="bob"), issuer.token(sub="alice", tenant="other")]
        async with LyingWorker(stage):
            for token in tokens:
                await stage.client(wire, token).chat(stage.prompt)
        grants = [json.loads(b64u_decode(work.grant.split(".")[1])) for work in fabric.works]
        (tenant, alice), again, colleague, other = [tuple(grant["fair"]) for grant in grants]
        assert again == (tenant, alice)
        assert colleague[0] == tenant
        assert len({tenant, alice, colleague[1], *other}) == 5
        principal, now = Principal("alice", "acme", ISSUER), time.time()
        known = Pseudonyms(stage.keys.gateway)
        assert (tenant, alice) in (known.of(principal, now), known.of(principal, now - 60))
        assert not {tenant, alice} & {*known.of(principal, now + 2 * HOUR), *known.of(principal, now - 2 * HOUR)}

    return test


test_linked = linked("link one caller's salts by the pseudonyms in its grants", "worker")
test_linked_outside = linked("link one caller's requests by the pseudonyms in their grants", "fabric")
test_no_pseudonyms = granted("grant invalid pseudonyms: a name, or kilobytes", "a grant has two pseudonyms of 22 characters",
    problems.INVALID_GRANT,
    *({"fair": pair} for pair in (("alice", "acme"), ("A" * 22, "B" * 4000), ("A" * 22,), ())))  # fmt: skip


@attack("send many long prompts at once that begin alike, so that every stream waits for their comparison", "client",
        "one step compares a limited number of prompts, and leaves the others to later steps",
        gain="nothing; its own prompts wait")  # fmt: skip
def test_alike() -> None:
    slots, prompt = 16, [7] * 200
    scheduler = Scheduler(EngineLimits(slots=slots, context=256, cells=slots * 256))

    def step() -> int:
        """How many were admitted."""
        plan = scheduler.plan()
        for segment in plan.segments:
            if segment.task is not None and segment.output:
                scheduler.end(segment.task)
        return len(plan.admitted)

    for around in range(2):  # the second time, every slot holds a beginning to compare
        for number in range(slots):
            scheduler.submit(f"{around}.{number}", [*prompt, number], b"s", fair=("t", "c"))
        admitted = [step()]
        while scheduler.busy:
            admitted.append(step())
        assert sum(admitted) == slots
    assert max(admitted) <= COMPARED // slots + 1
