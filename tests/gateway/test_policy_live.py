"""Rules that change while requests are served: what holds takes over, what does not changes nothing."""

from __future__ import annotations

import asyncio
import io
import json
import os
import shutil
import signal
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from lacre_fabric.logs import make_log
from lacre_gateway.audit.check import verify
from lacre_gateway.audit.entries import RELOAD_REFUSED, RELOADED, Event
from lacre_gateway.policy.cedar import SYNTAX, PolicyError
from lacre_gateway.policy.live import LiveRules
from lacre_gateway.policy.rules import NO_CASES
from lacre_gateway.policy.trial import try_out
from lacre_gateway.serve import reloading
from lacre_gateway.settings import shipped
from parts.policies import BROKEN, asked
from parts.stage import Stage
from parts.waiting import until

STRICT = '@id("strict") forbid (principal, action in Action::"sealed", resource) when { context.max_tokens > 100 };\n'


class Scene:
    """A rule set in a folder of its own, at work."""

    def __init__(self, folder: Path) -> None:
        self.folder = shutil.copytree(shipped(), folder / "policies")
        self.said = io.StringIO()
        self.events: list[Any] = []
        self.rules = LiveRules(self.folder, log=make_log(self.said), clock=time.time)

    async def reload(self, actor: str | None = None) -> None:
        await self.rules.reload(self.events.append, actor)

    def tighten(self) -> None:
        shutil.rmtree(self.folder / "cases")  # which are for other rules
        (self.folder / NO_CASES).touch()
        (self.folder / "strict.cedar").write_text(STRICT)

    @property
    def allows(self) -> bool:
        return self.rules.decide(asked(max_tokens=101)).allowed

    def logged(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in self.said.getvalue().splitlines()]


@pytest.fixture
def scene(tmp_path: Path) -> Scene:
    return Scene(tmp_path)


async def test_a_set_that_holds_takes_over(scene: Scene) -> None:
    before = scene.rules.status
    assert scene.allows and (before.refused, before.reloads) == (None, 0)
    scene.tighten()
    assert scene.allows  # until it is reloaded
    await scene.reload("acme/olga")
    after = scene.rules.status
    assert not scene.allows and (after.policies, after.refused, after.reloads) == (before.policies + 1, None, 1)
    assert after.policy_set != before.policy_set and after.rules != before.rules and after.since >= before.since
    [event] = scene.events
    assert isinstance(event, Event)
    assert (event.event, event.actor, event.policy_set, event.rules) == (RELOADED, "acme/olga", after.policy_set, after.rules)
    assert scene.rules.decide(asked()).policy_set == after.policy_set


@pytest.mark.parametrize("kind", BROKEN)
async def test_a_set_that_does_not_hold_changes_nothing(kind: str, scene: Scene) -> None:
    spoil, fault, place = BROKEN[kind]
    before, working = scene.rules.status, scene.rules.current
    spoil(scene.folder)
    with pytest.raises(PolicyError):
        await scene.reload()
    after = scene.rules.status
    assert scene.rules.current is working and scene.allows
    assert after.refused is not None and (after.refused.fault, after.refused.place, after.refusals) == (fault, place, 1)
    assert (after.policy_set, after.since, after.reloads) == (before.policy_set, before.since, 0)
    assert after.detail()["refused"] == {"fault": fault, "file": place, "since": after.refused.time}
    [event] = scene.events
    assert (event.event, event.reason, event.target) == (RELOAD_REFUSED, fault, place or None)
    assert event.policy_set == before.policy_set
    [line] = scene.logged()
    assert (line["level"], line["kind"]) == ("error", fault)


async def test_rules_that_would_end_the_process(scene: Scene) -> None:
    """Cedar's parser overflows its stack on this: the process that tries it dies, and this one does not."""
    nested = f"{'(' * 50_000}true{')' * 50_000}"
    (scene.folder / "x.cedar").write_text(f'@id("x") permit (principal, action, resource) when {{ {nested} }};')
    with pytest.raises(PolicyError, match="nested too deep"):
        await scene.reload()
    assert scene.allows and scene.rules.status.refused is not None
    assert scene.rules.status.refused.fault == SYNTAX
    (scene.folder / "x.cedar").unlink()
    await scene.reload()
    assert scene.rules.status.refused is None
    assert len(await try_out(scene.folder)) == 64  # cases too


