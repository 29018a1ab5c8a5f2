"""Every tenant that has used something lately, or that `plans.toml` names, with what it has used: for one call of an operator.

Rules:
- The list is read from the store, so it is the same at every gateway. It costs one round trip for each part of a budget, and
  stops after `MAX_PARTS`.
- A tenant's name comes from a budget's name, and counts only if the budget's key is made from it.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Final

from lacre_fabric.nats.kv import Bucket
from lacre_gateway.budget import callers
from lacre_gateway.budget.additions import Approver
from lacre_gateway.budget.plans import LimitKind, Plans
from lacre_gateway.budget.record import Record
from lacre_gateway.budget.report import Line, lines
from lacre_gateway.budget.windows import windows_at

MAX_PARTS: Final = 5000  # of budgets: some seconds of reading
_IN_NAME: Final = re.compile(r"(?:^|(?<= of ))([A-Za-z0-9._-]{1,64})(?= on |$)")  # as `callers` names budgets


@dataclass(slots=True)
class TenantUse:
    """plan: of its users whose tokens name none. users: with budgets of their own, in any window. used: by all of them, in
    the present windows. budgets: those that they share.
    """

    plan: str | None
    users: int = 0
    used: dict[LimitKind, int] = field(default_factory=lambda: defaultdict(int))
    budgets: list[Line] = field(default_factory=list)


async def tenants(bucket: Bucket, plans: Plans, approver: Approver, now: float) -> tuple[dict[str, TenantUse], bool]:
    """By name, and whether that is all of them. Raises FabricUnavailable."""
    found = {name: _empty(plans, name) for name in sorted({*plans.tenants, *_mapped(plans)})}
    whole, current = True, windows_at(now)
    for label in (callers.TENANT, callers.TENANT_ON_PLAN, callers.USER):
        parts, all_of_it = await bucket.scan(f"{label}.", MAX_PARTS)
        whole = whole and all_of_it
        for key, values in parts.items():
            record = Record("").with_others(values, current, approver.check(key)).merged()
            name = tenant_of(key, record.name)
            if name is not None:
                _add(found.setdefault(name, _empty(plans, name)), key, record, plans, current)
    return dict(sorted(found.items())), whole


def tenant_of(key: str, name: str) -> str | None:
    """The tenant of a budget, by its key and name; None for a name that does not fit the key."""
    digest = key.split(".")[1]
    return next((each for each in _IN_NAME.findall(name) if callers.digest_of(each) == digest), None)


def _add(use: TenantUse, key: str, record: Record, plans: Plans, current: Mapping[LimitKind, int]) -> None:
    now = [line for line in lines({key: record}, frozenset(), plans=plans) if line.window == current[line.kind]]
    if key.startswith(f"{callers.USER}."):
        use.users += 1
        for line in now:
            use.used[line.kind] += line.used
    else:
        use.budgets += now


def _empty(plans: Plans, name: str) -> TenantUse:
    plan = plans.plan_of(name, None)
    return TenantUse(None if plan is None else plan.name)


def _mapped(plans: Plans) -> Iterator[str]:
    for name in (*plans.users, *plans.groups):
        yield name.partition("/")[0]
