"""The algorithm of budgets, simulated: gateways that race, crash and lose acknowledgements, over clocks that step.

What is asserted after every step, whatever came before it:
- Overshoot is 0: what all gateways, dead ones too, have used and reserved of a window never exceeds its ceiling.
- An administrator's additions raise a ceiling once each, for all gateways, and none is lost, doubled or forged.
- Waste is bounded: a crash forfeits no more than was reserved, than was released since its last write, and a lease's spare
  (an eighth of the ceiling at most), beside what its last write asked for, and those before it that nobody knows whether they
  happened.
And at the end, when everybody has come to rest: what the record says is drawn is what was used, and what is forfeited.
"""

from __future__ import annotations

import asyncio
import json
import math
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule, run_state_machine_as_test

from lacre_gateway.budget import lease
from lacre_gateway.budget.additions import Approver
from lacre_gateway.budget.draws import CeilingChange, Draw
from lacre_gateway.budget.lease import IDLE, MOST_SPARE, Account, Counter, Need, Proposal, commit, lacking
from lacre_gateway.budget.plans import LimitKind
from lacre_gateway.budget.record import Record
from lacre_gateway.budget.windows import Calendar, window, windows_at

START = 1_800_000_000.0
LONGEST = 100.0
GATEWAYS = 3
CEILINGS = {
    LimitKind.REQUESTS_PER_MINUTE: 20,
    LimitKind.TOKENS_PER_MINUTE: 3000,
    LimitKind.TOKENS_PER_DAY: 9000,
    LimitKind.MONEY_PER_MONTH: 100_003,
    LimitKind.CONCURRENT_STREAMS: 7,
}
STREAMS = LimitKind.CONCURRENT_STREAMS
At = tuple[LimitKind, int]  # a kind, and the number of a window of it
# What a stolen credential's part may be; empty for one of the right form.
RIGHT, NO_KINDS = b"", b'{"v":1,"name":"x","kinds":{"requests_per_minute":{"x":1}}}'
LIES = [RIGHT, RIGHT, RIGHT, b"not a record", b"[" * 100_000, b'{"v":2}', NO_KINDS]
AMOUNTS = st.sampled_from([0, -(10**6), 1, 10**6, 10**30])
WHO, TOKENS, MONEY = st.integers(0, GATEWAYS - 1), st.integers(1, 1500), st.integers(0, 30_000)
WHEN = st.sampled_from(["now", "later", "never"])
COUNTED = st.sampled_from([kind for kind in LimitKind if kind is not STREAMS])
APPROVER, FORGER = (Approver(Ed25519PrivateKey.from_private_bytes(bytes([number] * 32))) for number in (1, 2))
GENUINE = APPROVER.check("key")
LOOP = asyncio.new_event_loop()  # for futures that nobody awaits


@dataclass
class Request:
    charges: list[tuple[Counter, int]]
    ends: float


@dataclass
class Writing:
    """A write that was sent. revision: what it compares with. writer: the number of its gateway."""

    proposal: Proposal
    revision: int
    writer: int
    released: dict[At, int]  # what its gateway had settled by then, and the proposal reports


@dataclass
class Gateway:
    """One holder. clock: how far its clock is off. read: the record as it last read it, and the revision of that. doubted: the
    last write whose answer was lost, until it reads the record.
    """

    account: Account
    clock: float = 0.0
    read: tuple[Record | None, int] | None = None
    writing: Writing | None = None
    doubted: Writing | None = None
    requests: list[Request] = field(default_factory=list)
    calendar: Calendar = field(default_factory=Calendar)
    released: dict[At, int] = field(default_factory=lambda: defaultdict(int))
    asked: dict[At, int] = field(default_factory=lambda: defaultdict(int))


