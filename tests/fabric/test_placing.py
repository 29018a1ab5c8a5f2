"""Where a request goes when there are several regions, and how much of a worker is taken: without servers."""

from __future__ import annotations

import itertools
from dataclasses import replace
from typing import Any, Final

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lacre.errors import SettingsError
from lacre_fabric.nats import roles, streams, subjects
from lacre_fabric.nats.accounts import accounts
from lacre_fabric.nats.model_queue import MISSING_AFTER, NO_ANSWER, NO_QUEUE, ModelQueue
from lacre_fabric.nats.regions import Sent, in_order
from lacre_fabric.nats.roles import Credential
from lacre_fabric.work.contract import BEAT, PRESENT_FOR
from lacre_fabric.work.presence import MAX_SLOTS, Presence, Roster
from lacre_fabric.work.slots import Slots, shares

NO_PULL: Any = None  # a queue's state needs no connection

# Regions


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
    anybody = Credential.new("x")
    for name in ("us_east", "US", "", "-us", "u.s", "*", "x" * 32):
        for make in (
            lambda region: streams.streams(["a"], 1, [region]),
            lambda region: roles.worker(anybody, "a", "n1", region),
            lambda region: roles.gateway(anybody, "g1", ["a"], [region]),
        ):
            with pytest.raises(SettingsError, match="region"):
                make(name)
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


def test_workers_import_no_stream() -> None:
    """They subscribe for each request, and nats-server crashes over that while it reads accounts."""
    everybody = [
        roles.worker(Credential.new("worker-a"), "a", None),
        roles.worker(Credential.new("worker-b"), "b", None),
        roles.gateway(Credential.new("gateway-g1"), "g1", ["a", "b"]),
        roles.provisioner(Credential.new("provisioner")),
    ]
    made = accounts(everybody)
    for pool in ("a", "b"):
        workers = made[roles.workers_account(pool)]
        assert all(list(entry) != ["stream"] for entry in workers["imports"])
        assert {f"{kind}.{pool}.*" for kind in roles.TOLD_TO_WORKERS} <= {entry.get("service") for entry in workers["exports"]}


# Model queues


def test_a_queue_that_never_answered_is_missing_at_once() -> None:
    queue = ModelQueue("m1", pull=NO_PULL)
    assert queue.there
    queue.silent(100.0)
    assert (queue.there, queue.pause) == (False, NO_QUEUE)
    queue.answered()
    assert queue.there


def test_a_queue_that_answered_is_missing_after_a_while() -> None:
    queue = ModelQueue("m1", pull=NO_PULL)
    for began in (100.0, 200.0):
        queue.answered()
        for now in (began, began + MISSING_AFTER / 2, began + MISSING_AFTER - 0.1):
            queue.silent(now)
            assert (queue.there, queue.pause) == (True, NO_ANSWER)
        queue.silent(began + MISSING_AFTER)
        assert (queue.there, queue.pause) == (False, NO_QUEUE)


# Slots


FIVE: Final = (5, ["a", "b"], {"a": 2, "b": 3})


@pytest.mark.parametrize(
    ("slots", "taken", "free", "may_pull"),
    [
        (FIVE, [("a0", "a", 1)], {"a": 1, "b": 3}, ["a", "b"]),
        (FIVE, [("a0", "a", 1), ("a1", "a", 1)], {"a": 0, "b": 3}, ["b"]),
        (FIVE, [("heavy", "a", 128)], {"a": 0, "b": 3}, ["b"]),
        ((2, ["a", "b"]), [("1", "a", 1), ("2", "a", 1)], {"a": 0, "b": 0}, []),
        ((2, ["a"]), [("1", "a", None)], {"a": 1}, []),
    ],
    ids=["one", "all of a model's own", "one model's weight", "of an upstream: all are shared", "of unknown weight"],
)
def test_what_is_taken(slots: tuple[Any, ...], taken: list[Any], free: dict[str, int], may_pull: list[str]) -> None:
    held = Slots(*slots)
    for name, model, sequences in taken:
        held.take(name, model)
        held.weigh(name, sequences)
    assert ({model: held.free(model) for model in free}, [model for model in free if held.may_pull(model)]) == (free, may_pull)
    for name, _, _ in taken:
        held.weigh(name, 1)
        held.give(name)
        held.give(name)
        held.weigh(name, 16)  # too late to mean anything
    assert held.busy == 0
    assert all(map(held.may_pull, free))


def test_waiting_pulls_hold_the_last_slot() -> None:
    slots = Slots(1, ["a", "b"])
    slots.pull("a")
    assert not slots.may_pull("b")
    slots.pulled("a")
    assert slots.may_pull("b")


