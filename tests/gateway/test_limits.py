"""Requests under way in one process: what it grants at once, what it gives back, and what it forgets."""

from __future__ import annotations

import gc
import weakref
from contextlib import ExitStack, suppress

import pytest

from lacre_gateway.budget.in_flight import BodyBytes, LimitExceeded, RequestLimits, Reservation


def test_slots_of_one_subject_and_of_all() -> None:
    machine = RequestLimits(in_flight=2, concurrent=1)
    with machine.slot("a"):
        with pytest.raises(LimitExceeded) as own, machine.slot("a"):
            pass
        assert own.value.own
        with machine.slot("b"):
            with pytest.raises(LimitExceeded) as all_, machine.slot("c"):
                pass
            assert not all_.value.own
    with machine.slot("a"):
        pass


class Subject:
    """A caller as a weak reference sees it: gone once nobody keeps it."""


def test_those_at_rest_are_forgotten() -> None:
    machine, budget = RequestLimits(in_flight=2, concurrent=1), BodyBytes(total=10, each=5)
    busy, served, refused = Subject(), Subject(), Subject()
    seen = {name: weakref.ref(each) for name, each in {"busy": busy, "served": served, "refused": refused}.items()}
    with machine.slot(busy), budget.room(busy) as kept:
        kept.take(5)
        with machine.slot(served), budget.room(served) as room:
            room.take(5)
            with suppress(LimitExceeded), machine.slot(refused):
                raise AssertionError("two are under way")
            with suppress(LimitExceeded):
                budget.check(refused, 1)
        del room, kept, busy, served, refused
        gc.collect()  # a refusal's traceback holds its frames
        assert [name for name, each in seen.items() if each() is not None] == ["busy"]
    gc.collect()
    assert seen["busy"]() is None


@pytest.mark.parametrize(("prompt", "completion", "covered"), [(10, 20, True), (11, 0, False), (0, 21, False), (0, 0, True)])
def test_reservation_covers(prompt: int, completion: int, covered: bool) -> None:
    assert Reservation(10, 20).covers(prompt, completion) is covered


def test_bytes_of_one_caller_and_of_all() -> None:
    budget = BodyBytes(total=100, each=40)
    with budget.room("a") as first, budget.room("a") as second, budget.room("b") as other:
        first.take(30)
        second.take(10)
        with pytest.raises(LimitExceeded) as own:
            second.take(1)
        assert own.value.own
        other.take(30)
        with pytest.raises(LimitExceeded) as of_all:
            other.check(1)
        assert not of_all.value.own, "its own limit is not reached, but others need the rest"
        first.release()
        first.release()
        other.take(10)
        assert budget.held == 50
    assert budget.held == 0


@pytest.mark.parametrize("crowd", [1, 3, 20])
def test_a_newcomer_finds_room(crowd: int) -> None:
    """However many callers take all that they can get."""
    budget = BodyBytes(total=1000, each=1000)
    with ExitStack() as stack:
        for _ in range(100):
            for number in range(crowd):
                with suppress(LimitExceeded):
                    stack.enter_context(budget.room(number)).take(7)
        assert budget.held <= 1000
        stack.enter_context(budget.room("newcomer")).take(1000 // (crowd + 1) - 14)


def test_slots_and_bytes_are_given_back_whatever_happens() -> None:
    machine, budget = RequestLimits(in_flight=100, concurrent=1), BodyBytes(total=100, each=100)
    for _ in range(3):
        with pytest.raises(ZeroDivisionError), machine.slot("a"), budget.room("a") as room:
            room.take(100)
            assert (machine.running, budget.held) == (1, 100)
            raise ZeroDivisionError
    assert (machine.running, budget.held) == (0, 0)
