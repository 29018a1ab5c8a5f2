"""Draining one worker through the admin API, by an order that the worker verifies: who may, what is recorded, what fails."""

from __future__ import annotations

import asyncio
import json
import os
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import httpx2
import pytest

from lacre import problems
from lacre_gateway.admin import worker_orders
from lacre_gateway.admin.worker_problems import DEAF, NO_WORKER, SILENT
from parts.commands import run_lacre_bytes
from parts.fake_worker import FakeWorker
from parts.obedient import obedient
from parts.stage import Stage

from .conftest import served

NODE = {"pool": "default", "node": "node-0"}


@pytest.fixture
async def admin(stage: Stage) -> AsyncIterator[httpx2.AsyncClient]:
    async with stage.http(app=stage.admin) as client:
        yield client


def bearer(stage: Stage, scope: str = "lacre:admin") -> dict[str, str]:
    return {"authorization": f"Bearer {stage.issuer.token(scope=scope, sub='root')}"}


async def ordered(
    stage: Stage, admin: httpx2.AsyncClient, what: str, scope: str = "lacre:admin", **names: Any
) -> httpx2.Response:
    return await admin.post(f"/v1/workers/{what}", json=NODE | names, headers=bearer(stage, scope))


async def test_drained_and_resumed(stage: Stage, worker: FakeWorker, admin: httpx2.AsyncClient) -> None:
    obedient(stage, worker.fabric)
    second = stage.hub.worker(stage.pool, stage.served[stage.pool])
    done = await ordered(stage, admin, "drain")
    assert (done.status_code, done.json()) == (200, {
        "pool": "default", "region": "lacre", "node": "node-0", "drained": True, "busy": 0, "others": 1,
    })  # fmt: skip
    await second.close()
    async with stage.http() as client:
        refused = await stage.post(client)
        assert (refused.status_code, refused.json()["type"]) == (503, problems.NO_WORKER.type)
        again = await ordered(stage, admin, "drain")
        assert again.status_code == 200, "it is so already"
        assert (await ordered(stage, admin, "resume")).json()["drained"] is False
        assert (await stage.post(client)).status_code == 200
    recorded = [(entry["action"], entry["target"], entry["decision"]) for entry in stage.entries("admin")]
    assert recorded == [
        ("admin:drain_worker", f"default/lacre/node-0#{what}", "allow") for what in ("drain", "drain", "resume")
    ]
    told = [(line["kind"], line["node"]) for line in stage.logged() if line["event"] == "worker ordered"]
    assert told == [("drain", "node-0"), ("drain", "node-0"), ("resume", "node-0")]


async def test_who_may_not(stage: Stage, worker: FakeWorker, admin: httpx2.AsyncClient) -> None:
    """Not even who may drain gateways, by a rule that names that action alone."""
    state = obedient(stage, worker.fabric)
    for what in ("drain", "resume"):
        assert (await admin.post(f"/v1/workers/{what}", json=NODE)).status_code == 401
        assert (await ordered(stage, admin, what, scope="lacre:http")).status_code == 403
    assert state.reason() is None
    assert {(entry["action"], entry["decision"]) for entry in stage.entries("admin")} == {("admin:drain_worker", "deny")}


@pytest.mark.parametrize(
    "names", [{"node": "*"}, {"node": "a.b"}, {"node": ""}, {"pool": ">"}, {"region": "x y"}, {"extra": 1}]
)
async def test_names_that_no_worker_has(stage: Stage, admin: httpx2.AsyncClient, names: dict[str, Any]) -> None:
    assert (await ordered(stage, admin, "drain", **names)).status_code == 422


async def test_no_such_worker(stage: Stage, worker: FakeWorker, admin: httpx2.AsyncClient) -> None:
    refused = await ordered(stage, admin, "drain", node="n7")
    assert (refused.status_code, refused.json()["type"]) == (404, NO_WORKER.type)


async def test_a_worker_of_an_older_version(stage: Stage, worker: FakeWorker, admin: httpx2.AsyncClient) -> None:
    refused = await ordered(stage, admin, "drain")
    assert (refused.status_code, refused.json()["type"]) == (409, DEAF.type)


async def test_a_worker_that_does_not_obey(
    stage: Stage, worker: FakeWorker, admin: httpx2.AsyncClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It hears each order, and refuses it: it knows another gateway key."""
    monkeypatch.setattr(worker_orders, "PATIENCE", 1.3)
    heard: list[bytes] = []

    def refuse(order: bytes) -> bool:
        heard.append(order)
        return False

    obedient(stage, worker.fabric)
    worker.fabric.on_order = refuse
    refused = await ordered(stage, admin, "drain")
    assert (refused.status_code, refused.json()["type"]) == (504, SILENT.type)
    assert len(heard) == 2 == len(set(heard)), "each try is an order of its own"


async def test_without_the_fabric(stage: Stage, admin: httpx2.AsyncClient) -> None:
    stage.gateway.fabric = None
    assert (await ordered(stage, admin, "drain")).status_code == 503


async def test_as_it_is_typed(stage: Stage, worker: FakeWorker, tmp_path: Path) -> None:
    state, token = obedient(stage, worker.fabric), tmp_path / "token"
    token.write_text(stage.issuer.token(scope="lacre:admin", sub="root"))
    clean = {name: value for name, value in os.environ.items() if not name.startswith("LACRE_")}
    async with served(stage.admin) as (_, port):
        at = ("--admin", f"http://127.0.0.1:{port}", "--token-file", str(token))
        done = await asyncio.to_thread(run_lacre_bytes, "admin", "drain-worker", "node-0", *at, env=clean)
        assert done.returncode == 0, done.stderr
        assert done.stdout.decode() == "worker node-0 of pool default: drained: 0 slots are still busy\n"
        assert b"no other worker of pool default takes work" in done.stderr
        assert state.reason() is not None
        done = await asyncio.to_thread(run_lacre_bytes, "admin", "resume-worker", "node-0", "--json", *at, env=clean)
        assert json.loads(done.stdout)["drained"] is False
        missing = await asyncio.to_thread(run_lacre_bytes, "admin", "drain-worker", "n9", *at, env=clean)
        assert missing.returncode == 3
        assert b"No live worker has this name" in missing.stderr and not missing.stdout
        missing = await asyncio.to_thread(run_lacre_bytes, "admin", "drain-worker", "n9", "--json", *at, env=clean)
        assert (missing.returncode, json.loads(missing.stdout)["error"]["message"] in missing.stderr.decode()) == (3, True)
        for name in ("n 1", "", "../n1", "N1", "n1\n"):
            wrong = await asyncio.to_thread(run_lacre_bytes, "admin", "drain-worker", name, *at, env=clean)
            assert wrong.returncode == 1 and b"no worker has the name" in wrong.stderr and b"lacre top" in wrong.stderr
