"""How much callers may use, and the price of a token: `plans.toml`, parsed into frozen values.

Rules:
- An absent limit means no limit. A limit of 0 refuses everything.
- Money is decimal text in the file and whole micro-units inside, never floating point. A micro-unit is a millionth of the
  currency's unit.
- A request costs the exact sum of its tokens at their prices, rounded *up* once to the next micro-unit. A caller pays less than
  one micro-unit too much, and never too little.
- A file with a fault is refused whole: every error names the key, and what to write there.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field, fields
from enum import StrEnum
from pathlib import Path
from types import MappingProxyType
from typing import Annotated, Final

from pydantic import AfterValidator, BeforeValidator, Field, model_validator
from pydantic_core import PydanticCustomError

from lacre_fabric import settings as files
from lacre_fabric.settings import Table

PLANS_FILE: Final = "plans.toml"
ANY_MODEL: Final = "*"  # the price of every model without its own
MICRO: Final = 10**6
_MILLION_TOKENS: Final = 10**6
_MONEY: Final = re.compile(r"([0-9]{1,12})(?:\.([0-9]{1,6}))?")
_MEMBER: Final = re.compile(r"[A-Za-z0-9._-]{1,64}/.+", re.DOTALL)  # of a tenant, as policies name users and groups
MAX_AMOUNT: Final = 2**53  # every JSON reader holds it exactly


class LimitKind(StrEnum):
    """What a limit counts. All except the last count within a window of UTC."""

    REQUESTS_PER_MINUTE = "requests_per_minute"
    TOKENS_PER_MINUTE = "tokens_per_minute"
    TOKENS_PER_DAY = "tokens_per_day"
    MONEY_PER_MONTH = "money_per_month"
    CONCURRENT_STREAMS = "concurrent_streams"


@dataclass(frozen=True, slots=True)
class PlanLimits:
    """The most that one holder may use; None: no limit. Money in micro-units."""

    requests_per_minute: int | None = None
    tokens_per_minute: int | None = None
    tokens_per_day: int | None = None
    money_per_month: int | None = None
    concurrent_streams: int | None = None

    def each(self) -> Iterator[tuple[LimitKind, int]]:
        """Those that are set."""
        for kind in LimitKind:
            ceiling: int | None = getattr(self, kind.value)
            if ceiling is not None:
                yield kind, ceiling


@dataclass(frozen=True, slots=True)
class Price:
    """Of one model, in micro-units for a million tokens. cached: of prompt tokens from the prefix cache."""

    prompt: int
    cached: int
    completion: int

    def of(self, prompt_tokens: int, cached_tokens: int, completion_tokens: int) -> int:
        """The price in micro-units, rounded up. prompt_tokens includes cached_tokens."""
        fresh = prompt_tokens - cached_tokens
        total = fresh * self.prompt + cached_tokens * self.cached + completion_tokens * self.completion
        return -(-total // _MILLION_TOKENS)

    def at_most(self, prompt_tokens: int, completion_tokens: int) -> int:
        """The highest price of this many tokens, however many of them are cached."""
        total = prompt_tokens * max(self.prompt, self.cached) + completion_tokens * self.completion
        return -(-total // _MILLION_TOKENS)


@dataclass(frozen=True, slots=True)
class Plan:
    """user: for each user on the plan. tenant: for all of a tenant's users on it. everyone: for all users on the plan."""

    name: str
    user: PlanLimits
    tenant: PlanLimits
    everyone: PlanLimits


@dataclass(frozen=True, slots=True)
class Tenant:
    """One tenant's settings. plan: of its users whose token names none. limits: for all of them, on any plan."""

    plan: str | None
    limits: PlanLimits


@dataclass(frozen=True, slots=True)
class Plans:
    """The whole file. currency: of every amount, three letters (ISO 4217). users, groups: plans by `tenant/name`, in the order
    of the file.
    """

    currency: str
    default: str
    plans: Mapping[str, Plan]
    tenants: Mapping[str, Tenant] = field(default_factory=lambda: MappingProxyType({}))
    prices: Mapping[str, Price] = field(default_factory=lambda: MappingProxyType({}))
    users: Mapping[str, str] = field(default_factory=lambda: MappingProxyType({}))
    groups: Mapping[str, str] = field(default_factory=lambda: MappingProxyType({}))

    def plan_of(self, tenant: str, named: str | None, subject: str = "", groups: Collection[str] = ()) -> Plan | None:
        """The plan of a user. Returns None for an unknown plan.

        The first of these that there is: `named`, which is the token's; the user's; that of the first of its groups in the
        file; the tenant's; the default.
        """
        own = self.tenants.get(tenant)
        mapped = self.users.get(f"{tenant}/{subject}") or self._of_groups(tenant, groups)
        return self.plans.get(named or mapped or (own and own.plan) or self.default)

    def _of_groups(self, tenant: str, groups: Collection[str]) -> str | None:
        if not self.groups or not groups:
            return None
        names = {f"{tenant}/{group}" for group in groups}
        return next((plan for name, plan in self.groups.items() if name in names), None)

    def price_of(self, model: str) -> Price | None:
        """None if neither the model nor `*` has one; then no money limit is set."""
        return self.prices.get(model) or self.prices.get(ANY_MODEL)


