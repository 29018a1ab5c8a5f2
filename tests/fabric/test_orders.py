"""What a gateway tells a running request is proven: nobody else of the pool can say it, however it is sent."""

from __future__ import annotations

import asyncio
import json

import pytest

from lacre_fabric.nats import orders, subjects
from lacre_fabric.nats.key_holders import RollCall
from lacre_fabric.nats.orders import OrderKeys
from parts.fabric import Parties, until

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


async def test_no_answer_of_jetstream_s_is_a_colleague_s_presence(parties: Parties) -> None:
    """A node may say what it likes of itself, and of no other, also where a bucket keeps it word for word."""
    gateway, provisioner, stolen = await parties.gateway(), await parties.connect(), await parties.stolen("worker-a-n2")
    call = RollCall()
    await provisioner.client.subscribe("presence.a.*.*", cb=call.hear)
    await provisioner.round_trip()
    said = json.dumps({"models": ["m1"], "busy": 0, "free": 9, "keys": ["k"]}).encode()
    await stolen.ask("$KV.claims_a.presence", said)
    for node in ("n1", "n9"):
        stolen.publish(f"presence.a.lacre.{node}", said)
        stolen.publish(f"{subjects.API}.DIRECT.GET.KV_claims_a.$KV.claims_a.presence", reply=f"presence.a.lacre.{node}")
    await stolen.settle()
    await asyncio.sleep(0.2)
    assert (gateway.workers("a", "m1"), call.holders()) == (0, {})
    stolen.publish("presence.a.lacre.n2", said)
    await stolen.settle()
    await until(call.holders)
    await until(lambda: gateway.workers("a", "m1") == 1)
    assert call.holders() == {"n2": frozenset({"k"})}
