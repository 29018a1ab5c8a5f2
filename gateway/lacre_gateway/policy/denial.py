"""Explains a denial to its caller: facts that the caller could find out by asking again.

Rules:
- Only the caller's own question is varied, one circumstance at a time, and decided by the active rules. So a caller learns
  nothing about a rule that a few more requests would not show.
- Nothing here is remembered or recorded. It takes at most some 70 decisions of 0.1 ms each, and denials are counted.
- Only the gateway's log and the audit log have the names of rules: they are the operator's.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from typing import Final

from lacre import problems
from lacre.errors import Detail
from lacre.exchange.model_paths import KNOWN
from lacre.problems.details import MAX_LISTED
from lacre.wire.header import Kem
from lacre_gateway.http.headers import Action, Shape
from lacre_gateway.http.refusal import Refusal
from lacre_gateway.policy.question import Question

_MAX_TOKENS: Final = "max_tokens"
_SEALED_BYTES: Final = "sealed_bytes"

Allowed = Callable[[Question], bool]


def denied(allowed: Allowed, asked: Question, models: Iterable[str], policies: Sequence[str]) -> Refusal:
    """The refusal of a question that was denied. models: of the pool. policies: those that decided, for the log."""
    noted = because(policies)
    if allowed(replace(asked, max_tokens=1)):
        unit = "KiB" if asked.action is Action.HTTP else "tokens"
        return Refusal(problems.TOO_MANY_TOKENS, details=_most(allowed, asked, _MAX_TOKENS, unit), noted=noted)
    if asked.action is Action.HTTP:
        return Refusal(problems.PATH_NOT_ALLOWED, details={"paths": KNOWN}, noted=noted)
    return Refusal(problems.FORBIDDEN, details=_other(allowed, asked) or usable(allowed, asked, models), noted=noted)


def because(policies: Sequence[str]) -> str:
    """Why a decision denied, for the operator. policies: the ids of those that decided."""
    return f"policy: forbidden by {', '.join(policies)}" if policies else "policy: no rule permits it"


def lowered(allowed: Allowed, asked: Question, floor: int) -> int | None:
    """The most output tokens that policy allows, if it denied a client's default ceiling. None: fewer than `floor`."""
    if floor >= asked.max_tokens or not allowed(replace(asked, max_tokens=floor)):
        return None
    return _largest(lambda tokens: allowed(replace(asked, max_tokens=tokens)), floor, asked.max_tokens)


def usable(allowed: Allowed, asked: Question, models: Iterable[str]) -> dict[str, Detail]:
    """The models of the pool that this caller may use for this, with a small answer; empty if there is none."""
    small = replace(asked, max_tokens=1)
    found = tuple(name for name in tuple(models)[:MAX_LISTED] if allowed(replace(small, model=name)))
    return {"models": found} if found else {}


def _other(allowed: Allowed, asked: Question) -> dict[str, Detail]:
    """One other circumstance that would be allowed; empty if there is none."""
    if allowed(replace(asked, sealed_bytes=1)):
        return _most(allowed, asked, _SEALED_BYTES, "bytes")
    if any(allowed(replace(asked, shape=shape)) for shape in Shape):
        return {"reason": "shape"}
    if any(allowed(replace(asked, kem=kem)) for kem in Kem):
        return {"reason": "kem"}
    if asked.affinity and allowed(replace(asked, affinity=False)):
        return {"reason": "affinity"}
    return {}


def _most(allowed: Allowed, asked: Question, name: str, unit: str) -> dict[str, Detail]:
    """The largest allowed amount, if the rules have one ceiling. 1 is allowed, and the amount in the question is not."""
    ceiling = int(getattr(asked, name))

    def fits(amount: int) -> bool:
        return allowed(replace(asked, max_tokens=amount) if name == _MAX_TOKENS else replace(asked, sealed_bytes=amount))

    return {"limit": name, "scope": "policy", "unit": unit, "ceiling": _largest(fits, 1, ceiling), "asked": ceiling}


def _largest(fits: Callable[[int], bool], low: int, high: int) -> int:
    """The largest number that fits, if there is one ceiling. low fits, and high does not."""
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low