def load(folder: Path) -> Plans:
    """Reads `plans.toml` of the folder. Raises SettingsError."""
    return _frozen(files.load(_File, folder / PLANS_FILE))


def parse(text: str, path: Path) -> Plans:
    """path: the file's place, for messages. Raises SettingsError."""
    return _frozen(files.parse(_File, text, path))


def money(amount: int) -> str:
    """Micro-units as decimal text, as in the file."""
    sign, digits = "-" if amount < 0 else "", f"{abs(amount):07d}"
    return f"{sign}{digits[:-6]}.{digits[-6:]}"


def micro_units(value: object) -> object:
    """Decimal text in micro-units. A bare number would already be binary here."""
    found = _MONEY.fullmatch(value) if isinstance(value, str) else None
    if found is None:
        raise PydanticCustomError("money", 'write an amount as text, with at most six decimals, such as "12.50"')
    whole, decimals = found.groups(default="")
    return int(whole) * MICRO + int(decimals.ljust(6, "0"))


_Count = Annotated[int, Field(ge=0, le=MAX_AMOUNT, strict=True)]
_Money = Annotated[int, BeforeValidator(micro_units)]


class _Limits(Table):
    requests_per_minute: _Count | None = None
    tokens_per_minute: _Count | None = None
    tokens_per_day: _Count | None = None
    money_per_month: _Money | None = None
    concurrent_streams: _Count | None = None


class _Plan(Table):
    user: _Limits = _Limits()
    tenant: _Limits = _Limits()
    everyone: _Limits = _Limits()


class _Tenant(_Limits):
    plan: str | None = None


class _Price(Table):
    prompt: _Money
    cached: _Money
    completion: _Money


def _member(name: str) -> str:
    if _MEMBER.fullmatch(name) is None:
        raise PydanticCustomError("member", 'write the tenant before the name, such as "acme/alice"')
    return name


_Member = Annotated[str, AfterValidator(_member)]


class _File(Table):
    currency: Annotated[str, Field(pattern=r"^[A-Z]{3}$")] = "USD"
    default_plan: str
    plans: Annotated[dict[str, _Plan], Field(min_length=1)]
    tenants: dict[str, _Tenant] = Field(default_factory=dict)
    prices: dict[str, _Price] = Field(default_factory=dict)
    users: dict[_Member, str] = Field(default_factory=dict)
    groups: dict[_Member, str] = Field(default_factory=dict)

    @model_validator(mode="after")
    def _consistent(self) -> _File:
        named = {"default_plan": self.default_plan}
        named |= {f"tenants.{name}.plan": tenant.plan for name, tenant in self.tenants.items() if tenant.plan is not None}
        named |= {f"users.{name}": plan for name, plan in self.users.items()}
        named |= {f"groups.{name}": plan for name, plan in self.groups.items()}
        for key, plan in named.items():
            if plan not in self.plans:
                raise PydanticCustomError("plan", "{key}: no such plan; write one of {known}", {
                    "key": key, "known": ", ".join(sorted(self.plans)),
                })  # fmt: skip
        if self._counts_money() and ANY_MODEL not in self.prices:
            raise PydanticCustomError(
                "prices", 'prices: a money_per_month needs the price of every model; add a table [prices."*"]'
            )
        return self

    def _counts_money(self) -> bool:
        limits = [*self.tenants.values()]
        limits += [limit for plan in self.plans.values() for limit in (plan.user, plan.tenant, plan.everyone)]  # type: ignore[misc]
        return any(limit.money_per_month is not None for limit in limits)


def _frozen(file: _File) -> Plans:
    return Plans(
        currency=file.currency,
        default=file.default_plan,
        plans=MappingProxyType(
            {
                name: Plan(name, _limits(plan.user), _limits(plan.tenant), _limits(plan.everyone))
                for name, plan in file.plans.items()
            }
        ),
        tenants=MappingProxyType({name: Tenant(tenant.plan, _limits(tenant)) for name, tenant in file.tenants.items()}),
        prices=MappingProxyType(
            {name: Price(price.prompt, price.cached, price.completion) for name, price in file.prices.items()}
        ),
        users=MappingProxyType(dict(file.users)),
        groups=MappingProxyType(dict(file.groups)),
    )


def _limits(table: _Limits) -> PlanLimits:
    return PlanLimits(**{entry.name: getattr(table, entry.name) for entry in fields(PlanLimits)})
