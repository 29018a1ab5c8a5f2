"""Prompt lookup, and how many guesses are worth their cost: both without a model."""

from __future__ import annotations

from array import array
from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lacre_backend.engine.drafting import MAX_DRAFT, Wanted
from lacre_backend.engine.gain import LASTING, Gain, Offer
from lacre_backend.engine.lookup import LEAST_MATCH, MOST_MATCH, Lookup, continuation
from lacre_backend.engine.tokens import Tokens


def by_hand(tokens: list[int], most: int) -> list[int]:
    """The same, one position after another."""
    best: tuple[int, int] | None = None  # length of the match, and where it ended
    for end in range(LEAST_MATCH, len(tokens)):
        length = 0
        while length < min(end, MOST_MATCH) and tokens[end - 1 - length] == tokens[-1 - length]:
            length += 1
        if length >= LEAST_MATCH and (best is None or length >= best[0]):
            best = length, end
    if best is None:
        return []
    found = list(tokens)
    for i in range(most):
        found.append(found[best[1] + i])
    return found[len(tokens) :]


@given(st.lists(st.integers(0, 3), max_size=60), st.integers(1, MAX_DRAFT))
def test_it_copies_what_followed_the_longest_and_latest_match(tokens: list[int], most: int) -> None:
    assert continuation(array("q", tokens), most) == by_hand(tokens, most)


def test_a_repetition_is_continued_and_the_answer_can_grow() -> None:
    tokens = Tokens([1, 2, 3, 4, 1, 2, 3, 4, 1, 2, 3, 4])
    assert Lookup().draft([Wanted("a", tokens, 6, able=True), Wanted("b", Tokens([5] * 2), 6, able=True)]) == {
        "a": [1, 2, 3, 4, 1, 2]
    }
    tokens.append(1)  # an array that something still looks into could not
    assert continuation(tokens.all, 0) == []


def measured(seconds: Callable[[int], float], *, even: bool = False, most: int = 64, rows: int = 130) -> Gain:
    gain = Gain(most, even=even)
    for n in [*range(1, rows)] * 2:
        gain.observe(n, seconds(n))
    return gain


def gpu(rows: int) -> float:
    """A step that takes as long for 64 tokens as for one: the weights are read once."""
    return 0.01 + 0.00001 * rows


def cpu(rows: int) -> float:
    return 0.008 * rows


@pytest.mark.parametrize("even", [False, True], ids=["unified", "split"])
def test_guesses_are_checked_where_steps_cost_no_more_for_them(even: bool) -> None:
    offers = [Offer(0.8, MAX_DRAFT)]
    assert measured(cpu, even=even).allot(offers) == [0]
    assert 6 <= measured(gpu, even=even).allot(offers)[0] <= MAX_DRAFT
    assert measured(gpu, even=even).allot([Offer(0.1, MAX_DRAFT)])[0] <= 2
    assert measured(gpu, even=even).allot([Offer(0.8, 0)]) == [0]


def test_a_drafts_own_time_counts() -> None:
    offers = [Offer(0.8, MAX_DRAFT)]
    free, dear = measured(gpu).allot(offers)[0], measured(gpu).allot(offers, each=0.002)[0]
    assert 0 < dear < free
    assert measured(gpu).allot(offers, each=0.02) == [0]


@pytest.mark.parametrize("even", [False, True], ids=["unified", "split"])
def test_many_running_tasks_leave_no_room(even: bool) -> None:
    """Where a step's cost grows once the processor is full, at 16 rows."""
    gain = measured(lambda rows: 0.01 * max(1.0, rows / 16), even=even)
    for n in (1, 2, 4, 8, 16, 32, 64, 65):
        numbers = gain.allot([Offer(0.7, MAX_DRAFT)] * n)
        assert n + sum(numbers) <= max(16, n)
        assert (sum(numbers) > 0) == (n <= 8)


def test_the_best_guesses_come_first() -> None:
    numbers = measured(gpu, most=10).allot([Offer(0.9, MAX_DRAFT), Offer(0.3, MAX_DRAFT), Offer(0.9, 2)])
    assert numbers[2] == 2
    assert numbers[0] > numbers[1]
    assert sum(numbers) <= 10
    numbers = measured(gpu, even=True).allot([Offer(0.9, 5), Offer(0.9, 0)])
    assert numbers == [numbers[0]] * 2, "a cache for each: all sequences of a step are equally long"


def test_the_step_without_guesses_is_measured_first_and_the_others_are_tried() -> None:
    gain, offers = Gain(64, even=False), [Offer(0.9, MAX_DRAFT)]
    for _ in range(2):
        assert gain.allot(offers) == [0]
        gain.observe(1, 0.01)
    assert gain.allot(offers) == [MAX_DRAFT]
    gain.observe(1 + MAX_DRAFT, 5.0)  # llama.cpp planned its memory
    gain.observe(1 + MAX_DRAFT, 0.011)
    assert gain.allot(offers)[0] > 10
    for _ in range(60):
        gain.observe(1 + MAX_DRAFT, 0.2)
    assert gain.allot(offers)[0] < 10


def test_measurements_expire() -> None:
    gain, offers = measured(cpu), [Offer(0.9, MAX_DRAFT)]
    assert gain.allot(offers) == [0]
    for _ in range(2 * LASTING):
        gain.observe(1, cpu(1))
    assert gain.allot(offers) == [MAX_DRAFT], "what was too dear then may not be now"
