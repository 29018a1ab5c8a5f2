"""One gateway's leases and an administrator's additions, step by step: what a proposal, a record and a change do alone."""

from __future__ import annotations

import asyncio
import json
from dataclasses import replace

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from lacre_gateway.budget import lease
from lacre_gateway.budget.additions import MAX_ADDITIONS, Addition, Approver
from lacre_gateway.budget.draws import CeilingChange, Draw, answer
from lacre_gateway.budget.lease import COVER, IDLE, Account, Counter, Need, commit, lacking
from lacre_gateway.budget.plans import LimitKind
from lacre_gateway.budget.record import Record
from lacre_gateway.budget.windows import windows_at

START = 1_800_000_000.0
LONGEST = 100.0
APPROVER = Approver(Ed25519PrivateKey.from_private_bytes(bytes([1] * 32)))
GENUINE = APPROVER.check("key")
LOOP = asyncio.new_event_loop()  # for futures that nobody awaits


def test_what_is_released_while_a_write_is_under_way_is_given_back_after_its_window() -> None:
    """The last request of an old window ends between the write and its confirmation: the record still has it as reserved."""
    kind, record = LimitKind.REQUESTS_PER_MINUTE, None
    account = Account("key", "name", "g1", LONGEST, touched=START)

    def written(windows: dict[LimitKind, int], needs: list[Need], settle: Counter | None = None) -> Record:
        proposal = account.propose(record, windows, needs, START)
        account.send(proposal)
        if settle is not None:
            settle.settle(1, 0)
        account.confirm(proposal, START)
        return proposal.record

    record = written({kind: 1}, [Need({kind: (1, 20)})])
    old = account.current[kind]
    commit([(old, 1)])
    account.counter(kind, 2, 20)
    record = written({kind: 2}, [], settle=old)
    assert account.due(START + IDLE + 1), "something is left to be given back"
    record = written({kind: 2}, [])
    share = record.share(kind, 1, "g1")
    assert share is None or (share.drawn, share.used) == (0, 0)


@pytest.mark.parametrize("every", [0.25, 1.0, 4.0])
def test_a_lease_covers_what_is_used_in_some_seconds(every: float) -> None:
    """One user asks again and again. Whenever the bucket goes away, the lease serves on for a while, after a new minute too."""
    account, record, now = Account("user.x", "x", "g1", LONGEST), None, START
    held: list[float] = []
    while now < START + 150:
        windows = windows_at(now)
        charge = [(account.counter(LimitKind.REQUESTS_PER_MINUTE, windows[LimitKind.REQUESTS_PER_MINUTE], 600), 1)]
        account.touched = now
        counter = charge[0][0]
        if lacking(charge, now) or counter.spare <= counter.low or account.due(now):
            proposal = account.propose(record, windows, [Need({LimitKind.REQUESTS_PER_MINUTE: (1, 600)})], now)
            account.send(proposal)
            record = proposal.record
            account.confirm(proposal, now)
        assert lacking(charge, now) == []
        commit(charge)
        counter.settle(1, 1)
        if now > START + 70:
            held.append(counter.spare * every)
        now += every
    assert min(held) > COVER / 2 - 2 * every  # seconds of what it uses
    assert max(held) < 2 * COVER + 600 / lease.LEAST_SPARE * every


def raised(account: Account, record: Record | None, amount: int | None, number: str) -> tuple[Record, int | None]:
    """One change, as a gateway writes it."""
    kind, draw = LimitKind.TOKENS_PER_DAY, Draw(account, record)
    draw.changes.append(change := CeilingChange(kind, 1, number, amount, LOOP.create_future()))
    record, results = draw.changed(APPROVER)
    answer(results)
    return (record or Record("name")).with_others((), {kind: 1}, GENUINE), change.done.result()


def test_a_reset_leaves_the_whole_ceiling_of_the_plan() -> None:
    """Also after a top-up, and once more: it gives back what was used beyond what was added."""
    kind, account = LimitKind.TOKENS_PER_DAY, Account("key", "name", "g1", LONGEST, touched=START)
    record, added = raised(account, None, 100, "top-up")
    assert (added, record.added_to(kind, 1)) == (100, 100)
    proposal = account.propose(record, {kind: 1}, [Need({kind: (1000, 1000)})], START)
    account.send(proposal)
    account.confirm(proposal, START)
    counter = account.counter(kind, 1, 1000)
    commit([(counter, 900)])
    counter.settle(900, 700)
    record, added = raised(account, proposal.record, None, "reset")
    assert (added, record.added_to(kind, 1)) == (600, 700)
    for number in ("reset", "once more"):
        record, added = raised(account, record, None, number)
        assert (added, record.added_to(kind, 1)) == ({"reset": 600, "once more": 0}[number], 700)
    assert raised(account, record, 5000, "top-up")[1] == 100, "a number counts once"


