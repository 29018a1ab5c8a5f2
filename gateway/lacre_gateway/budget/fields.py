"""An answer's header fields about its caller's limits: `RateLimit` and `RateLimit-Policy`
(draft-ietf-httpapi-ratelimit-headers-10), and the fields that OpenAI's clients read.

Rules:
- A caller learns its own limits and its tenant's. Only the operator learns how far a whole plan is used.
- The remaining amount is what this gateway knows: others may have drawn since. It is a hint; leases enforce the ceiling.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from operator import attrgetter
from typing import Final

from lacre.errors import Detail
from lacre_gateway.budget.callers import PLAN
from lacre_gateway.budget.counters import Standing
from lacre_gateway.budget.holds import Met
from lacre_gateway.budget.limit_fields import OPENAI, UNITS, Headers, name_of, openai_names, policies_of
from lacre_gateway.budget.plans import LimitKind

_REMAINING: Final = attrgetter("remaining")


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
    return [(b"ratelimit-policy", policies_of(policies)), (b"ratelimit", levels.encode()), *_openai(told)]


def _level(standing: Standing) -> str:
    return f"{name_of(standing.scope, standing.kind)};r={standing.remaining}{_reset(standing.reset)}"


def _reset(seconds: float | None) -> str:
    return "" if seconds is None else f";t={math.ceil(seconds)}"


def _openai(told: Sequence[Standing]) -> Headers:
    """Of the limits that such a client knows, the one with the least left."""
    headers: Headers = []
    for noun, kinds in OPENAI:
        found = min([each for each in told if each.kind in kinds], key=_REMAINING, default=None)
        if found is not None:
            limit, remaining, reset = openai_names(noun)
            headers += [
                (limit, b"%d" % found.ceiling),
                (remaining, b"%d" % found.remaining),
                (reset, b"%ds" % math.ceil(found.reset or 0)),
            ]
    return headers
