"""How often a caller with a valid token may be refused, and what is told of the requests beyond that."""

from __future__ import annotations

import pytest

from lacre import problems
from lacre_gateway.auth.throttle import RefusalThrottle
from lacre_gateway.http.refusal import Refusal

ALICE = ("issuer", "alice")


def refused(throttle: RefusalThrottle, subject: object, address: str) -> float | None:
    """Seconds to wait; None where it is let through."""
    try:
        throttle.check(subject, address)  # type: ignore[arg-type]
    except Refusal as refusal:
        assert refusal.problem is problems.RATE_LIMITED
        return refusal.retry_after
    return None


def test_of_one_caller_and_of_one_address() -> None:
    now, told = [600.0], list[int]()
    throttle = RefusalThrottle(3, 5, lambda: now[0])
    throttle.report = told.append
    for _ in range(3):
        assert refused(throttle, ALICE, "192.0.2.1") is None
        throttle.refused(ALICE, "192.0.2.1")
    now[0] = 615.0
    assert refused(throttle, ALICE, "192.0.2.9") == 45.0
    assert refused(throttle, "bob", "192.0.2.1") is None
    for _ in range(2):
        throttle.refused("bob", "192.0.2.1")
    assert refused(throttle, "carol", "192.0.2.1") == 45.0
    assert refused(throttle, "carol", "192.0.2.2") is None
    now[0] = 660.0
    assert refused(throttle, ALICE, "192.0.2.1") is None
    assert told == [2]


def test_an_ipv6_household_is_one_address() -> None:
    throttle = RefusalThrottle(100, 2, lambda: 0.0)
    for number in range(2):
        throttle.refused(number, f"2001:db8::{number}")
    assert refused(throttle, "x", "2001:db8::ffff") is not None
    assert refused(throttle, "x", "2001:db8:0:1::1") is None


@pytest.mark.parametrize("count", [0, 3])
def test_memory_is_of_one_minute_and_what_was_not_told_is_told_at_the_end(count: int) -> None:
    now, told = [0.0], list[int]()
    throttle = RefusalThrottle(1, 10**6, lambda: now[0])
    throttle.report = told.append
    for number in range(1000):
        throttle.refused(number, "192.0.2.1")
    now[0] = 60.0
    assert refused(throttle, 1, "192.0.2.1") is None
    assert not throttle._counts
    throttle.refused(ALICE, "a")
    for _ in range(count):
        assert refused(throttle, ALICE, "a")
    throttle.close()
    throttle.close()
    assert told == [count] * bool(count)
