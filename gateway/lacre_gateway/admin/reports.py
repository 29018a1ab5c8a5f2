"""The models of the admin API's requests and answers; its description is made from them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Final, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

from lacre_fabric.nats.subjects import DEFAULT_REGION
from lacre_fabric.work.contract import Capacity
from lacre_fabric.work.revocations import Revocation
from lacre_gateway.auth.claims import MAX_NAME, is_name
from lacre_gateway.budget.callers import PLAN, TENANT_ON_PLAN, USER
from lacre_gateway.budget.callers import TENANT as OF_TENANT
from lacre_gateway.budget.plans import MAX_AMOUNT, LimitKind, micro_units
from lacre_gateway.budget.report import Line
from lacre_gateway.budget.tenants import TenantUse

TENANT: Final = "^[A-Za-z0-9._-]{1,64}$"  # the form that `auth` accepts in a token
WORKER: Final = "^[a-z0-9][a-z0-9_-]{0,62}$"  # as subjects of the fabric have its parts

_NAMES: Final[Mapping[str, tuple[str, ...]]] = {
    USER: ("tenant", "sub", "plan"), TENANT_ON_PLAN: ("tenant", "plan"), OF_TENANT: ("tenant",), PLAN: ("plan",),
}  # fmt: skip


class Report(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class PoolReport(Report):
    """queued: requests that no worker has taken; None if the queue cannot be read. demand: they and the busy slots."""

    workers: int
    busy: int
    free: int
    queued: int | None
    demand: int | None

    @classmethod
    def of(cls, seen: Capacity, queued: int | None) -> Self:
        demand = None if queued is None else queued + seen.busy
        return cls(workers=seen.workers, busy=seen.busy, free=seen.free, queued=queued, demand=demand)


class Rules(Report):
    """policy_set: hex SHA-256 of the active policies. since: seconds since the epoch."""

    policy_set: str
    since: float
    reloads: int
    refusals: int


class SettingsReport(Report):
    """Settings that were read again. changed: tables that took over just now. restart: keys in the file that count only after a
    restart. fault: why the settings on the disk were refused, with the key; null if they were not.
    """

    changed: list[str] = []
    restart: list[str] = []
    fault: str | None = None


class StatusReport(Report):
    """missing: what is missing before requests can be served, and who can help. seconds: since the start."""

    gateway: str
    version: str
    missing: dict[str, str]
    draining: bool
    seconds: float
    requests: int
    streams: int
    pools: dict[str, dict[str, PoolReport]]  # by region
    audit_entries: int
    rules: Rules
    settings: SettingsReport | None = None


class Used(Report):
    """One limit in one window. key: the budget's. kind: what it counts; money in micro-units. window: its number.

    used: settled, or by receipts of running requests. drawn: also includes what gateways hold in leases. forfeited: leases
    whose gateway died; they count as used until the window ends. ceiling: the limit in force; None if the plans no longer have
    it. raised: the part of it that administrators added. resets_at: when the window ends, in seconds since the epoch; None for
    limits that do not count by time.
    """

    key: str
    name: str
    kind: str
    window: int
    used: int
    drawn: int
    forfeited: int
    ceiling: int | None
    raised: int
    resets_at: float | None

    @classmethod
    def of(cls, line: Line) -> Self:
        return cls(
            key=line.key,
            name=line.name,
            kind=line.kind.value,
            window=line.window,
            used=line.used,
            drawn=line.drawn,
            forfeited=line.forfeited,
            ceiling=line.ceiling,
            raised=line.raised,
            resets_at=line.resets_at,
        )


class UsageReport(Report):
    """currency: of money, three letters (ISO 4217)."""

    tenant: str
    currency: str
    budgets: list[Used]


class TenantReport(Report):
    """plan: of its users whose tokens name none, and whom plans.toml does not map. users: with budgets of their own.

    used: what these have used together in the present windows, by limit. budgets: those that the tenant's users share.
    """

    tenant: str
    plan: str | None
    users: int
    used: dict[str, int]
    budgets: list[Used]

    @classmethod
    def of(cls, tenant: str, use: TenantUse) -> Self:
        used = {kind.value: amount for kind, amount in use.used.items()}
        return cls(tenant=tenant, plan=use.plan, users=use.users, used=used, budgets=[Used.of(line) for line in use.budgets])


class TenantsReport(Report):
    """complete: whether these are all tenants; the list is cut after 5000 parts of budgets."""

    currency: str
    complete: bool
    tenants: list[TenantReport]


class BudgetNamed(Report):
    """Which limit of which budget, in the window of now.

    scope: `user` (names tenant, sub and plan), `tenant-on-plan` (tenant and plan), `tenant`, or `plan`. issuer: of the user;
    may be omitted if there is only one. plan: the one that the user is on. id: the caller's number for this change, so that a
    repeated call changes nothing; default: a new one.
    """

    scope: Literal["user", "tenant-on-plan", "tenant", "plan"]
    tenant: Annotated[str, Field(pattern=TENANT)] | None = None
    sub: Annotated[str, Field(min_length=1, max_length=MAX_NAME)] | None = None
    issuer: str | None = None
    plan: Annotated[str, Field(min_length=1, max_length=MAX_NAME)] | None = None
    limit: LimitKind
    id: Annotated[str, Field(pattern=r"^[!-~]{1,64}$")] | None = None

    @model_validator(mode="after")
    def _named(self) -> Self:
        for name, value in (("tenant", self.tenant), ("sub", self.sub), ("plan", self.plan)):
            if (value is not None) != (name in _NAMES[self.scope]):
                raise ValueError(f"a budget of this scope has these names: {', '.join(_NAMES[self.scope])}")
            if value is not None and not is_name(value):
                raise ValueError(f"{name} has characters that no name has")
        if self.issuer is not None and self.scope != USER:
            raise ValueError("only users have an issuer")
        if self.limit is LimitKind.CONCURRENT_STREAMS:
            raise ValueError("streams count in no window: change plans.toml")
        return self

    @property
    def target(self) -> str:
        """For the audit log."""
        names = (self.scope, self.tenant, self.sub, self.plan, self.limit.value)
        return "/".join(name for name in names if name is not None)


class TopUp(BudgetNamed):
    """amount: by which the ceiling rises until the window ends: a whole number, or decimal text for money."""

    amount: Annotated[int, Field(gt=0, le=MAX_AMOUNT)]

    @model_validator(mode="before")
    @classmethod
    def _money(cls, values: object) -> object:
        if isinstance(values, dict) and values.get("limit") == LimitKind.MONEY_PER_MONTH.value:
            return {**values, "amount": micro_units(values.get("amount"))}
        if isinstance(values, dict) and type(values.get("amount")) is not int:
            raise ValueError("the amount must be a whole number")
        return values


class Reset(BudgetNamed):
    """As much is added as was used, so that all of the plan's ceiling remains."""


