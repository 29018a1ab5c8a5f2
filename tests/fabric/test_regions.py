"""Where a request goes when there are several regions: the choice alone, without servers."""

from __future__ import annotations

import pytest

from lacre.errors import SettingsError
from lacre_fabric.nats import roles, streams, subjects
from lacre_fabric.nats.accounts import accounts
from lacre_fabric.nats.regions import Sent, in_order
from lacre_fabric.nats.roles import Credential
from lacre_fabric.work.contract import BEAT


@pytest.mark.parametrize(
    ("free", "tried"),
    [
        ({"eu": 1, "us": 9, "ap": 3}, ["eu", "us", "ap"]),
        ({"eu": 0, "us": 1, "ap": 3}, ["ap", "us", "eu"]),
        ({"eu": 0, "us": 0, "ap": 0}, ["eu", "ap", "us"]),
        ({"eu": -5, "us": 0, "ap": -2}, ["eu", "us", "ap"]),
        ({"us": 0, "ap": 2}, ["ap", "us"]),
        ({"us": 0, "ap": 0}, ["ap", "us"]),
        ({}, []),
    ],
    ids=["own first", "most free", "own queue", "own queue however long", "nobody here", "nobody here and all busy", "nobody"],
)
def test_the_order_of_regions(free: dict[str, int], tried: list[str]) -> None:
    assert in_order("eu", free) == tried
    assert in_order("eu", dict(reversed(free.items()))) == tried


def test_what_was_sent_counts_until_presence_tells_of_it() -> None:
    sent = Sent()
    for number in range(3):
        sent.add("a", "eu", f"r{number}", 10.0 + number / 10)
    assert (sent.count("a", "eu", 10.5), sent.count("a", "us", 10.5), sent.count("b", "eu", 10.5)) == (3, 0, 0)
    sent.forget("a", "eu", "r1")
    sent.forget("a", "us", "r2")
    assert sent.count("a", "eu", 10.5) == 2
    assert sent.count("a", "eu", 10.1 + BEAT) == 1
    assert sent.count("a", "eu", 10.2 + BEAT) == 0


def test_a_queue_is_of_one_pool_and_one_region() -> None:
    """However the names are: a pool's may have the `_` that stands between them, a region's may not."""
    for name in ("us_east", "US", "", "-us", "u.s", "*", "x" * 32):
        with pytest.raises(SettingsError, match="region"):
            streams.streams(["a"], 1, [name])
        with pytest.raises(SettingsError, match="region"):
            roles.worker(Credential.new("w"), "a", "n1", name)
        with pytest.raises(SettingsError, match="region"):
            roles.gateway(Credential.new("g"), "g1", ["a"], [name])
    names = {subjects.work_stream(pool, region) for pool in ("a", "a_us", "a_us_us") for region in ("us", "us-us")}
    assert len(names) == 6


def test_home_and_queues_have_their_places() -> None:
    placed = {stream.name: stream.placement.cluster for stream in streams.streams(["a"], 3, ["eu", "us"]) if stream.placement}
    home = dict.fromkeys(("KV_trust", "KV_revocations", "KV_budgets", "KV_claims_a"), "eu")
    assert placed == home | {"WORK_a_eu": "eu", "WORK_a_us": "us"}
    assert not any(stream.placement for stream in streams.streams(["a"], 3))


def test_a_credential_is_of_one_region() -> None:
    """What a worker asks of JetStream names its own region's queue alone; its account has those of all."""
    us = roles.worker(Credential.new("us"), "a", None, "us")
    assert not [subject for subject in us.publish if "eu" in subject]
    assert f"{subjects.API}.CONSUMER.MSG.NEXT.WORK_a_us.*" in us.publish
    made = accounts([us, roles.worker(Credential.new("eu"), "a", None, "eu")])[roles.workers_account("a")]
    asked = [entry["to"] for entry in made["imports"] if "to" in entry]
    assert len(asked) == len(set(asked))
    assert {f"{subjects.API}.CONSUMER.MSG.NEXT.WORK_a_{region}.*" for region in ("eu", "us")} <= set(asked)
