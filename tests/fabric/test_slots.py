"""How much of a worker is taken, by model."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lacre_fabric.work.presence import MAX_SLOTS, Presence, Roster
from lacre_fabric.work.slots import Slots, shares


def test_a_model_has_its_own_slots() -> None:
    slots = Slots(5, ["a", "b"], {"a": 2, "b": 3})
    for number in range(2):
        assert slots.may_pull("a")
        slots.take(f"a{number}", "a")
    assert (slots.may_pull("a"), slots.may_pull("b")) == (False, True)
    assert (slots.busy, slots.free("a"), slots.free("b")) == (2, 0, 3)


def test_one_models_weight_is_not_another_s() -> None:
    slots = Slots(5, ["a", "b"], {"a": 2, "b": 3})
    slots.take("heavy", "a")
    slots.weigh("heavy", 128)
    assert (slots.busy, slots.free("a"), slots.free("b")) == (2, 0, 3)
    slots.weigh("heavy", 1)
    assert slots.free("a") == 1


def test_models_that_share_all_slots() -> None:
    """Those of an upstream: as many as there are, whichever model they are of."""
    slots = Slots(2, ["a", "b"])
    slots.take("1", "a")
    slots.take("2", "a")
    assert (slots.free("a"), slots.free("b"), slots.may_pull("b")) == (0, 0, False)


def test_waiting_pulls_hold_the_last_slot() -> None:
    slots = Slots(1, ["a", "b"])
    slots.pull("a")
    assert not slots.may_pull("b")
    slots.pulled("a")
    assert slots.may_pull("b")


def test_what_is_given_back_counts_no_more() -> None:
    slots = Slots(2, ["a"])
    slots.take("1", "a")
    slots.weigh("1", None)
    assert not slots.may_pull("a")
    slots.give("1")
    slots.give("1")
    slots.weigh("1", 16)
    assert (slots.may_pull("a"), slots.busy) == (True, 0)


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
