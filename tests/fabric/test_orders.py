"""What a gateway tells a running request is proven: nobody else of the pool can say it, however it is sent."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator

import pytest

from lacre_fabric.nats import orders, subjects
from lacre_fabric.nats.key_holders import RollCall
from lacre_fabric.nats.orders import OrderKeys
from lacre_fabric.nats.worker import NatsDelivery
from lacre_fabric.work.contract import CREDIT
from lacre_fabric.work.frames import FrameKind
from parts.fabric import LiveFabric, new_work
from parts.stolen_nats import StolenNats

ID = "0123456789abcdef" * 2
NEXT = f"{subjects.API}.CONSUMER.MSG.NEXT.WORK_a_lacre.model-{subjects.model_token('m2')}"


def test_a_proof_is_of_one_order_of_one_request() -> None:
    keys, others = OrderKeys(), OrderKeys()
    key = keys.of("a", ID)
    assert key == keys.of("a", ID)
    assert orders.proven(key, orders.CANCEL, orders.proof(key, orders.CANCEL))
    assert orders.proven(key, b"4096", orders.proof(key, b"4096"))
    for other in (others.of("a", ID), keys.of("b", ID), keys.of("a", "f" * 32)):
        assert not orders.proven(key, orders.CANCEL, orders.proof(other, orders.CANCEL))
    for given in ("", "0" * 32, orders.proof(key, b"4097"), orders.proof(key, orders.CANCEL), "\udcff", "é" * 16):
        assert not orders.proven(key, b"4096", given)


def test_a_request_without_a_key_takes_orders_without_a_proof() -> None:
    """Its gateway is of an older version."""
    assert orders.parse_key(None) is None
    assert orders.proven(None, orders.CANCEL, "")


@pytest.mark.parametrize("text", ["", "zz" * 16, "00" * 15, "00" * 17, "é"])
def test_no_key(text: str) -> None:
    with pytest.raises(ValueError, match=r"hex|16 bytes"):
        orders.parse_key(text)


@pytest.fixture
async def stolen(nats: LiveFabric) -> AsyncIterator[StolenNats]:
    """Another node of the same pool."""
    raw = await StolenNats.open(nats.server.port, nats.credentials["worker-a-n2"])
    yield raw
    await raw.close()


@pytest.fixture
async def running(nats: LiveFabric) -> AsyncIterator[NatsDelivery]:
    """A request that a worker has begun to answer, and whose reader has not read anything yet."""
    gateway, worker = await nats.gateway(), await nats.worker("a")
    dispatch = await gateway.dispatch(new_work("a"))
    delivery = await worker.pull()
    await delivery.send(FrameKind.DATA, bytes(CREDIT))
    yield delivery
    assert not delivery.cancelled.is_set()
    await dispatch.cancel()
    async with asyncio.timeout(15):
        await delivery.cancelled.wait()
    await delivery.drop()
    await worker.close()
    await gateway.close()


async def test_no_answer_of_jetstream_s_is_an_order(running: NatsDelivery, stolen: StolenNats) -> None:
    """Whoever may ask JetStream anything chooses the subject of the answer. The server writes there with its own authority."""
    request = running.work.request_id
    stolen.say(f"SUB cancel.a.{request} 1\r\nSUB credit.a.{request} 2\r\n".encode())
    await stolen.ask(f"$KV.claims_a.{request}", b"262144")
    for target in (subjects.cancel("a", request), subjects.credit("a", request)):
        stolen.publish(f"{subjects.API}.DIRECT.GET.KV_claims_a.$KV.claims_a.{request}", reply=target)
        stolen.publish(f"{subjects.API}.DIRECT.GET.KV_trust.$KV.trust.manifest", reply=target)
        stolen.publish(f"$KV.claims_a.{request}", b"again", reply=target)
        stolen.publish(NEXT, json.dumps({"batch": 1, "no_wait": True}).encode(), reply=target)
    heard: list[str] = []
    async with asyncio.timeout(15):
        while len(heard) < 8:  # NATS does send it there
            heard += [subject for subject, _ in await stolen.settle()]
    sending = asyncio.ensure_future(running.send(FrameKind.DATA, b"more"))
    await asyncio.sleep(0.2)
    assert not running.cancelled.is_set()
    assert not sending.done(), "credit was renewed by somebody else"
    sending.cancel()


async def test_no_other_gateway_cancels_it(nats: LiveFabric, running: NatsDelivery, stolen: StolenNats) -> None:
    """Neither of itself, nor told to by a frame for a request that it does not know."""
    request = running.work.request_id
    other = await nats.gateway("g2")
    await other.tell(subjects.cancel("a", request))
    headers = {"A": "f" * 32, "S": "0", "K": "data"}
    stolen.publish(subjects.reply("a", "g2", request), b"x", headers=headers)
    stolen.publish(subjects.reply("a", "g1", request), b"x", headers=headers)
    await stolen.settle()
    await asyncio.sleep(0.2)
    assert not running.cancelled.is_set()
    await other.close()


async def test_no_answer_of_jetstream_s_is_a_colleague_s_presence(nats: LiveFabric, stolen: StolenNats) -> None:
    """A node may say what it likes of itself, and of no other, also where a bucket keeps it word for word."""
    gateway, provisioner = await nats.gateway(), await nats.connect("provisioner")
    call = RollCall()
    await provisioner.client.subscribe("presence.a.*.*", cb=call.hear)
    await provisioner.round_trip()
    said = json.dumps({"models": ["m1"], "busy": 0, "free": 9, "keys": ["k"]}).encode()
    await stolen.ask("$KV.claims_a.presence", said)
    for node in ("n1", "n9"):
        stolen.publish(f"presence.a.lacre.{node}", said)
        target = f"presence.a.lacre.{node}"
        stolen.publish(f"{subjects.API}.DIRECT.GET.KV_claims_a.$KV.claims_a.presence", reply=target)
    await stolen.settle()
    await asyncio.sleep(0.2)
    assert (gateway.workers("a", "m1"), call.holders()) == (0, {})
    stolen.publish("presence.a.lacre.n2", said)
    await stolen.settle()
    await asyncio.sleep(0.2)
    assert (gateway.workers("a", "m1"), call.holders()) == (1, {"n2": frozenset({"k"})})
    await gateway.close()
    await provisioner.close()
