"""The header fields about a caller's limits. Names and policies are kept; who was told before never changes them."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from lacre_gateway.budget import counters, fields, limit_fields
from lacre_gateway.budget.callers import PLAN, TENANT, USER, BudgetScope, Caller
from lacre_gateway.budget.counters import CallersCounters, Standing
from lacre_gateway.budget.holds import Hold, Lender
from lacre_gateway.budget.in_flight import Reservation
from lacre_gateway.budget.lease import Account
from lacre_gateway.budget.plans import LimitKind
from lacre_gateway.budget.windows import windows_at

NOW = 1_800_000_000.0
KINDS = st.sampled_from(LimitKind)
COUNTS = st.integers(0, 3)
SCOPES = st.sampled_from([USER, TENANT, PLAN])
STANDINGS = st.lists(st.builds(Standing, SCOPES, KINDS, COUNTS, COUNTS, st.none() | st.floats(0, 100)), max_size=4)


def forget() -> None:
    for kept in (limit_fields.policies_of, limit_fields.name_of, counters._name):
        kept.cache_clear()


@given(st.lists(STANDINGS, max_size=5))
def test_fields_do_not_depend_on_those_before(told: list[list[Standing]]) -> None:
    forget()
    together = [fields.fields(standings) for standings in told]
    alone = []
    for standings in told:
        forget()
        alone.append(fields.fields(standings))
    assert together == alone


def test_fields_as_the_draft_has_them() -> None:
    told = [
        Standing(USER, LimitKind.REQUESTS_PER_MINUTE, 60, 59, 12.1),
        Standing(TENANT, LimitKind.CONCURRENT_STREAMS, 8, 7, None),
        Standing(PLAN, LimitKind.TOKENS_PER_DAY, 10**6, 9, 1.0),
    ]
    assert dict(fields.fields(told))[b"ratelimit-policy"] == (
        b'"user/requests_per_minute";q=60;w=60;qu="requests", "tenant/concurrent_streams";q=8;qu="concurrent-requests"'
    )
    assert dict(fields.fields(told))[b"ratelimit"] == b'"user/requests_per_minute";r=59;t=13, "tenant/concurrent_streams";r=7'


@given(
    st.dictionaries(SCOPES, st.dictionaries(KINDS, st.integers(0, 9), min_size=1)),
    st.lists(st.tuples(*[st.integers(0, 6)] * 3), min_size=15, max_size=15),
    st.floats(0, 100, exclude_max=True) | st.integers(0, 86_400),
)
def test_what_requests_share_changes_no_field(
    ceilings: dict[str, dict[LimitKind, int]], amounts: list[tuple[int, int, int]], passed: float
) -> None:
    """Whatever was drawn by others, used and reserved since the fields were written for the caller."""
    windows = windows_at(NOW)
    scopes = [BudgetScope(label, label, label, tuple(limits.items())) for label, limits in ceilings.items()]
    accounts = [(scope, Account(scope.key, scope.name, "holder", 60.0)) for scope in scopes]
    charged = CallersCounters(Caller("p", tuple(scopes)), windows, accounts)
    counters = [counter for _, account in accounts for counter in account.current.values()]
    for counter, (others, used, reserved) in zip(counters, amounts, strict=False):
        counter.others, counter.used, counter.reserved = others, used, reserved
    assert charged.fields(NOW + passed) == fields.fields(charged.standings(NOW + passed))


@given(st.lists(st.tuples(SCOPES, st.sampled_from("ab"), KINDS, COUNTS), min_size=1, max_size=6))
def test_names_of_limits_do_not_depend_on_those_before(asked: list[tuple[str, str, LimitKind, int]]) -> None:
    forget()
    for label, plan, kind, later in asked:
        window = 24_000 + later
        scope = BudgetScope(label, "key", "name", ((kind, 5),))
        caller, account = Caller(plan, (scope,)), Account("key", "name", "holder", 60.0)
        charged = CallersCounters(caller, {kind: window}, [(scope, account)])
        hold = Hold(caller, None, Reservation(1, 1), Lender("holder"), charged)
        assert hold.limits == (f"{label}:{plan}/{kind}@{window}",)