class Budgets(RuleBasedStateMachine):
    """The store is one record; a write that was sent may happen at once, later, or never, and its sender may not hear of it."""

    def __init__(self) -> None:
        super().__init__()
        self.now = START
        self.record: Record | None = None
        self.revision = 0
        self.born = 0
        self.live = [self.gateway() for _ in range(GATEWAYS)]
        self.ghosts: list[Writing] = []
        self.used: dict[At, int] = defaultdict(int)  # the truth, by what was committed and settled
        self.reserved: dict[At, int] = defaultdict(int)
        self.streams: list[float] = []  # of dead gateways: when the stream ends
        self.forfeited: dict[At, dict[str, int]] = defaultdict(dict)  # the most that it may be, by holder
        self.raised: dict[At, dict[str, int]] = defaultdict(dict)  # by the writes that happened

    def ceiling(self, kind: LimitKind, number: int) -> int:
        return CEILINGS[kind] + sum(self.raised[kind, number].values())

    def gateway(self) -> Gateway:
        self.born += 1
        return Gateway(Account("key", "name", f"g{self.born}", LONGEST, touched=START))

    def time(self, gateway: Gateway) -> float:
        return self.now + gateway.clock

    # What gateways do

    @rule(who=WHO, tokens=TOKENS, money=MONEY)
    def ask(self, who: int, tokens: int, money: int) -> None:
        """A request that is served if the leases in hand allow it."""
        gateway = self.live[who]
        now = self.time(gateway)
        gateway.account.touched = now
        windows = gateway.calendar.at(now)
        amounts = self.amounts(tokens, money)
        charges = [(gateway.account.counter(kind, windows[kind], ceiling), amounts[kind]) for kind, ceiling in CEILINGS.items()]
        if not lacking(charges, now):
            commit(charges)
            for counter, amount in charges:
                self.reserved[counter.kind, counter.window] += amount
            gateway.requests.append(Request(charges, self.now + LONGEST))

    @staticmethod
    def amounts(tokens: int, money: int) -> dict[LimitKind, int]:
        return dict.fromkeys(LimitKind, 1) | {
            LimitKind.TOKENS_PER_MINUTE: tokens, LimitKind.TOKENS_PER_DAY: tokens, LimitKind.MONEY_PER_MONTH: money,
        }  # fmt: skip

    @rule(who=WHO, which=st.integers(0, 50), part=st.floats(0, 1))
    def settle(self, who: int, which: int, part: float) -> None:
        gateway = self.live[who]
        if gateway.requests:
            self.end(gateway, gateway.requests.pop(which % len(gateway.requests)), part)

    def end(self, gateway: Gateway, request: Request, part: float) -> None:
        for counter, amount in request.charges:
            used = math.floor(amount * part)
            at = counter.kind, counter.window
            counter.settle(amount, used)
            self.reserved[at] -= amount
            gateway.released[at] += amount
            if counter.kind is not STREAMS:
                self.used[at] += used

    @rule(who=WHO)
    def read(self, who: int) -> None:
        gateway = self.live[who]
        if gateway.writing is None:
            record = self.shown(who)
            gateway.read = (record, self.revision)
            if record is not None:
                gateway.account.see(record)
            doubted, gateway.doubted = gateway.doubted, None
            draw = Draw(gateway.account, record, doubted=None if doubted is None else doubted.proposal)
            if draw.happened(self.time(gateway)) is not None and doubted is not None:
                self.heard(gateway, doubted)

    def shown(self, _who: int) -> Record | None:
        """What a gateway reads."""
        return self.record

    def own(self, _who: int) -> Record | None:
        """Where a gateway's capacity has to stand."""
        return self.record

    @rule(who=WHO, needs=st.lists(st.tuples(TOKENS, MONEY), max_size=4))
    def send(self, who: int, needs: list[tuple[int, int]], changes: Sequence[CeilingChange] = ()) -> None:
        """Decides on what it read, however old that is."""
        gateway = self.live[who]
        if gateway.writing is None and gateway.read is not None:
            record, revision = gateway.read
            record, _ = Draw(gateway.account, record, changes=list(changes)).changed(APPROVER)
            now = self.time(gateway)
            wanted = [Need({kind: (amount, CEILINGS[kind]) for kind, amount in self.amounts(*each).items()}) for each in needs]
            proposal = gateway.account.propose(record, gateway.calendar.at(now), wanted, now)
            gateway.account.send(proposal)
            gateway.writing, gateway.read = Writing(proposal, revision, who, dict(gateway.released)), None

    @rule(who=WHO, kind=COUNTED, amount=st.none() | st.integers(1, 5000), number=st.sampled_from("abc"), money=MONEY)
    def raise_ceiling(self, who: int, kind: LimitKind, amount: int | None, number: str, money: int) -> None:
        """A top-up, or a reset, while a request waits. The same may be asked of several gateways."""
        gateway = self.live[who]
        change = CeilingChange(kind, gateway.calendar.at(self.time(gateway))[kind], number, amount, LOOP.create_future())
        self.read(who)
        self.send(who, [(1, money)], [change])

    @rule(who=WHO)
    def arrive(self, who: int) -> None:
        """The write arrives, and its answer is heard."""
        gateway = self.live[who]
        if gateway.writing is None:
            return
        writing, gateway.writing = gateway.writing, None
        if self.apply(writing):
            gateway.account.confirm(writing.proposal, self.time(gateway))
            self.heard(gateway, writing)
        else:
            gateway.account.conflict(writing.proposal)

    def heard(self, gateway: Gateway, writing: Writing) -> None:
        for at, amount in writing.released.items():
            gateway.released[at] -= amount
        gateway.asked.clear()
        self.remember(gateway, writing)  # drawn for requests that wait, and may not come to it

    @rule(who=WHO, tokens=TOKENS, money=MONEY)
    def serve(self, who: int, tokens: int, money: int) -> None:
        """What mostly happens: it reads, draws, is answered, and serves."""
        self.read(who)
        self.send(who, [(tokens, money)])
        self.arrive(who)
        self.ask(who, tokens, money)

    @rule(who=WHO, part=st.floats(0, 1), happens=WHEN)
    def give_back_unheard(self, who: int, part: float, happens: str) -> None:
        """It settles, writes what is left, and never hears of that."""
        self.settle(who, 0, part)
        self.read(who)
        self.send(who, [])
        self.lose(who, happens)

    @rule(who=WHO, happens=WHEN)
    def lose(self, who: int, happens: str) -> None:
        """The answer is lost."""
        gateway = self.live[who]
        if gateway.writing is None:
            return
        writing, gateway.writing = gateway.writing, None
        gateway.account.doubt(writing.proposal)
        gateway.doubted = writing
        self.remember(gateway, writing)
        if happens == "now":
            self.apply(writing)
        elif happens == "later":
            self.ghosts.append(writing)

    def remember(self, gateway: Gateway, writing: Writing) -> None:
        for counter, want, _ in writing.proposal.lots:
            at = counter.kind, counter.window
            gateway.asked[at] += sum(want.needs) + want.ceiling // MOST_SPARE

    @precondition(lambda self: self.ghosts)
    @rule(which=st.integers(0, 50))
    def haunt(self, which: int) -> None:
        """A write arrives that its sender gave up, or that is of a gateway that died."""
        self.apply(self.ghosts.pop(which % len(self.ghosts)))

    def apply(self, writing: Writing) -> bool:
        if writing.revision != self.revision:
            return False
        self.revision += 1
        for at, kept in writing.proposal.record.raised.items():
            for number, amount in kept.items():
                self.count(at, number, amount)
        self.keep(writing)
        return True

    def count(self, at: At, number: str, amount: int) -> None:
        assert self.raised[at].setdefault(number, amount) == amount, "it counts once"

    def keep(self, writing: Writing) -> None:
        """Over the wire and back: what is not in the bytes is not in the record."""
        self.record = self.parsed(writing.proposal.record.encode())

    def parsed(self, part: bytes) -> Record:
        return Record.parse(part).with_others((), windows_at(self.now), GENUINE)

    # What happens to them

    @rule(who=WHO)
    def crash(self, who: int) -> None:
        """Another takes its place, and knows nothing of it. Its streams go on for as long as streams may."""
        gateway = self.live[who]
        if gateway.writing is not None:
            self.remember(gateway, gateway.writing)
            self.ghosts.append(gateway.writing)
        for counter in (*gateway.account.past, *gateway.account.current.values()):
            at = counter.kind, counter.window
            most = counter.reserved + gateway.released[at] + gateway.asked[at] + self.ceiling(*at) // MOST_SPARE
            self.forfeited[at][gateway.account.holder] = most
        self.streams += [request.ends for request in gateway.requests]
        for request in gateway.requests:
            for counter, amount in request.charges:
                at = counter.kind, counter.window
                self.reserved[at] -= amount
                if counter.kind is not STREAMS:
                    self.used[at] += amount  # nobody will ever know: it may have been used
        self.live[who] = self.gateway()

    @rule(seconds=st.floats(0, 90))
    def wait(self, seconds: float) -> None:
        self.now += seconds
        self.streams = [ends for ends in self.streams if ends > self.now]
        for gateway in self.live:
            for request in [request for request in gateway.requests if request.ends <= self.now]:
                gateway.requests.remove(request)
                self.end(gateway, request, 1.0)

    @rule(who=WHO, seconds=st.floats(-lease.CLOCK_MARGIN / 2, lease.CLOCK_MARGIN / 2))
    def step(self, who: int, seconds: float) -> None:
        """Streams' leases go by the clock: where they are in play, clocks differ by no more than their margin."""
        self.live[who].clock = seconds

    # What must be true

    @invariant()
    def never_more_than_the_ceiling(self) -> None:
        for (kind, number), used in self.used.items():
            assert used + self.reserved[kind, number] <= self.ceiling(kind, number), (kind, number)

    @invariant()
    def no_addition_is_lost_or_forged(self) -> None:
        open_now = windows_at(self.now)
        for who in range(GATEWAYS):
            record = self.shown(who) or Record("name")
            for kind, number in open_now.items():
                assert record.raised.get((kind, number), {}) == self.raised.get((kind, number), {}), (kind, number)

    @invariant()
    def never_more_streams(self) -> None:
        running = self.reserved[STREAMS, 0] + len(self.streams)
        assert running <= CEILINGS[STREAMS]

    @invariant()
    def capacity_stands_in_the_record(self) -> None:
        for who, gateway in enumerate(self.live):
            own = self.own(who)
            for counter in gateway.account.current.values():
                assert counter.reserved >= 0
                share = None if own is None else own.share(counter.kind, counter.window, gateway.account.holder)
                over = own is not None and counter.window < own.floor(counter.kind)
                if not over and counter.kind is not STREAMS:
                    assert counter.capacity <= (0 if share is None else share.drawn)

    def teardown(self) -> None:
        """Everybody comes to rest: nothing is lost but what crashed gateways had."""
        while self.ghosts:
            self.haunt(0)
        for gateway in self.live:
            if gateway.writing is not None:
                gateway.account.doubt(gateway.writing.proposal)
                gateway.writing = None
            gateway.clock = 0.0
            while gateway.requests:
                self.end(gateway, gateway.requests.pop(), 1.0)
        for gateway in self.live:
            gateway.account.due(self.now)  # by now all clocks are right
        self.now += IDLE
        for who, gateway in enumerate(self.live):
            for _ in range(3):
                if gateway.account.due(self.now):
                    self.read(who)
                    self.send(who, [])
                    self.arrive(who)
            assert not gateway.account.due(self.now)
            assert gateway.account.at_rest
        self.balance()

    def balance(self) -> None:
        alive = {gateway.account.holder for gateway in self.live}
        kinds = {} if self.record is None else self.record.windows
        windows = {(kind, number): found for kind, kept in kinds.items() for number, found in kept.items()}
        for (kind, number), found in windows.items():
            lost = {name: share for name, share in found.shares.items() if name not in alive}
            for name, share in found.shares.items():
                if name in alive:
                    assert share.drawn == share.used, (kind, number, name)
            if kind is STREAMS:
                assert not set(found.shares) - set(lost)
                continue
            for name, share in lost.items():
                assert share.drawn - share.used <= self.forfeited[kind, number].get(name, 0), (kind, number, name)
            wasted = sum(share.drawn - share.used for share in lost.values())
            assert found.drawn() >= self.used[kind, number] >= found.drawn() - wasted