@asynccontextmanager
async def watched(scene: Scene, interval: float) -> AsyncIterator[None]:
    watching = asyncio.create_task(scene.rules.watch(scene.events.append, interval=interval))
    try:
        yield
    finally:
        watching.cancel()
        await asyncio.gather(watching, return_exceptions=True)


async def test_files_are_watched(scene: Scene) -> None:
    """Good, broken, repaired, replaced: each is noticed by itself, once."""
    rules = scene.rules
    async with watched(scene, 0.05):
        scene.tighten()
        await until(lambda: rules.status.reloads == 1, 30)
        (scene.folder / "strict.cedar").write_text("forbid (")
        await until(lambda: rules.status.refused, 30)
        assert not scene.allows
        (scene.folder / "strict.cedar").write_text(STRICT)
        await until(lambda: not rules.status.refused, 30)
        assert rules.status.reloads == 2  # the same set as before, and it is said that it holds again
        scene.folder.rename(scene.folder.with_name("away"))
        await until(lambda: rules.status.refused, 30)
        assert not scene.allows
        shutil.copytree(shipped(), scene.folder)
        await until(lambda: rules.status.reloads == 3, 30)
        assert scene.allows
        (scene.folder / "default.cedar").touch()
        await asyncio.sleep(0.5)
        assert (rules.status.reloads, rules.status.refusals) == (3, 2)
    assert [event.event for event in scene.events] == [RELOADED, RELOAD_REFUSED, RELOADED, RELOAD_REFUSED, RELOADED]


async def test_half_a_set_is_waited_for(scene: Scene) -> None:
    """Files that arrive one after the other are taken up together."""
    async with watched(scene, 0.2):
        for number in range(8):
            (scene.folder / f"{number}.cedar").write_text("forbid (")
            await asyncio.sleep(0.05)
        scene.tighten()
        for number in range(8):
            (scene.folder / f"{number}.cedar").unlink()
        await until(lambda: scene.rules.status.reloads, 30)
    assert scene.rules.status.refusals == 0


async def test_decisions_go_on_while_it_reloads(scene: Scene) -> None:
    """Each is of the one set or of the other, whole."""
    old = scene.rules.status.policy_set
    scene.tighten()
    reloading = asyncio.create_task(scene.reload())
    seen: set[tuple[bool, str]] = set()
    done = False
    while not done:
        done = reloading.done()
        decision = scene.rules.decide(asked(max_tokens=101))
        seen.add((decision.allowed, decision.policy_set))
        await asyncio.sleep(0)
    await reloading
    assert seen == {(True, old), (False, scene.rules.status.policy_set)}


async def test_hanging_up(scene: Scene, stage: Stage) -> None:
    """SIGHUP reloads at once, also where nobody watches; what is broken is told, and the next one is heard as well."""
    gateway = replace(stage.gateway, rules=scene.rules)
    running = reloading(gateway, lambda: iter(()))
    try:
        assert [each.name for each in running] == ["reload", "certificates"]
        (scene.folder / "strict.cedar").write_text("forbid (")
        os.kill(os.getpid(), signal.SIGHUP)
        await until(lambda: scene.rules.status.refused, 30)
        assert scene.allows
        scene.tighten()
        os.kill(os.getpid(), signal.SIGHUP)
        await until(lambda: scene.rules.status.reloads, 30)
        assert not scene.allows
    finally:
        asyncio.get_running_loop().remove_signal_handler(signal.SIGHUP)
        for each in running:
            await each.close()
    await stage.gateway.close()
    events = [entry for entry in stage.entries() if entry["kind"] == "event"]
    assert [entry["event"] for entry in events] == ["started", RELOAD_REFUSED, RELOADED, "stopped"]
    assert events[2]["policy_set"] == scene.rules.status.policy_set
    assert verify(stage.folder / "audit").wrong is None
