"""What the answers to one caller's requests share of the header fields about its limits, written once (see `fields`).

Rules:
- A caller learns its own limits and its tenant's. Only the operator learns how far a whole plan is used.
- The amounts and times are those of the moment; only names, ceilings and places are kept.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import lru_cache
from typing import Final

from lacre_gateway.budget.callers import PLAN
from lacre_gateway.budget.lease import Counter
from lacre_gateway.budget.plans import LimitKind
from lacre_gateway.budget.windows import DAY, SECONDS

Headers = list[tuple[bytes, bytes]]

_MONTH: Final = 30 * DAY  # the field gives a window's length as one number; `t` gives its true end
_WINDOWS: Final = {**SECONDS, LimitKind.MONEY_PER_MONTH: _MONTH}
UNITS: Final = {
    LimitKind.REQUESTS_PER_MINUTE: "requests",
    LimitKind.TOKENS_PER_MINUTE: "tokens",
    LimitKind.TOKENS_PER_DAY: "tokens",
    LimitKind.MONEY_PER_MONTH: "micro-units",
    LimitKind.CONCURRENT_STREAMS: "concurrent-requests",
}
OPENAI: Final = (
    (b"requests", (LimitKind.REQUESTS_PER_MINUTE,)),
    (b"tokens", (LimitKind.TOKENS_PER_MINUTE, LimitKind.TOKENS_PER_DAY)),
)


class LimitFields:
    """The same fields, for the requests of one caller in the present windows. What these share is written once."""

    __slots__ = ("_counters", "_ends", "_groups", "_levels", "_policy")

    def __init__(self, limits: Sequence[tuple[str, Counter, float | None]]) -> None:
        """limits: each one's scope, counter and the end of its window, in seconds since the epoch; None if it has none."""
        told = [limit for limit in limits if limit[0] != PLAN]
        self._counters = [counter for _, counter, _ in told]
        self._ends = sorted({end for *_, end in told if end is not None})
        # of each limit: its name, and the place of its end
        self._levels = [
            (f"{name_of(scope, counter.kind)};r=", -1 if end is None else self._ends.index(end)) for scope, counter, end in told
        ]
        policies = tuple([(scope, counter.kind, counter.ceiling) for scope, counter, _ in told])
        self._policy = (b"ratelimit-policy", policies_of(policies))
        groups = [(noun, [place for place, each in enumerate(self._counters) if each.kind in kinds]) for noun, kinds in OPENAI]
        self._groups = [(openai_names(noun), places) for noun, places in groups if places]

    def at(self, now: float) -> Headers:
        """now: seconds since the epoch."""
        if not self._levels:
            return []
        left = [rest if (rest := each.ceiling - each.others - each.used - each.reserved) > 0 else 0 for each in self._counters]
        seconds = [math.ceil(end - now) if end > now else 0 for end in self._ends]
        resets = [*[f";t={each}" for each in seconds], ""]  # the last one is of limits without an end
        levels = [f"{name}{rest}{resets[place]}" for (name, place), rest in zip(self._levels, left, strict=True)]
        headers = [self._policy, (b"ratelimit", ", ".join(levels).encode())]
        seconds.append(0)
        for (limit, remaining, reset), places in self._groups:
            found = min(places, key=left.__getitem__)
            headers += [
                (limit, b"%d" % self._counters[found].ceiling),
                (remaining, b"%d" % left[found]),
                (reset, b"%ds" % seconds[self._levels[found][1]]),
            ]
        return headers


def openai_names(noun: bytes) -> tuple[bytes, bytes, bytes]:
    return b"x-ratelimit-limit-" + noun, b"x-ratelimit-remaining-" + noun, b"x-ratelimit-reset-" + noun


@lru_cache(maxsize=1024)
def policies_of(policies: tuple[tuple[str, LimitKind, int], ...]) -> bytes:
    """They change only with the plans."""
    return ", ".join(_policy(*policy) for policy in policies).encode()


def _policy(scope: str, kind: LimitKind, ceiling: int) -> str:
    window = f";w={_WINDOWS[kind]}" if kind in _WINDOWS else ""
    return f'{name_of(scope, kind)};q={ceiling}{window};qu="{UNITS[kind]}"'


@lru_cache(maxsize=64)
def name_of(scope: str, kind: LimitKind) -> str:
    return f'"{scope}/{kind.value}"'
