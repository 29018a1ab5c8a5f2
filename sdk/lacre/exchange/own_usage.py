"""What a caller has used of its limits, as the gateway's `GET /v1/me/usage` says.

Rules:
- The call is not sealed and nobody signs its answer: it is what the gateway says, and the SDK decides nothing by it.
- It carries the access token. If the gateway refuses the token, the client tries one other token.
- The answer has a bounded length. A limit that the SDK cannot read makes the whole answer invalid, so that none is missing.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, fields
from decimal import Decimal
from typing import Any, Final

from lacre.errors import InvalidMessage, NetworkError
from lacre.evidence.prices import amount
from lacre.exchange.retry import ENDURANCE, Retries
from lacre.exchange.sealed_answer import MAX_PROBLEM, problem_of, read_all
from lacre.exchange.steps import Renew, Send, Steps, Wait, sent_outer
from lacre.problems import INVALID_TOKEN, details
from lacre.runtime.json_objects import parse_object

PATH: Final = "/v1/me/usage"
MAX_DOCUMENT: Final = 64 * 1024  # bytes; a caller has some ten limits of 150 bytes
MONEY: Final = "micro-units"
_MOST: Final = 2**63  # a ceiling that was raised again and again stays below it
_LAST_TIME: Final = 253_402_300_799  # 9999-12-31T23:59:59Z: later times have no date
_MAX_PLAN: Final = 256  # characters, as in an access token
_NAME: Final = re.compile(r"[a-z_-]{1,64}")
_CURRENCY: Final = re.compile(r"[A-Z]{3}")


@dataclass(frozen=True, slots=True)
class UsedLimit:
    """One limit of the caller or its tenant, in the present window.

    limit: as the operator's plans name it, such as `tokens_per_day`. scope: whose it is: `user`, `tenant-on-plan` or `tenant`.
    unit: what it counts: `requests`, `tokens`, `streams`, or `micro-units` (millionths of the currency's unit). resets_at: when
    the window ends, in seconds since the epoch; None for limits that do not count by time.
    """

    limit: str
    scope: str
    unit: str
    ceiling: int
    used: int
    remaining: int
    resets_at: float | None

    def in_unit(self, number: int) -> int | Decimal:
        """An amount of this limit, for people: money in the currency's unit."""
        return amount(number) if self.unit == MONEY else number

    def members(self) -> dict[str, Any]:
        """For JSON, as the gateway has it."""
        return {each.name: getattr(self, each.name) for each in fields(self)}


@dataclass(frozen=True, slots=True)
class OwnUsage:
    """What the caller has used. Nobody signs it. plan: the caller's; currency: of money, three letters (ISO 4217)."""

    plan: str | None
    currency: str
    limits: tuple[UsedLimit, ...]

    def members(self) -> dict[str, Any]:
        """For JSON."""
        return {"plan": self.plan, "currency": self.currency, "limits": [each.members() for each in self.limits]}


def own_usage(retries: int | None, clock: Callable[[], float]) -> Steps[OwnUsage]:
    """retries: how often the call is repeated; None: as `lacre.exchange.retry` decides. Raises LacreError."""
    left, renewed = Retries.of(retries, repeatable=True, endurance=ENDURANCE, clock=clock), False
    while True:
        try:
            outer = sent_outer((yield Send("GET", PATH, (("accept", "application/json"),), named=True)))
            # One byte over the limit, so that a document that is too long is noticed and not cut.
            document = yield from read_all(MAX_DOCUMENT + 1 if outer.status == 200 else MAX_PROBLEM)
        except NetworkError as exc:
            if (seconds := left.after_failure(exc)) is None:
                raise
        else:
            if outer.status == 200:
                return _parse(document)
            problem = problem_of(outer, document)
            if problem is INVALID_TOKEN and not renewed and (yield Renew()) is True:
                renewed = True
                continue
            if (seconds := left.after_refusal(problem, outer.retry_after)) is None:
                refused = problem.exception(outer.retry_after, details.read(document))
                refused.request_id = outer.request_id
                raise refused
        yield Wait(seconds)


def _parse(document: bytes) -> OwnUsage:
    """Raises InvalidMessage."""
    if len(document) > MAX_DOCUMENT:
        raise InvalidMessage(f"the gateway's usage is over {MAX_DOCUMENT} bytes: check its address")
    try:
        found = parse_object(document, "the gateway's usage")
        plan, currency, limits = found["plan"], found["currency"], found["limits"]
        if not isinstance(limits, list) or not isinstance(currency, str) or not _CURRENCY.fullmatch(currency):
            raise ValueError
        return OwnUsage(None if plan is None else _plan(plan), currency, tuple(_limit(each) for each in limits))
    except (ValueError, TypeError, KeyError, InvalidMessage) as exc:
        raise InvalidMessage("the gateway's usage is not in the form that this client knows: update the client") from exc


def _limit(found: dict[str, Any]) -> UsedLimit:
    """Raises ValueError, TypeError or KeyError."""
    resets_at = found["resets_at"]
    if resets_at is not None:
        if type(resets_at) not in (int, float) or not 0 <= resets_at <= _LAST_TIME:
            raise ValueError
        resets_at = float(resets_at)
    return UsedLimit(
        _name(found["limit"]), _name(found["scope"]), _name(found["unit"]), _count(found["ceiling"]), _count(found["used"]),
        _count(found["remaining"]), resets_at,
    )  # fmt: skip


def _plan(value: object) -> str:
    if not isinstance(value, str) or not 0 < len(value) <= _MAX_PLAN or not value.isprintable():
        raise ValueError
    return value


def _name(value: object) -> str:
    if not isinstance(value, str) or not _NAME.fullmatch(value):
        raise ValueError
    return value


def _count(value: object) -> int:
    if type(value) is not int or not 0 <= value <= _MOST:
        raise ValueError
    return value
