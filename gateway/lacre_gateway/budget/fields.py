"""An answer's header fields about its caller's limits: `RateLimit` and `RateLimit-Policy`
(draft-ietf-httpapi-ratelimit-headers-10), and the fields that OpenAI's clients read.

Rules:
- A caller learns its own limits and its tenant's. Only the operator learns how far a whole plan is used.
- The remaining amount is what this gateway knows: others may have drawn since. It is a hint; leases enforce the ceiling.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from functools import lru_cache
from operator import attrgetter
from typing import Final

from lacre.errors import Detail
from lacre_gateway.budget.callers import PLAN
from lacre_gateway.budget.counters import Standing
from lacre_gateway.budget.holds import Met
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
_REMAINING: Final = attrgetter("remaining")
_OPENAI: Final = (
    (b"requests", (LimitKind.REQUESTS_PER_MINUTE,)),
    (b"tokens", (LimitKind.TOKENS_PER_MINUTE, LimitKind.TOKENS_PER_DAY)),
)


def details(kind: LimitKind, met: Met | None) -> dict[str, Detail]:
    """For the problem document of a refusal: which limit was met, and how much of it is the plan's own affair."""
    told: dict[str, Detail] = {"limit": kind.value, "unit": UNITS[kind]}
    if met is None:
        return told
    told["scope"] = met.scope
    if met.scope != PLAN:
        told |= {"ceiling": met.ceiling, "asked": met.asked}
        told |= {} if met.remaining is None else {"remaining": met.remaining}
        told |= {} if met.fits is None else {"fits": met.fits}
    return told


def fields(standings: Iterable[Standing]) -> Headers:
    """The header fields; none for a caller without limits."""
    told = [standing for standing in standings if standing.scope != PLAN]
    if not told:
        return []
    policies = tuple([standing[:3] for standing in told])
    levels = ", ".join(map(_level, told))
    return [(b"ratelimit-policy", _policies(policies)), (b"ratelimit", levels.encode()), *_openai(told)]


@lru_cache(maxsize=1024)
def _policies(policies: tuple[tuple[str, LimitKind, int], ...]) -> bytes:
    """They change only with the plans."""
    return ", ".join(_policy(*policy) for policy in policies).encode()


def _policy(scope: str, kind: LimitKind, ceiling: int) -> str:
    window = f";w={_WINDOWS[kind]}" if kind in _WINDOWS else ""
    return f'{_name(scope, kind)};q={ceiling}{window};qu="{UNITS[kind]}"'


def _level(standing: Standing) -> str:
    return f"{_name(standing.scope, standing.kind)};r={standing.remaining}{_reset(standing.reset)}"


def _reset(seconds: float | None) -> str:
    return "" if seconds is None else f";t={math.ceil(seconds)}"


@lru_cache(maxsize=64)
def _name(scope: str, kind: LimitKind) -> str:
    return f'"{scope}/{kind.value}"'


def _openai(told: Sequence[Standing]) -> Headers:
    """Of the limits that such a client knows, the one with the least left."""
    headers: Headers = []
    for noun, kinds in _OPENAI:
        found = min([each for each in told if each.kind in kinds], key=_REMAINING, default=None)
        if found is not None:
            headers += [
                (b"x-ratelimit-limit-" + noun, str(found.ceiling).encode()),
                (b"x-ratelimit-remaining-" + noun, str(found.remaining).encode()),
                (b"x-ratelimit-reset-" + noun, f"{math.ceil(found.reset or 0)}s".encode()),
            ]
    return headers