class Parts(Budgets):
    """Each gateway has a credential, and so a part of the record that it alone writes. One more credential is stolen, and its
    part says whatever it likes: nobody is served beyond the ceiling for it.
    """

    def __init__(self) -> None:
        super().__init__()
        self.parts: dict[int, bytes] = {}
        self.stolen: list[bytes] = []

    def own(self, who: int) -> Record:
        return Record.parse(self.parts[who]) if who in self.parts else Record("name")

    def shown(self, who: int) -> Record:
        others = [part for writer, part in self.parts.items() if writer != who]
        return self.own(who).with_others([*others, *self.stolen], windows_at(self.now), GENUINE)

    def keep(self, writing: Writing) -> None:
        self.parts[writing.writer] = writing.proposal.record.encode()
        self.record = Record("name").with_others(self.parts.values(), windows_at(self.now), GENUINE).merged()

    @rule(who=WHO, lie=st.sampled_from(LIES), ahead=st.integers(-2, 10**9), amount=AMOUNTS)
    def lies(self, who: int, lie: bytes, ahead: int, amount: int) -> None:
        """Also in the name of another's holder."""
        at = {kind: str(number + ahead if number else 0) for kind, number in windows_at(self.now).items()}
        shares = {"stolen": [amount, amount], self.live[who].account.holder: [amount, 0, "closed"]}
        kinds = {kind.value: {number: {"settled": amount, "shares": shares}} for kind, number in at.items()}
        told = {"v": 1, "name": "lie", "kinds": kinds, "added": self.forged(amount)}
        self.stolen = [lie or json.dumps(told).encode()]
        self.revision += 1

    def forged(self, amount: int) -> dict[str, dict[str, dict[str, list[object]]]]:
        """Genuine additions once more and in other windows and limits, and some by another key."""
        found: dict[str, dict[str, dict[str, list[object]]]] = {kind.value: {} for kind in LimitKind}
        parts = [Record.parse(part).added for part in self.parts.values()]
        known = [pair for added in parts for kept in added.values() for pair in kept.items()]
        for kind, now in windows_at(self.now).items():
            for at in (now - 1, now, now + 1):
                forgery = FORGER.sign("key", (kind, at), "f", max(1, amount))
                every = [*known, ("f", forgery)]
                found[kind.value][str(at)] = {name: [each.amount, each.signature] for name, each in every}
        return found

    def teardown(self) -> None:
        self.stolen = []
        super().teardown()


