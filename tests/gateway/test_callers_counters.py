"""The counters that a caller's requests share: never those of another window, of a forgotten account, or of another ceiling."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

from hypothesis import example, given
from hypothesis import strategies as st

from lacre_gateway.budget.callers import Amounts, BudgetScope, Caller
from lacre_gateway.budget.counters import CallersCounters
from lacre_gateway.budget.draws import Draw
from lacre_gateway.budget.fields import fields
from lacre_gateway.budget.lease import Account, Need, Proposal, commit, lacking
from lacre_gateway.budget.plans import LimitKind
from lacre_gateway.budget.record import Record
from lacre_gateway.budget.windows import Calendar, windows_at

LIMITS = ((LimitKind.REQUESTS_PER_MINUTE, 6_000), (LimitKind.TOKENS_PER_DAY, 10**6), (LimitKind.CONCURRENT_STREAMS, 500))
SCOPE = BudgetScope("user", "user.x", "x", LIMITS)
CALLER = Caller("p", (SCOPE,))
ONE = Amounts(1, 100, 0)
NEEDS = [Need({kind: (1, ceiling) for kind, ceiling in LIMITS})]
STEPS = ["minute", "day", "propose", "report", "confirm", "conflict", "doubt", "see", "raise", "ahead", "forget", "serve"]
NOW = 1_800_000_000.0


@dataclass
class Kept:
    """A caller's counters, kept while they say that they are current. proposal: a write whose result is open."""

    now: float = NOW
    calendar: Calendar = field(default_factory=Calendar)
    draws: dict[str, Draw] = field(default_factory=dict)
    record: Record | None = None
    proposal: Proposal | None = None
    counters: CallersCounters | None = None

    @property
    def account(self) -> Account:
        if SCOPE.key not in self.draws:
            self.draws[SCOPE.key] = Draw(Account(SCOPE.key, SCOPE.name, "holder", 60.0))
        return self.draws[SCOPE.key].account

    def propose(self, *, draws: bool = True) -> None:
        self.proposal = self.account.propose(self.record, self.calendar.at(self.now), NEEDS if draws else [], self.now)
        self.account.send(self.proposal)

    def result(self, what: str) -> None:
        """Of the write that was proposed before, if its account is still there."""
        proposal, self.proposal = self.proposal, None
        if proposal is not None and what == "confirm":
            self.record = proposal.record
            self.account.confirm(proposal, self.now)
        elif proposal is not None:
            getattr(self.account, what)(proposal)

    def step(self, what: str) -> None:
        limit = LimitKind.TOKENS_PER_DAY, self.calendar.at(self.now)[LimitKind.TOKENS_PER_DAY]
        match what:
            case "minute" | "day":
                self.now += 60 if what == "minute" else 86_400
            case "propose" | "report":
                self.propose(draws=what == "propose")
            case "confirm" | "conflict" | "doubt":
                self.result(what)
            case "see":
                self.account.see(Record(SCOPE.name, raised={limit: {"n": 7}}))
            case "raise":  # by another gateway; the next write knows it
                self.record = replace(self.record or Record(SCOPE.name), raised={limit: {"n": 9}})
            case "ahead":  # a gateway whose clock is; windows before its own are closed
                other, later = Account(SCOPE.key, SCOPE.name, "other", 60.0), self.now + 120
                self.record = other.propose(self.record, windows_at(later), NEEDS, later).record
            case "forget":
                self.draws.clear()
                self.proposal = None
            case _:
                counters = self.get()
                if not lacking(charges := counters.charges(ONE), self.now):
                    commit(charges)
                    counters.stream_over(ONE)
                    counters.settle(ONE, Amounts(1, 50, 0))

    def get(self) -> CallersCounters:
        windows = self.calendar.at(self.now)
        if self.counters is None or not self.counters.current(windows, self.draws):
            self.counters = CallersCounters(CALLER, windows, [(SCOPE, self.account)])
        return self.counters


@example(["raise", "report"])
@example(["see"])
@example(["ahead", "propose", "confirm"])
@given(
    st.lists(
        st.sampled_from(STEPS),
        max_size=30,
    )
)
def test_they_are_those_that_a_new_look_would_find(steps: list[str]) -> None:
    kept = Kept()
    for what in steps:
        kept.step(what)
        found, windows = kept.get(), kept.calendar.at(kept.now)
        ceilings = [counter.ceiling for counter, _ in found.charges(ONE)]
        for (kind, ceiling), (counter, _), before in zip(LIMITS, found.charges(ONE), ceilings, strict=True):
            assert kept.account.counter(kind, windows[kind], ceiling) is counter
            assert counter.ceiling == before, "an addition counts"
        assert found.fields(kept.now) == fields(found.standings(kept.now)), "an addition is shown"


def test_they_are_looked_up_once_while_nothing_changes() -> None:
    kept = Kept()
    kept.step("propose")
    kept.step("confirm")
    first = kept.get()
    for _ in range(3):
        kept.step("serve")
        kept.now += 1.0
    assert kept.get() is first


def test_a_lease_that_runs_low_is_told_once() -> None:
    kept = Kept()
    kept.step("propose")
    kept.step("confirm")
    told = []
    while not lacking(charges := (counters := kept.get()).charges(ONE), kept.now):
        commit(charges)
        told += counters.running_low()
    assert told and set(told) == {SCOPE.key}
    assert len(told) <= len(LIMITS)
