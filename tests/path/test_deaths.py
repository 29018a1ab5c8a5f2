"""Every background task and thread of every process, killed one at a time: the process ends, or the work starts again.

What there is to kill is what `lacre.runtime.tasks` enumerates in the running process; what a process must have is written
down here.
"""

from __future__ import annotations

import asyncio
import json
import os
from collections.abc import AsyncIterator, Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from shutil import copytree

import pytest

from lacre_fabric.operate.nats_server import free_port
from lacre_fabric.operate.site import Site
from parts.doomed import Doomed
from parts.stage import ECHO, POOL, EchoStage, issuer_table
from parts.up import environment

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]

GATEWAY = {"audit", "issuer keys", "drain", "fabric", "reload", "rules", "admin API", "revocations", "manifest", "budgets"}
WORKER = {"node", "pool keys", "health", "presence", "manifest"}


@pytest.fixture
async def site(tmp_path: Path) -> AsyncIterator[EchoStage]:
    async with EchoStage.standing(tmp_path) as machine:
        yield machine


def lines(doomed: Doomed, event: str, name: str) -> list[dict[str, object]]:
    told = [json.loads(line) for line in doomed.said().splitlines() if line.startswith("{")]
    return [line for line in told if line.get("event") == event and line.get("task") == name]


def is_killed(doomed: Doomed, name: str) -> None:
    """It dies of it, and its log says of what."""
    doomed.kill(name, until=doomed.ended)
    assert doomed.process.wait() not in (0, -9, -15), doomed.said()
    (death,) = lines(doomed, "background work died", name)
    assert "Traceback (most recent call last)" in str(death["traceback"])
    assert "Doom" in str(death["traceback"]) or "RuntimeError" in str(death["traceback"])  # of a loop that was stopped


def each_is_killed(start: Callable[[int], Doomed], wanted: set[str]) -> set[str]:
    """start: starts one more of the same process, by its number. wanted: what must be there. Returns the names of all work."""
    with ExitStack() as stack:
        return _each_is_killed(start, wanted, stack)


def _each_is_killed(start: Callable[[int], Doomed], wanted: set[str], stack: ExitStack) -> set[str]:
    first = start(0)
    stack.callback(first.stop)
    first.until(lambda: first.works(wanted))
    register = first.register()
    for name, restarts in register.items():
        if restarts:
            first.kill(name, until=lambda name=name: lines(first, "background work starts again", name))
            assert not first.ended()
            assert name in first.register()
    final = [name for name, restarts in register.items() if not restarts]

    def die(number: int, name: str) -> None:
        doomed = start(number) if number else first
        stack.callback(doomed.stop)
        doomed.until(lambda: doomed.works(wanted))
        is_killed(doomed, name)

    with ThreadPoolExecutor(2) as threads:
        for done in [threads.submit(die, number, name) for number, name in enumerate(final)]:
            done.result()
    return set(register)


async def test_a_gateway(site: EchoStage, tmp_path: Path) -> None:
    settings = site.site.gateway_settings
    policies = copytree(Path(__file__).parents[2] / "policies", tmp_path / "policies")

    def start(number: int) -> Doomed:
        own = settings.with_name(f"gateway-{number}.toml")
        text = settings.read_text().replace(f"port = {site.base_url.rpartition(':')[2]}", f"port = {free_port()}")
        text = text.replace(f'audit = "{site.audit}"', f'audit = "audit-{number}"')
        issuer = issuer_table("https://a.invalid", "a", f"http://127.0.0.1:{free_port()}/jwks").replace("jwks =", "jwks_url =")
        own.write_text(f'policies = "{policies}"\n{text}\n[admin]\nport = {free_port()}\n{issuer}')
        return Doomed.start(tmp_path / f"gateway-{number}.log", "lacre_gateway", "--settings", str(own))

    each_is_killed(start, GATEWAY)


async def test_a_worker(site: EchoStage, tmp_path: Path) -> None:
    settings = site.site.worker_settings(POOL)
    before, _, after = settings.read_text().partition("[[models]]")
    models = after.replace(ECHO, "smollm2-135m")

    def start(number: int) -> Doomed:
        own = settings.with_name(f"worker-{number}.toml")
        own.write_text(before.replace('health = "health"', f'health = "health-{number}"') + "[[models]]" + models)
        return Doomed.start(tmp_path / f"worker-{number}.log", "lacre_backend", "--settings", str(own))

    killed = each_is_killed(start, WORKER)
    assert {name.partition(" ")[0] for name in killed} >= {"api", "engine"}  # the threads


UP = {"upkeep", "env", "floods"}


def test_up(tmp_path: Path) -> None:
    """Its tasks hold no state, so each starts again. (A child that dies ends it: test_faults.)"""
    state = tmp_path / "state"

    def start(_number: int) -> Doomed:
        arguments = ("up", "--state", str(state), "--port", "0", "--as-shipped")
        up = Doomed.start(tmp_path / "up.log", "lacre", *arguments, environment=environment(state))
        up.until(lambda: "ready lacre" in up.said())
        up.log = Site(state, {}).log("up")
        return up

    assert each_is_killed(start, UP) == UP


async def test_a_signer(site: EchoStage, tmp_path: Path) -> None:
    """`lacre keys tend --stay`: what a cluster's signer runs."""
    state = site.site.folder
    signer = Doomed.start(
        tmp_path / "signer.log", "lacre", "keys", "tend", "--stay", "--state", str(state), environment=dict(os.environ)
    )
    try:
        signer.until(lambda: signer.works({"upkeep", "floods"}))
        assert signer.register() == {"upkeep": True, "floods": True}
        signer.kill("upkeep", until=lambda: lines(signer, "background work starts again", "upkeep"))
        (death,) = lines(signer, "background work starts again", "upkeep")
        assert "Doom" in str(death["traceback"])
        assert not signer.ended()
    finally:
        signer.stop()


async def test_a_proxy(site: EchoStage, tmp_path: Path) -> None:
    """`lacre proxy` has no lifetime work of its own now. If it gets some, that is killed here as well."""
    await site.start()
    env = {
        **environment(tmp_path / "state"),
        "LACRE_URL": site.url,
        "LACRE_TOKEN": site.token("somebody"),
    }

    def start(number: int) -> Doomed:
        log = tmp_path / f"proxy-{number}.log"
        proxy = Doomed.start(log, "lacre", "proxy", "--port", "0", "--json", environment=env)
        proxy.until(lambda: "base_url" in proxy.said())
        return proxy

    await asyncio.to_thread(each_is_killed, start, set[str]())
