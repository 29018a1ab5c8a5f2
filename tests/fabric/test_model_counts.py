"""The counts in workers' presence: read or ignored, and summed over workers that start, end, and tell odd things."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lacre_fabric.work.model_counts import FIRST_OUTPUT, MAX_COUNT, MAX_COUNTED, MAX_SUMS, ModelCounts, ModelSums
from lacre_fabric.work.presence import MAX_MODEL, Presence, Roster

PLACES = len(FIRST_OUTPUT) + 1
ONE = ModelCounts(2, 100, 40, 7, (0, 1, *(0,) * (PLACES - 3), 2), 21.5)


def presence(counts: Any, models: tuple[str, ...] = ("m",)) -> bytes:
    return json.dumps({"models": models, "busy": 1, "free": 1, "counts": counts}).encode()


def test_counts_come_through_a_presence_message() -> None:
    said = presence({"m": ONE.encode(), "away now": ModelCounts().encode()})
    assert Presence.parse(said).counts == {"m": ONE, "away now": ModelCounts()}
    assert len(json.dumps(ModelCounts(1, 10**9, 10**9, 10**9, (10**6,) * PLACES, 1e9).encode())) < 400, (
        "of one model; a message has room for all that are counted"
    )


@pytest.mark.parametrize(
    "wrong",
    [
        None, 7, [], "m", {"m": 7}, {"m": {}},
        {"m": {**ONE.encode(), "prompt": -1}}, {"m": {**ONE.encode(), "prompt": MAX_COUNT + 1}},
        {"m": {**ONE.encode(), "seconds": 1e300}}, {"m": {**ONE.encode(), "seconds": "1"}},
        {"m": {**ONE.encode(), "first_output": {"17": 1}}}, {"m": {**ONE.encode(), "first_output": {"x": 1}}},
        {"m": {**ONE.encode(), "first_output": {"0": 1.5}}}, {"m": {**ONE.encode(), "first_output": {"0": MAX_COUNT + 1}}},
        {"m" * (MAX_MODEL + 1): ONE.encode()}, {f"m{i}": ONE.encode() for i in range(MAX_COUNTED + 1)},
    ],
    ids=str,
)  # fmt: skip
def test_counts_of_another_form_keep_no_worker_away(wrong: Any) -> None:
    said = Presence.parse(presence(wrong))
    assert (said.models, said.busy, said.counts) == (frozenset({"m"}), 1, {})


def grown(by: int) -> ModelCounts:
    return replace(ONE, prompt=ONE.prompt + by, cached=ONE.cached + by, generated=ONE.generated + by)


def test_sums_are_of_what_was_added_since_the_gateway_knows_the_worker() -> None:
    sums = ModelSums()
    sums.hear("r", "a", {"m": ONE})  # ran before this gateway did
    assert sums.total() == {("r", "m"): ModelCounts(running=2)}
    sums.hear("r", "a", {"m": grown(5)})
    sums.hear("r", "b", {})
    sums.hear("r", "b", {"m": ModelCounts(1, 3, 2, 1)})  # began to work under our eyes
    assert sums.total()["r", "m"] == replace(ModelCounts(3, 8, 7, 6), seconds=0.0)


def test_a_worker_that_started_again_adds_its_new_work() -> None:
    sums = ModelSums()
    sums.hear("r", "a", {"m": ONE})
    sums.hear("r", "a", {"m": ModelCounts(1, 3, 2, 1)})
    assert sums.total()["r", "m"] == ModelCounts(1, 3, 2, 1)


def test_a_message_without_counts_is_no_new_start() -> None:
    sums = ModelSums()
    for counts in ({}, {"m": ONE}, {}, {"m": ONE}):
        sums.hear("r", "a", counts)
    assert sums.total()["r", "m"] == ONE


def test_what_a_worker_did_stays_when_it_leaves() -> None:
    sums = ModelSums()
    sums.hear("r", "a", {})
    sums.hear("r", "a", {"m": ONE})
    sums.forget("r", "a")
    assert sums.total()["r", "m"] == replace(ONE, running=0)
    sums.hear("r", "a", {"m": grown(1)})  # it was only silent for a while: what it did meanwhile is not known
    assert sums.total()["r", "m"] == replace(ONE, running=2)


def test_names_that_workers_invent_are_bounded() -> None:
    sums = ModelSums()
    for number in range(MAX_SUMS // MAX_COUNTED + 10):
        sums.hear("r", "a", {f"{number}-{i}": ONE for i in range(MAX_COUNTED)})
    assert len(sums.total()) == MAX_SUMS


def test_a_roster_counts_its_live_workers() -> None:
    roster = Roster()
    assert roster.hear("r", "a", Presence.parse(presence({})))
    assert roster.hear("r", "a", Presence.parse(presence({"m": ONE.encode()})))
    assert roster.counts() == {("r", "m"): ONE}


COUNTS = st.builds(
    ModelCounts, *(st.integers(0, 50) for _ in range(4)), st.tuples(*(st.integers(0, 9) for _ in range(PLACES))),
    st.integers(0, 99).map(float),
)  # fmt: skip


@given(st.lists(st.tuples(st.sampled_from("ab"), st.one_of(st.none(), COUNTS)), max_size=12))
def test_no_sum_ever_falls(said: list[tuple[str, ModelCounts | None]]) -> None:
    """Whatever workers tell, and however they come and go: a counter that fell would look like a gateway's restart."""
    sums, before = ModelSums(), ModelCounts()
    for node, counts in said:
        if counts is None:
            sums.forget("r", node)
        else:
            sums.hear("r", node, {"m": counts})
        now = sums.total().get(("r", "m"), ModelCounts())
        assert now.since(before) == now.plus(before, -1)
        before = now