class BudgetChanged(Report):
    """key, name: of the budget. added: by this call, or by an earlier one of the same id; money in micro-units."""

    id: str
    key: str
    name: str
    limit: str
    window: int
    added: int
    resets_at: float | None


class Reloaded(Report):
    """taken, policy_set, fault, file: of the rules. fault, file: why those on the disk were refused, in a word, and in which
    file.
    """

    taken: bool
    policy_set: str
    fault: str | None = None
    file: str | None = None
    settings: SettingsReport | None = None


class Revoke(Report):
    """Which tokens: the one with this `jti`, or all that `sub` was issued until now. Exactly one of the two.

    issuer: may be omitted if there is only one. until: when the last of them expires, in seconds since the epoch; default: the
    maximum token lifetime from now on.
    """

    jti: Annotated[str, Field(min_length=1, max_length=MAX_NAME)] | None = None
    sub: Annotated[str, Field(min_length=1, max_length=MAX_NAME)] | None = None
    issuer: str | None = None
    until: Annotated[float, Field(gt=0, lt=2**53)] | None = None

    @model_validator(mode="after")
    def _one(self) -> Self:
        if (self.jti is None) == (self.sub is None):
            raise ValueError("name either jti or sub")
        if not is_name(self.jti or self.sub):
            raise ValueError("no token can have this name")
        return self


class Revoked(Report):
    """key: names the token or subject, by digest. Times in seconds since the epoch; issued_until: None if all are meant."""

    key: str
    until: float
    issued_until: float | None

    @classmethod
    def of(cls, revocation: Revocation) -> Self:
        return cls(key=revocation.key, until=revocation.until, issued_until=revocation.issued_until)


class Revocations(Report):
    """current: whether the list is up to date; a gateway with an outdated list refuses every request."""

    current: bool
    revocations: list[Revoked]


class Draining(Report):
    draining: bool
    streams: int


class WorkerNamed(Report):
    """One live worker, as `GET /v1/workers` and its presence name it."""

    pool: Annotated[str, Field(pattern=WORKER)]
    region: Annotated[str, Field(pattern=WORKER)] = DEFAULT_REGION
    node: Annotated[str, Field(pattern=WORKER)]

    @property
    def target(self) -> str:
        """For the audit log."""
        return f"{self.pool}/{self.region}/{self.node}"


class WorkerOrdered(Report):
    """What the worker says after the order. drained: it takes no more work. busy: slots in which requests still run. others:
    further workers of its pool that take work now.
    """

    pool: str
    region: str
    node: str
    drained: bool
    busy: int
    others: int


class OpenLink(Report):
    """A link that signs a browser in to the console, once. seconds: how long it works."""

    url: str
    seconds: float
