"""Which budgets a request is charged to: the caller's own, those of its tenant, and that of its plan; all at once or none.

Rules:
- A budget's key is a digest of its owner, so that no chosen name can hit another's budget; its name is for people.
- A user is known by issuer, tenant and subject: users of the same name from two issuers are two users.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Collection
from dataclasses import dataclass, field
from typing import Final

from lacre.jose.jws import b64u
from lacre.runtime.records import record
from lacre_gateway.budget.plans import LimitKind, PlanLimits, Plans, Price

USER: Final = "user"
TENANT_ON_PLAN: Final = "tenant-on-plan"
TENANT: Final = "tenant"
PLAN: Final = "plan"
_DIGEST: Final = 16  # bytes
SCOPES: Final = tuple(f"{label}." for label in (USER, TENANT_ON_PLAN, TENANT, PLAN))  # the beginnings of budgets' keys


@dataclass(frozen=True, slots=True)
class BudgetScope:
    """One budget that a caller draws from. key: in the bucket. limits: those that are set."""

    label: str
    key: str
    name: str
    limits: tuple[tuple[LimitKind, int], ...]


@dataclass(frozen=True, slots=True, eq=False)
class Caller:
    """plan: the caller's. scopes: those with any limit. least: the lowest ceiling of each unit. Equal only to itself, so
    that its counters can be kept under it.
    """

    plan: str
    scopes: tuple[BudgetScope, ...]
    least: Amounts = field(init=False)

    def __post_init__(self) -> None:
        limits = [limit for scope in self.scopes for limit in scope.limits]
        lowest = [_NO_LIMIT] * 3
        for kind, ceiling in limits:
            lowest[unit_of(kind)] = min(lowest[unit_of(kind)], ceiling)
        object.__setattr__(self, "least", Amounts(*lowest))


@record(frozen=True, slots=True)
class Amounts:
    """The most that one request may use, or its real usage. money: micro-units."""

    requests: int
    tokens: int
    money: int

    def of(self, kind: LimitKind) -> int:
        return self.by_unit()[unit_of(kind)]

    def by_unit(self) -> tuple[int, int, int]:
        """In the order of `unit_of`."""
        return self.requests, self.tokens, self.money

    def fit(self, ceilings: Amounts) -> bool:
        return self.requests <= ceilings.requests and self.tokens <= ceilings.tokens and self.money <= ceilings.money


TOKENS: Final = frozenset({LimitKind.TOKENS_PER_MINUTE, LimitKind.TOKENS_PER_DAY})
_NO_LIMIT: Final = 2**63


def unit_of(kind: LimitKind) -> int:
    """What the limit counts: 0: requests, 1: tokens, 2: money."""
    if kind is LimitKind.MONEY_PER_MONTH:
        return 2
    return 1 if kind in TOKENS else 0


def caller(  # noqa: PLR0917 - who it is, as the ledger remembers callers
    plans: Plans, issuer: str, tenant: str, subject: str, named: str | None, groups: Collection[str] = ()
) -> Caller | None:
    """None if the token names an unknown plan."""
    plan = plans.plan_of(tenant, named, subject, groups)
    if plan is None:
        return None
    own = plans.tenants.get(tenant)
    budgets = (
        (USER, f"{subject} of {tenant} on {plan.name}", plan.user),
        (TENANT_ON_PLAN, f"{tenant} on {plan.name}", plan.tenant),
        (TENANT, tenant, PlanLimits() if own is None else own.limits),
        (PLAN, f"all on {plan.name}", plan.everyone),
    )
    scopes = (
        BudgetScope(label, key_of(label, plan.name, tenant, issuer, subject), name, tuple(limits.each()))
        for label, name, limits in budgets
    )
    return Caller(plan.name, tuple(scope for scope in scopes if scope.limits))


def key_of(label: str, plan: str, tenant: str, issuer: str, subject: str) -> str:
    """The budget's key. The keys of a tenant's users have a common beginning, so that they can be found together."""
    match label:
        case "user":
            return f"{USER}.{_digest(tenant)}.{_digest(plan, tenant, issuer, subject)}"
        case "tenant-on-plan":
            return f"{TENANT_ON_PLAN}.{_digest(tenant)}.{_digest(plan)}"
        case "tenant":
            return f"{TENANT}.{_digest(tenant)}"
        case _:
            return f"{PLAN}.{_digest(plan)}"


def limits_of(plans: Plans, key: str, name: str) -> PlanLimits | None:
    """The limits in force of a budget, for reports. key, name: of the budget. None if the plans no longer have it."""
    label = key.partition(".")[0]
    if label == TENANT:
        own = plans.tenants.get(name)
        return None if own is None else own.limits
    plan = plans.plans.get(name.rpartition(" on ")[2])  # as `caller` names budgets
    return None if plan is None else {USER: plan.user, TENANT_ON_PLAN: plan.tenant, PLAN: plan.everyone}.get(label)


def named_scope(
    plans: Plans, label: str, kind: LimitKind, *, plan: str = "", tenant: str = "", issuer: str = "", subject: str = ""
) -> BudgetScope | None:
    """The budget of these names, with one of its limits. None if the plans have no such limit."""
    own, on = plans.tenants.get(tenant), plans.plans.get(plan)
    named: dict[str, tuple[str, PlanLimits | None]] = {
        USER: (f"{subject} of {tenant} on {plan}", None if on is None else on.user),
        TENANT_ON_PLAN: (f"{tenant} on {plan}", None if on is None else on.tenant),
        TENANT: (tenant, None if own is None else own.limits),
        PLAN: (f"all on {plan}", None if on is None else on.everyone),
    }
    name, limits = named[label]
    ceiling = None if limits is None else dict(limits.each()).get(kind)
    if ceiling is None:
        return None
    return BudgetScope(label, key_of(label, plan, tenant, issuer, subject), name, ((kind, ceiling),))


def digest_of(tenant: str) -> str:
    """The second part of the keys of a tenant's budgets."""
    return _digest(tenant)


def users_of(tenant: str) -> str:
    """The common beginning of the keys of a tenant's users."""
    return f"{USER}.{_digest(tenant)}."


def shared_of(plans: Plans, tenant: str) -> dict[str, str]:
    """The budgets of a tenant that no single user owns: names by keys."""
    found = {key_of(TENANT, "", tenant, "", ""): tenant}
    return found | {key_of(TENANT_ON_PLAN, plan, tenant, "", ""): f"{tenant} on {plan}" for plan in plans.plans}


def ceiling_of(price: Price | None, prompt_tokens: int, completion_tokens: int) -> Amounts:
    """The most that a request may use. Without a price there is no limit of money either."""
    money = 0 if price is None else price.at_most(prompt_tokens, completion_tokens)
    return Amounts(1, prompt_tokens + completion_tokens, money)


def _digest(*parts: str) -> str:
    return b64u(hashlib.sha256(json.dumps(parts).encode()).digest()[:_DIGEST])
