"""Requests under way in one process: what it grants at once, what it gives back, and what it forgets."""

from __future__ import annotations

import pytest

from lacre_gateway.limits import LimitExceeded, RequestLimits, Reservation


def test_slots_are_given_back_whatever_happens() -> None:
    machine = RequestLimits(in_flight=100, concurrent=1)
    for _ in range(3):
        with pytest.raises(ZeroDivisionError), machine.slot("a"):
            assert machine.running == 1
            raise ZeroDivisionError
    assert machine.running == 0


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


def test_those_at_rest_are_forgotten() -> None:
    machine = RequestLimits(in_flight=10, concurrent=10)
    with machine.slot("busy"):
        for number in range(1000):
            with machine.slot(str(number)):
                pass
        with pytest.raises(LimitExceeded), machine.slot("busy"), RequestLimits(in_flight=0, concurrent=1).slot("x"):
            pass
        assert set(machine._running) == {"busy"}
    assert not machine._running


@pytest.mark.parametrize(("prompt", "completion", "covered"), [(10, 20, True), (11, 0, False), (0, 21, False), (0, 0, True)])
def test_reservation_covers(prompt: int, completion: int, covered: bool) -> None:
    assert Reservation(10, 20).covers(prompt, completion) is covered