def test_models_that_share_slots() -> None:
    """An adapter's requests take its base's slots, and none of another model's."""
    slots = Slots(6, ["a", "b", "a:x", "a:y"], {"a": 2, "b": 4}, {"a:x": "a", "a:y": "a"})
    assert not slots.roomy(["a", "b", "a:x", "a:y"]), "three pulls would wait for two slots"
    assert slots.roomy(["a", "b", "a:x"])
    slots.pull("a:y")
    assert slots.may_pull("a")
    slots.take("1", "a:x")
    assert not slots.may_pull("a"), "of two slots, one is taken and a pull waits for the other"
    slots.pulled("a:y")
    slots.weigh("1", None)
    assert not slots.may_pull("a")
    assert slots.may_pull("b")
    slots.weigh("1", 16)
    assert [slots.free(model) for model in ("a", "a:x", "a:y", "b")] == [0, 0, 0, 4]
    assert slots.busy == 2
    slots.give("1")
    assert [slots.free(model) for model in ("a", "a:x", "a:y", "b")] == [2, 2, 2, 4]


@pytest.mark.parametrize(
    ("total", "wanted", "given"),
    [
        (16, {"a": 8, "b": 8}, {"a": 8, "b": 8}),
        (32, {"a": 8, "b": 8}, {"a": 16, "b": 16}),  # the operator wants some to wait at the engines
        (4, {"a": 8, "b": 8}, {"a": 2, "b": 2}),  # and here, that they run at most four
        (9, {"a": 8, "b": 1}, {"a": 8, "b": 1}),
        (2, {"a": 8, "b": 1, "c": 1}, {"a": 1, "b": 1, "c": 1}),
        (64, {"a": 8}, {"a": 64}),
    ],
)
def test_shares(total: int, wanted: dict[str, int], given: dict[str, int]) -> None:
    assert shares(total, wanted) == given


@given(st.lists(st.tuples(st.sampled_from("abc"), st.sampled_from([None, 1, 2, 16])), max_size=40))
def test_one_models_requests_never_take_anothers(requests: list[tuple[str, int | None]]) -> None:
    each = {"a": 1, "b": 4, "c": 8}
    slots, names = Slots(13, list(each), each), itertools.count()
    for model, sequences in requests:
        if slots.may_pull(model):
            name = str(next(names))
            slots.take(name, model)
            slots.weigh(name, sequences)
        for other, own in each.items():
            if all(model != other for model, _ in requests):
                assert slots.free(other) == own
        assert 0 <= slots.busy <= 13


def test_presence_says_what_is_free_for_each_model() -> None:
    said = b'{"models":["a","b"],"busy":2,"free":3,"room":{"a":0,"b":3,"unheard":9}}'
    presence = Presence.parse(said)
    assert [presence.free_for(model) for model in ("a", "b")] == [0, 3]
    roster = Roster()
    roster.hear("r", "n1", presence)
    roster.hear("r", "n2", Presence.parse(b'{"models":["a"],"busy":1,"free":4}'))  # one of before
    assert (roster.free("a"), roster.free("b")) == ({"r": 4}, {"r": 3})
    greedy = Presence.parse(b'{"models":["a"],"busy":0,"free":4,"room":{"a":%d}}' % 10**30)
    assert greedy.free_for("a") == 4 <= MAX_SLOTS


PRESENCES = st.builds(
    Presence,
    models=st.frozensets(st.sampled_from("ab")),
    busy=st.integers(0, 3),
    free=st.integers(0, 3),
    room=st.dictionaries(st.sampled_from("ab"), st.integers(0, 3)),
)
HEARD = st.tuples(st.sampled_from(["here", "there"]), st.sampled_from("nm"), PRESENCES)


@given(st.lists(st.one_of(HEARD, st.floats(0, PRESENT_FOR)), max_size=20))
def test_free_slots_are_those_of_the_last_word(said: list[tuple[str, str, Presence] | float]) -> None:
    """However workers come, change their minds and fall silent, and however often one asks."""
    now = [0.0]
    roster = Roster(lambda: now[0])
    for each in said:
        if isinstance(each, float):
            now[0] += each
        else:
            roster.hear(*each)
        for model in "abc":
            wanted: dict[str, int] = {}
            for (region, _), presence in roster.live().items():
                if model in presence.models:
                    wanted[region] = wanted.get(region, 0) + presence.free_for(model)
            assert roster.free(model) == roster.free(model) == wanted


@pytest.mark.parametrize("changed", [{"free": 1}, {"models": frozenset("b")}, {"room": {"a": 0}}])
def test_free_slots_follow_each_part_of_a_presence(changed: dict[str, Any]) -> None:
    roster, before = Roster(), Presence(models=frozenset("a"), busy=0, free=2, room={"a": 2})
    for said in (before, replace(before, **changed)):
        roster.hear("r", "n", said)
        found = roster.free("a")
    assert found != {"r": 2}
    alone = Roster()
    alone.hear("r", "n", replace(before, **changed))
    assert found == alone.free("a")
