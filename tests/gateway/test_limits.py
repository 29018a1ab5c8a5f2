"""Limits as a pure machine: what it grants in any window, what it gives back, and what it forgets."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lacre_gateway import limits as module
from lacre_gateway.limits import LimitExceeded, RequestLimits, Reservation

ANY = Reservation(10, 10)


def limits(in_flight: int = 100, concurrent: int = 100, per_minute: int = 60) -> RequestLimits:
    return RequestLimits(in_flight=in_flight, concurrent=concurrent, per_minute=per_minute)


def granted(machine: RequestLimits, subject: str, now: float) -> bool:
    try:
        machine.reserve(subject, ANY, now)
    except LimitExceeded as exceeded:
        assert exceeded.own and exceeded.retry_after > 0
        return False
    return True


@given(
    rate=st.integers(1, 30),
    gaps=st.lists(st.floats(0, 20), min_size=1, max_size=80),
)
def test_no_window_of_a_minute_holds_more_than_twice_the_rate(rate: int, gaps: list[float]) -> None:
    """A token bucket: at most its capacity at once, and the rate from then on."""
    machine, now, times = limits(per_minute=rate), 0.0, []
    for gap in gaps:
        now += gap
        if granted(machine, "s", now):
            times.append(now)
    for start in times:
        within = [time for time in times if start <= time < start + 60]
        assert len(within) <= 2 * rate
    for first, start in enumerate(times):
        for last in range(first, len(times)):
            assert last - first + 1 <= rate + (times[last] - start) * rate / 60 + 1e-6


def test_retry_after_is_the_truth() -> None:
    machine = limits(per_minute=2)
    assert granted(machine, "s", 0.0) and granted(machine, "s", 0.0)
    with pytest.raises(LimitExceeded) as exceeded:
        machine.reserve("s", ANY, 0.0)
    wait = exceeded.value.retry_after
    assert not granted(machine, "s", wait - 0.01)
    assert granted(machine, "s", wait + 0.001)


def test_subjects_are_apart() -> None:
    machine = limits(per_minute=1)
    assert granted(machine, "a", 0.0) and granted(machine, "b", 0.0)
    assert not granted(machine, "a", 0.0)


def test_a_clock_that_goes_back_gives_nothing() -> None:
    machine = limits(per_minute=1)
    assert granted(machine, "a", 100.0)
    assert not granted(machine, "a", 0.0)
    assert not granted(machine, "a", 50.0)


def test_slots_are_given_back_whatever_happens() -> None:
    machine = limits(concurrent=1)
    for _ in range(3):
        with pytest.raises(ZeroDivisionError), machine.slot("a", 0.0):
            assert machine.running == 1
            raise ZeroDivisionError
    assert machine.running == 0


def test_slots_of_one_subject_and_of_all() -> None:
    machine = limits(in_flight=2, concurrent=1)
    with machine.slot("a", 0.0):
        with pytest.raises(LimitExceeded) as own, machine.slot("a", 0.0):
            pass
        assert own.value.own
        with machine.slot("b", 0.0):
            with pytest.raises(LimitExceeded) as all_, machine.slot("c", 0.0):
                pass
            assert not all_.value.own
    with machine.slot("a", 0.0):
        pass


def test_those_at_rest_are_forgotten() -> None:
    machine = limits(per_minute=60)
    with machine.slot("busy", 0.0):
        for number in range(3 * module._SWEEP_AT):
            granted(machine, str(number), number / 10)  # each is whole again a second later
        assert len(machine._accounts) < 2 * module._SWEEP_AT
        assert "busy" in machine._accounts


def test_nobody_is_forgotten_who_is_not_at_rest() -> None:
    machine = limits(per_minute=1)
    assert granted(machine, "spent", 0.0)
    for number in range(2 * module._SWEEP_AT):
        granted(machine, str(number), 1.0)
    assert not granted(machine, "spent", 2.0)


@pytest.mark.parametrize(("prompt", "completion", "covered"), [(10, 20, True), (11, 0, False), (0, 21, False), (0, 0, True)])
def test_reservation_covers(prompt: int, completion: int, covered: bool) -> None:
    assert Reservation(10, 20).covers(prompt, completion) is covered
