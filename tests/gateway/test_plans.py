"""The plans file: what it means to the micro-unit, and an error for every mistake that names the key and the remedy."""

from __future__ import annotations

from fractions import Fraction
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lacre.errors import SettingsError
from lacre_gateway.budget.plans import LimitKind, PlanLimits, Plans, Price, load, money, parse
from lacre_gateway.policy.rules import shipped

TEXT = """
currency = "EUR"
default_plan = "free"

[plans.free.user]
requests_per_minute = 10
tokens_per_day = 0

[plans.paid.tenant]
money_per_month = "30.000001"
tokens_per_minute = 1000
[plans.paid.everyone]
concurrent_streams = 100

[tenants.acme]
plan = "paid"
concurrent_streams = 5

[prices."*"]
prompt = "0.1"
cached = "0"
completion = "12"

[prices.large]
prompt = "3"
cached = "0.30"
completion = "15.5"
"""
PLACE = Path("/etc/lacre/plans.toml")
COUNTS = st.integers(0, 2**31)


def plans(text: str = TEXT) -> Plans:
    return parse(text, PLACE)


def test_values() -> None:
    found = plans()
    assert found.currency == "EUR"
    assert found.plans["free"].user == PlanLimits(requests_per_minute=10, tokens_per_day=0)
    # Zero is a limit, and one that is absent is none.
    limits = {LimitKind.REQUESTS_PER_MINUTE: 10, LimitKind.TOKENS_PER_DAY: 0}
    assert dict(found.plans["free"].user.each()) == limits
    assert found.plans["free"].tenant == found.plans["free"].everyone == PlanLimits()
    assert found.plans["paid"].tenant == PlanLimits(money_per_month=30_000_001, tokens_per_minute=1000)
    assert found.tenants["acme"].limits == PlanLimits(concurrent_streams=5)
    assert found.price_of("large") == Price(3_000_000, 300_000, 15_500_000)
    assert found.price_of("small") == found.prices["*"]


@pytest.mark.parametrize(
    ("tenant", "named", "plan"),
    [
        ("acme", None, "paid"), ("acme", "free", "free"), ("acme", "gold", None),
        ("else", None, "free"), ("else", "paid", "paid"),
    ],
)  # fmt: skip
def test_whose_plan(tenant: str, named: str | None, plan: str | None) -> None:
    found = plans().plan_of(tenant, named)
    assert (found and found.name) == plan


@given(prices=st.tuples(COUNTS, COUNTS, COUNTS), fresh=COUNTS, cached=COUNTS, completion=COUNTS)
def test_a_price_is_exact_and_rounded_up_once(prices: tuple[int, int, int], fresh: int, cached: int, completion: int) -> None:
    exact = Fraction(fresh * prices[0] + cached * prices[1] + completion * prices[2], 10**6)
    price = Price(*prices)
    charged = price.of(fresh + cached, cached, completion)
    assert 0 <= charged - exact < 1
    assert charged <= price.at_most(fresh + cached, completion)


@pytest.mark.parametrize(("amount", "text"), [(0, "0.000000"), (1, "0.000001"), (30_000_001, "30.000001"), (-5, "-0.000005")])
def test_money_as_text(amount: int, text: str) -> None:
    assert money(amount) == text


# What is written in place of what; what the error must say.
MISTAKES = {
    '"30.000001"': ("30.0", "plans.paid.tenant.money_per_month: write an amount as text"),
    '"0.30"': ('"0.0000001"', "prices.large.cached: write an amount as text, with at most six decimals"),
    '"15.5"': ('"-1"', "prices.large.completion: write an amount"),
    "= 10\n": ("= 1.5\n", "plans.free.user.requests_per_minute: must be a valid integer"),
    "= 1000\n": ("= -1\n", "plans.paid.tenant.tokens_per_minute: must be greater than or equal to 0"),
    "tokens_per_day": (
        "token_per_day",
        "user.token_per_day: unknown key; the nearest known one is 'tokens_per_day'",
    ),
    "[plans.paid.everyone]": ("[plans.paid.all]", "plans.paid.all: unknown key"),
    "default_plan": ("default", "default_plan: missing"),
    'default_plan = "free"': ('default_plan = "fre"', "default_plan: no such plan; write one of free, paid"),
    'plan = "paid"': ('plan = "gold"', "tenants.acme.plan: no such plan"),
    '[prices."*"]': ("[prices.small]", r'add a table \[prices\."\*"\]'),
    '"EUR"': ('"euro"', "currency: must match pattern"),
    "[tenants.acme]": ("[tenants.acme", "not TOML"),
}


@pytest.mark.parametrize("old", MISTAKES)
def test_mistakes(old: str) -> None:
    new, said = MISTAKES[old]
    with pytest.raises(SettingsError, match=rf"^/etc/lacre/plans\.toml: .*{said}") as error:
        plans(TEXT.replace(old, new, 1))
    assert "pydantic" not in str(error.value)


def test_files(tmp_path: Path) -> None:
    found = load(shipped())
    assert found.plan_of("anybody", None) is found.plans["standard"]
    with pytest.raises(SettingsError, match="cannot read"):
        load(tmp_path)
