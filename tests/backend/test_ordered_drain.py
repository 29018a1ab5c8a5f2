"""Which orders a worker obeys: signed by a gateway, for this worker, newer than the last one. And what it says then."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Iterator
from typing import Any

import pytest
import structlog.testing
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from lacre.jose import jws
from lacre.jose.jws import raw_public_key
from lacre.trust.manifest import Manifest
from lacre_backend.node.ordered_drain import OrderedDrain
from lacre_fabric.work import grants
from lacre_fabric.work.drain_orders import LIVES, MAX_BYTES, TYP, DrainOrder
from lacre_fabric.work.grants import MAX_SKEW

NOW = 1_800_000_000.0
GATEWAY, OLDER, STRANGER = (Ed25519PrivateKey.generate() for _ in range(3))
MANIFEST = Manifest(
    "x", 1, NOW - 60, NOW + 600, raw_public_key(GATEWAY), {}, other_gateway_keys=(raw_public_key(OLDER),)
)  # fmt: skip


class Worker:
    """Of the pool `a`, with the name n1."""

    def __init__(self, manifest: Manifest = MANIFEST) -> None:
        self.now = NOW
        self.manifest = manifest
        self.ordered = OrderedDrain(lambda: self.manifest, "a", "lacre", "n1", lambda: self.now)

    @property
    def drained(self) -> bool:
        return self.ordered.reason() is not None

    def told(self, key: Ed25519PrivateKey = GATEWAY, **members: Any) -> bool:
        return self.ordered.obey(order(**members).sign(key).encode())


def order(**members: Any) -> DrainOrder:
    return dataclasses.replace(DrainOrder("0" * 32, NOW, NOW + LIVES, "a", "lacre", "n1", True), **members)


@pytest.fixture
def worker() -> Worker:
    return Worker()


@pytest.fixture
def log() -> Iterator[list[Any]]:
    with structlog.testing.capture_logs() as lines:
        yield lines


@pytest.mark.parametrize("key", [GATEWAY, OLDER])
def test_it_drains_and_takes_work_again(worker: Worker, log: list[Any], key: Ed25519PrivateKey) -> None:
    assert worker.told(key)
    reason = worker.ordered.reason()
    assert reason is not None and reason.kind == "drained" and reason.model is None
    assert "resume-worker" in reason.remedy
    assert worker.told(key, drain=False, iat=NOW + 1, request_id="1" * 32)
    assert not worker.drained
    assert [(line["event"], line["request_id"]) for line in log] == [
        ("worker.drained", "0" * 32), ("worker.resumed", "1" * 32)
    ]  # fmt: skip


def test_the_same_order_changes_nothing(worker: Worker) -> None:
    assert worker.told()
    assert not worker.told(iat=NOW + 1), "it is drained already"
    assert worker.drained


@pytest.mark.parametrize(
    ("members", "kind"),
    [
        ({"node": "n2"}, "another worker's"), ({"pool": "b"}, "another worker's"), ({"region": "eu"}, "another worker's"),
        ({"exp": NOW}, "Expired"), ({"iat": NOW + MAX_SKEW + 1, "exp": NOW + MAX_SKEW + 2}, "Expired"),
        ({"exp": NOW + LIVES + 1}, "Expired"), ({"request_id": "../x"}, "InvalidMessage"),
        ({"node": "n" * MAX_BYTES}, "InvalidMessage"),
    ],
)  # fmt: skip
def test_orders_that_do_not_count(worker: Worker, log: list[Any], members: dict[str, Any], kind: str) -> None:
    assert not worker.told(**members)
    assert not worker.drained
    assert [(line["event"], line["kind"]) for line in log] == [("order.refused", kind)]


def test_who_may_not_sign(worker: Worker) -> None:
    assert not worker.told(STRANGER)
    signed = order().sign(GATEWAY)
    for other in (signed[:-4] + "AAAA", signed.replace(".", "", 1), "", "x", "a.b.c", "\N{SNOWMAN}"):
        assert not worker.ordered.obey(other.encode()), other
    assert not worker.ordered.obey(b"\xff\xfe")
    assert not worker.drained


def test_a_grant_is_no_order_and_an_order_no_grant(worker: Worker) -> None:
    """One key signs both."""
    members = order().members()
    assert not worker.ordered.obey(jws.sign(members, GATEWAY, grants.TYP).encode())
    assert worker.ordered.obey(jws.sign(members, GATEWAY, TYP).encode())


def test_an_older_order_is_not_obeyed_again(worker: Worker) -> None:
    """Who saw an order cannot send it once more after it was undone, within its life."""
    seen = order().sign(GATEWAY).encode()
    assert worker.ordered.obey(seen)
    assert worker.told(drain=False, iat=NOW + 1)
    worker.now = NOW + 2
    assert not worker.ordered.obey(seen)
    assert not worker.told(iat=NOW + 1)
    assert not worker.drained
    assert worker.told(iat=NOW + 2)


def test_not_without_a_valid_manifest(worker: Worker) -> None:
    worker.manifest = dataclasses.replace(MANIFEST, expires_at=NOW)
    assert not worker.told()
    worker.manifest = dataclasses.replace(MANIFEST, gateway_key=raw_public_key(STRANGER), other_gateway_keys=())
    assert not worker.told()
    assert not worker.drained


def test_refusals_do_not_fill_the_log(worker: Worker, log: list[Any]) -> None:
    for _ in range(100):
        worker.told(STRANGER)
    assert len(log) == 1
    worker.now += 20
    worker.told(STRANGER)
    assert len(log) == 2


def test_its_clock_is_the_usual_one() -> None:
    manifest = dataclasses.replace(MANIFEST, expires_at=time.time() + 60)
    ordered = OrderedDrain(lambda: manifest, "a", "lacre", "n1")
    now = time.time()
    assert ordered.obey(order(iat=now, exp=now + LIVES).sign(GATEWAY).encode())