class AnyClocks(Budgets):
    """Clocks that differ by anything: what is counted by windows is as safe as ever. Streams are left out.

    A gateway whose clock is ahead may forget an addition, which can then be made again. It still counts once.
    """

    @rule(who=WHO, seconds=st.floats(-200_000, 200_000))
    def step(self, who: int, seconds: float) -> None:
        self.live[who].clock = seconds

    def count(self, at: At, number: str, amount: int) -> None:
        self.raised[at][number] = max(amount, self.raised[at].get(number, 0))

    def no_addition_is_lost_or_forged(self) -> None:
        record = self.shown(0) or Record("name")
        for kind, number in windows_at(self.now).items():
            for name, amount in record.raised.get((kind, number), {}).items():
                assert amount <= self.raised[kind, number][name], (kind, number)

    def never_more_streams(self) -> None:
        """No invariant here."""


@pytest.mark.parametrize(
    ("examples", "steps"), [(60, 50), pytest.param(300, 80, marks=(pytest.mark.slow, pytest.mark.timeout(600)))]
)
@pytest.mark.parametrize("machine", [Budgets, Parts, AnyClocks])
def test_whatever_happens(machine: type[Budgets], examples: int, steps: int) -> None:
    phases = tuple(Phase) if examples == 60 else (Phase.generate, Phase.shrink)
    unhurried = [HealthCheck.too_slow, HealthCheck.filter_too_much]
    how = settings(
        max_examples=examples, stateful_step_count=steps, phases=phases, deadline=None, suppress_health_check=unhurried
    )
    run_state_machine_as_test(machine, settings=how)


def test_a_lie_about_a_coming_window_keeps_nothing_drawn_in_a_past_one() -> None:
    """It makes the past window over for good; what an honest gateway had drawn there is given back all the same."""
    machine = Parts()
    machine.serve(who=1, tokens=1, money=0)
    machine.wait(10)
    machine.wait(90)
    machine.serve(who=0, tokens=1, money=0)
    machine.lies(who=0, lie=RIGHT, ahead=1, amount=0)
    machine.serve(who=1, tokens=1, money=0)
    machine.capacity_stands_in_the_record()
    machine.teardown()


def test_windows_are_of_utc() -> None:
    assert window(LimitKind.MONEY_PER_MONTH, START) == 2027 * 12
    assert window(LimitKind.TOKENS_PER_DAY, START) == 20833
