"""A gateway's order to one worker, over NATS: that one hears it, and what it then announces."""

from __future__ import annotations

import asyncio
import json
from dataclasses import dataclass, field, replace
from typing import Any

import pytest

from lacre import __version__
from lacre_fabric.nats import subjects
from lacre_fabric.nats.gateway import NatsGateway
from lacre_fabric.nats.roles import Role
from lacre_fabric.work.contract import NoWorkers, SeenWorker
from lacre_fabric.work.presence import DRAINED, Presence
from parts.fabric import Parties, ask_once, new_work, work
from parts.waiting import until


@dataclass
class Told:
    """What a worker is ordered, and whether it can work: an `Able`."""

    orders: list[bytes] = field(default_factory=list)
    drained: bool = False

    def obey(self, order: bytes) -> bool:
        self.orders.append(order)
        self.drained = order == b"drain"
        return True

    def models(self) -> tuple[str, ...]:
        return () if self.drained else ("m1",)

    def kinds(self) -> list[str]:
        return [DRAINED] if self.drained else []


async def told_worker(parties: Parties, node: str, **options: Any) -> Told:
    told = Told()
    worker = await parties.worker(node=node, able=told, **options)
    worker.on_order = told.obey
    parties.background(work(worker))
    return told


def seen(gateway: NatsGateway, node: str, pool: str = "a") -> SeenWorker | None:
    return gateway.seen().get((pool, subjects.DEFAULT_REGION, node))


async def test_one_worker_hears_it(parties: Parties) -> None:
    gateway = await parties.gateway()
    first, second = await told_worker(parties, "n1"), await told_worker(parties, "n2")
    await until(lambda: all((found := seen(gateway, node)) and found.hears for node in ("n1", "n2")))
    found = seen(gateway, "n1")
    assert found is not None and (found.version, found.drained) == (__version__, False)
    await gateway.order("a", subjects.DEFAULT_REGION, "n1", "drain")
    await until(lambda: (found := seen(gateway, "n1")) is not None and found.drained and not found.models)
    assert (first.orders, second.orders) == ([b"drain"], [])
    for _ in range(6):  # the other worker takes what there is
        assert await ask_once(gateway) == "whole"
    await gateway.order("a", subjects.DEFAULT_REGION, "n2", "drain")
    await until(lambda: not gateway.workers("a", "m1"))
    with pytest.raises(NoWorkers):
        await gateway.dispatch(new_work("a"))
    await gateway.order("a", subjects.DEFAULT_REGION, "n1", "resume")
    await until(lambda: gateway.workers("a", "m1"))
    assert await ask_once(gateway) == "whole"


async def test_nobody_hears_it_for_a_worker_that_is_not_there(parties: Parties) -> None:
    gateway, told = await parties.gateway(), await told_worker(parties, "n1")
    await gateway.order("a", subjects.DEFAULT_REGION, "n9", "drain")
    await gateway.order("a", subjects.DEFAULT_REGION, "n1", "drain")
    await until(lambda: told.orders)
    assert told.orders == [b"drain"]


async def test_a_worker_without_ears(parties: Parties) -> None:
    """Its process obeys no orders: nothing happens, and work goes on."""
    gateway, worker = await parties.gateway(), await parties.worker()
    parties.background(work(worker))
    await until(lambda: seen(gateway, "n1"))
    await gateway.order("a", subjects.DEFAULT_REGION, "n1", "drain")
    await asyncio.sleep(0.2)
    assert await ask_once(gateway) == "whole"


async def test_older_permissions(own: Parties) -> None:
    """NATS servers that deny workers their offers: the worker says that it hears none."""

    def as_before(role: Role) -> Role:
        kept = tuple(subject for subject in role.subscribe if not subject.startswith("offer."))
        return replace(role, subscribe=kept)

    own.live.stop()
    own.live.start(as_before)
    await own.live.provision()
    gateway = await own.gateway()
    await told_worker(own, "n1")
    await until(lambda: (found := seen(gateway, "n1")) is not None and found.version == __version__)
    found = seen(gateway, "n1")
    assert found is not None and not found.hears


def test_the_subject_is_no_model() -> None:
    order = subjects.order("a", "lacre", "n1")
    assert subjects.is_order(order)
    assert order.rpartition(".")[0] == subjects.offer("a", "lacre", "n1", "m").rpartition(".")[0]
    assert not any(subjects.is_order(subjects.offer("a", "lacre", "n1", model)) for model in ("-", "m", "\x00", "é", ">"))


@pytest.mark.parametrize(
    ("members", "version", "drained", "hears", "keys"),
    [
        ({}, "", False, False, set()),  # an older worker's
        ({"offers": True}, "", False, False, set()),
        ({"version": "1.2.0rc1", "offers": True, "wrong": ["drained"], "keys": ["a", "b"]}, "1.2.0rc1", True, True, {"a", "b"}),
        ({"version": "<b>", "offers": True}, "", False, False, set()),
        ({"version": 7, "wrong": "drained"}, "", False, False, set()),
        ({"version": "1" * 33, "keys": ["k" * 129]}, "", False, False, set()),
    ],
)  # fmt: skip
def test_what_a_gateway_believes(members: dict[str, Any], version: str, drained: bool, hears: bool, keys: set[str]) -> None:
    """A member that is missing or wrong costs nothing but itself: the worker still counts."""
    found = Presence.parse(json.dumps({"models": ["m1"], "free": 1, "busy": 0} | members).encode()).seen
    assert (found.version, found.drained, found.hears, set(found.keys)) == (version, drained, hears, keys)
    assert found.models == ("m1",)
