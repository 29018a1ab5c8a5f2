"""Routes of the manifest, against a gateway that would rather have a request elsewhere."""

from __future__ import annotations

import base64
import json
from typing import Any, Final

import lacre
from hostile.adversary import GatewayOwner, response
from hostile.attacks import Verdict, attack
from hostile.shapes import Caller
from lacre import errors, problems
from lacre.jose.jws import b64u
from lacre.trust.routes import ModelRoute, RouteTarget
from parts.keys import MODEL, OTHER_POOL, POOL
from parts.stage import Stage

NAME: Final = "assistant"
FIRST: Final = {NAME: ModelRoute((RouteTarget(POOL, MODEL, 1), RouteTarget(OTHER_POOL, MODEL, 0)))}
ONLY: Final = {NAME: ModelRoute((RouteTarget(POOL, MODEL, 1),))}
GONE: Final = {NAME: ModelRoute((RouteTarget("gone", MODEL, 1),))}
ELSEWHERE: Final = {"pools": [{"pool": OTHER_POOL, "model": MODEL, "share": 1}]}
SHARES: Final = {"pools": [{"pool": OTHER_POOL, "model": MODEL, "share": 1}, {"pool": POOL, "model": MODEL, "share": 0}]}


def to(gateway: GatewayOwner) -> list[tuple[str, str]]:
    """Where each sealed request went."""
    return [(post.headers["lacre-pool"], post.headers["lacre-model"]) for post in gateway.posts]


def refusing(gateway: GatewayOwner, problem: problems.Problem) -> None:
    """The first pool is so; the other one is honest."""

    def respond(request: Any) -> Any:
        mine = request.headers["lacre-pool"] == POOL
        return response(problem.status, problem.body(), problems.MEDIA_TYPE) if mine else None

    gateway.respond = respond


@attack("lead a model to another pool by routes of its own, or by other shares, or take the routes away", "gateway",
        "the manifest is signed by the signer, and the routes are in it", errors.InvalidSignature,
        cases=[{NAME: SHARES}, {NAME: ELSEWHERE}, {MODEL: ELSEWHERE}, {}],
        ids=["other shares", "another pool", "a model's name", "none"])  # fmt: skip
async def test_own_routes(stage: Stage, caller: Caller, gateway: GatewayOwner, verdict: Verdict, case: Any) -> None:
    served = json.loads(stage.document(2, routes=FIRST))
    header, contents, signature = served["manifest"].split(".")
    payload = json.loads(base64.urlsafe_b64decode(contents + "==")) | {"routes": case}
    altered = json.dumps(served | {"manifest": f"{header}.{b64u(json.dumps(payload).encode())}.{signature}"}).encode()
    gateway.manifest = lambda: altered
    with verdict.refused():
        await caller.chat(stage.prompt, model=NAME)
    assert not gateway.posts


@attack("serve the older routes to a caller who has seen newer ones", "gateway",
        "the newest manifest seen is remembered, and used while it lasts",
        gain="nothing; the newer routes are used")  # fmt: skip
async def test_older_routes(stage: Stage, gateway: GatewayOwner) -> None:
    await stage.worker()
    memory = lacre.VersionMemory()
    for document in (stage.document(3, routes=ONLY), stage.document(2, routes=GONE)):
        stage.bucket = document
        await stage.client(gateway, memory=memory).chat(stage.prompt, model=NAME)
    assert to(gateway) == [(POOL, MODEL)] * 2


@attack("say that a pool has no worker, so that the next one gets the request", "gateway",
        "the request is sealed only for pools that the signed route names",
        gain="a choice among the pools of the signed route, counted in `attempts`")  # fmt: skip
async def test_no_worker(stage: Stage, gateway: GatewayOwner) -> None:
    worker = await stage.worker(pool=OTHER_POOL)
    stage.bucket = stage.document(2, routes=FIRST)
    refusing(gateway, problems.NO_WORKER)
    reply = await stage.client(gateway).chat(stage.prompt, model=NAME)
    assert (to(gateway), reply.attempts, worker.calls) == ([(POOL, MODEL), (OTHER_POOL, MODEL)], 2, 1)
    assert reply.verification.sealed_to is not None and reply.verification.sealed_to.pool == OTHER_POOL


@attack("say so of the only pool that the route names", "gateway", "no other pool of the manifest takes its place",
        problems.NO_WORKER)  # fmt: skip
async def test_no_worker_of_the_only_pool(stage: Stage, gateway: GatewayOwner, verdict: Verdict) -> None:
    stage.bucket = stage.document(2, routes=ONLY)
    refusing(gateway, problems.NO_WORKER)
    with verdict.refused():
        await stage.client(gateway, retries=1).chat(stage.prompt, model=NAME)
    assert to(gateway) == [(POOL, MODEL)] * 2


@attack("say that a pool is full, failed or lost its worker, so that another pool gets the prompt too", "gateway",
        "only a request that did not run, for want of a worker or a queue, goes to the next pool", errors.Unavailable,
        cases=[problems.BUSY, problems.WORKER_LOST, problems.UNCLAIMED, problems.INTERNAL, problems.OVERLOADED,
               problems.UNAVAILABLE],
        ids=lambda problem: problem.slug)  # fmt: skip
async def test_other_refusals(stage: Stage, gateway: GatewayOwner, verdict: Verdict, case: problems.Problem) -> None:
    await stage.worker(pool=OTHER_POOL)
    stage.bucket = stage.document(2, routes=FIRST)
    refusing(gateway, case)
    with verdict.refused():
        await stage.client(gateway, retries=0).chat(stage.prompt, model=NAME)
    assert to(gateway) == [(POOL, MODEL)]


@attack("refuse a caller in one pool, so that a pool with weaker rules gets the request", "gateway",
        "a denial is an answer: no other pool is asked in its place", problems.FORBIDDEN)  # fmt: skip
async def test_denied(stage: Stage, gateway: GatewayOwner, verdict: Verdict) -> None:
    await stage.worker(pool=OTHER_POOL)
    stage.bucket = stage.document(2, routes=FIRST)
    refusing(gateway, problems.FORBIDDEN)
    with verdict.refused():
        await stage.client(gateway).chat(stage.prompt, model=NAME)
    assert to(gateway) == [(POOL, MODEL)]


@attack("have a manifest signed that leads to a pool that is not in it", "gateway",
        "a route leads only to pools of its own manifest", errors.SettingsError)  # fmt: skip
async def test_unknown_pool(stage: Stage, caller: Caller, gateway: GatewayOwner, verdict: Verdict) -> None:
    """The operator was deceived: a pool that nobody vouches for has no key to seal to."""
    stage.bucket = stage.document(2, routes=GONE)
    with verdict.refused():
        await caller.chat(stage.prompt, model=NAME)
    assert not gateway.posts
