"""Queueing theory for a pool of workers: how long a request waits for a free slot. Pure arithmetic."""

from __future__ import annotations

import math


def erlang_c(slots: int, offered: float) -> float:
    """The probability that an arrival finds every slot busy, in M/M/k. offered: arrivals a second times seconds of service.

    By the recursion of Erlang's B formula, which neither overflows nor cancels.
    """
    if offered >= slots:
        return 1.0
    blocked = 1.0
    for k in range(1, slots + 1):
        blocked = offered * blocked / (k + offered * blocked)
    return blocked / (1 - offered / slots * (1 - blocked))


def mean_wait(slots: int, rate: float, service: float, variation: float) -> float:
    """Seconds that a request waits on average in M/G/k: Erlang's C by Lee and Longton's correction, which is exact at one slot.

    rate: arrivals a second, Poisson. service: mean seconds. variation: squared coefficient of variation of service times.
    """
    offered = rate * service
    if offered >= slots:
        return float("inf")
    return erlang_c(slots, offered) * service / (slots - offered) * (1 + variation) / 2


def wanted(demand: float, slots: int, target: float) -> int:
    """How many workers of so many slots a rule of the usual kind asks for: `demand`, which is backlog and busy slots, fills
    `target` of them. At least one.
    """  # fmt: skip
    return max(1, math.ceil(demand / (slots * target)))