def test_a_number_counts_once_whatever_the_clock_says() -> None:
    """A gateway whose clock is far off counts no addition of its window, not even its own; it still adds none twice."""
    account, kind = Account("key", "name", "g1", LONGEST), LimitKind.TOKENS_PER_DAY
    record, _ = raised(account, None, 10, "a")
    unseen = replace(record, raised={})
    record, added = raised(account, unseen, 70, "a")
    assert (added, record.added_to(kind, 1)) == (10, 10)


def test_a_repeated_number_counts_once_more_under_another_key() -> None:
    """A new signing key ends the additions of the old one: to repeat one is how an administrator makes it count again."""
    account, kind = Account("key", "name", "g1", LONGEST), LimitKind.TOKENS_PER_DAY
    of_old_key = Approver(Ed25519PrivateKey.generate()).sign("key", (kind, 1), "a", 10)
    record = Record("name").raised_by((kind, 1), "a", of_old_key)
    record, added = raised(account, replace(record, raised={}), 70, "a")
    assert (added, record.added_to(kind, 1)) == (70, 70)


def test_additions_are_bounded_and_forgotten() -> None:
    account, record = Account("key", "name", "g1", LONGEST), None
    for number in range(MAX_ADDITIONS):
        record, added = raised(account, record, 1, str(number))
        assert added == 1
    assert raised(account, record, 1, "one more") == (record, None)
    kind = LimitKind.TOKENS_PER_DAY
    assert record is not None and record.added_to(kind, 1) == MAX_ADDITIONS
    later = record.raised_by((kind, 3), "x", APPROVER.sign("key", (kind, 3), "x", 1))
    assert set(later.added) == {(kind, 3)}


@pytest.mark.parametrize("amount", ["1", -1, 0, 1.5, 2**70, None, True])
def test_an_addition_that_cannot_be_read_spoils_its_part_alone(amount: object) -> None:
    kind = LimitKind.TOKENS_PER_DAY
    record, _ = raised(Account("key", "name", "g1", LONGEST), None, 10, "a")
    bad = json.dumps({"v": 1, "name": "x", "kinds": {}, "added": {kind.value: {"1": {"b": [amount, "x"]}}}}).encode()
    assert record.with_others([bad], {kind: 1}, GENUINE).added_to(kind, 1) == 10
    assert not GENUINE((kind, 1), "b", Addition(1, "not base64url!"))


@pytest.mark.parametrize("arrives", [True, False])
def test_a_write_in_doubt_counts_once_it_can_be_read(arrives: bool) -> None:
    """One that did not arrive raises no capacity: it may still be refused."""
    kind = LimitKind.REQUESTS_PER_MINUTE
    draw = Draw(Account("key", "name", "g1", LONGEST, touched=START))
    first = draw.account.propose(None, {kind: 1}, [Need({kind: (1, 64)})], START)
    draw.account.send(first)
    draw.account.confirm(first, START)
    before = draw.account.current[kind].capacity
    second = draw.account.propose(first.record, {kind: 1}, [Need({kind: (30, 64)})], START)
    draw.account.send(second)
    draw.doubt(second)
    draw.record = Record.parse((second if arrives else first).record.encode())
    assert (draw.happened(START) is second) is arrives
    capacity = draw.account.current[kind].capacity
    assert capacity >= 30 if arrives else capacity == before
    assert draw.happened(START) is None, "once"


def test_an_addition_to_an_unknown_limit_spoils_nothing() -> None:
    """A newer gateway may add to limits of further kinds: its draws still count."""
    kind = LimitKind.TOKENS_PER_DAY
    record, _ = raised(Account("key", "name", "g1", LONGEST), None, 10, "a")
    drawn = {kind.value: {"1": {"settled": 7, "shares": {}}}, "pictures_per_day": {"1": {"of": "another shape"}}}
    newer = {"v": 1, "name": "x", "kinds": drawn, "added": {"pictures_per_day": {"a week": {"b": 1}}}}
    read = Record("name").with_others([record.encode(), json.dumps(newer).encode()], {kind: 1}, GENUINE)
    assert (read.used(kind, 1), read.added_to(kind, 1)) == (7, 10)
