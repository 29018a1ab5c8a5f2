"""The budgets of one gateway process: reserves, settles, and keeps its leases in step with the shared bucket.

Rules:
- A reservation needs no I/O while the present leases suffice. If they do not, the request waits for one draw, for at most
  `DRAW_LIMIT`. All requests that wait for the same budget share the draw, and it is retried as long as one of them waits.
- A request is charged to all its budgets or to none.
- Without the bucket, present leases are served; then requests are refused, with a time to come again.
- Windows follow the time of the bucket's server, so that gateways with different clocks agree on them.
"""

from __future__ import annotations

import asyncio
import contextlib
import random
import secrets
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Final

from lacre.runtime import tasks
from lacre_fabric.logs import Log
from lacre_fabric.nats.kv import Bucket, Conflict, Entry
from lacre_fabric.work.contract import FabricBusy, FabricError, FabricUnavailable
from lacre_gateway.auth.tokens import Principal
from lacre_gateway.budget import callers, fitting
from lacre_gateway.budget.additions import Approver
from lacre_gateway.budget.alerts import BudgetAlerts
from lacre_gateway.budget.callers import Amounts, BudgetScope, Caller
from lacre_gateway.budget.counters import CallersCounters
from lacre_gateway.budget.draws import CeilingChange, Draw, Waiter, answer, parsed, with_additions
from lacre_gateway.budget.holds import SOON, AboveLimit, BudgetUnavailable, Exhausted, Hold, Lender, UnknownPlan
from lacre_gateway.budget.in_flight import Reservation
from lacre_gateway.budget.lease import Account, Counter, Need, Proposal, commit, lacking
from lacre_gateway.budget.plans import LimitKind, Plans, Price
from lacre_gateway.budget.record import Record
from lacre_gateway.budget.report import Line, OwnLimit, lines
from lacre_gateway.budget.tenants import TenantUse, tenants
from lacre_gateway.budget.windows import Calendar, ends, windows_at

DRAW_LIMIT: Final = 3.0  # seconds that a request waits for a draw
SETTLE_LIMIT: Final = 0.5  # seconds that a request waits for the settlement of ended ones; it takes some 30 ms
_TRIES: Final = 24  # compare-and-sets of one draw, against gateways that race for the same budget
_AGAIN: Final = 0.25  # seconds until a draw is retried while the bucket is away: choosing a new leader takes some
_SMALLER: Final = 3  # times that a smaller prompt reservation is tried, as draws of others become known
_BUSY: Final = 0.02  # seconds, if it has too much to write: a flood leaves room now and then
_BACK_OFF: Final = 0.004  # seconds at most after a lost race, times the number of the try
_TICK: Final = 1.0
_LOOK: Final = 2.0  # seconds between two reads for additions alone
_AT_ONCE: Final = 16  # running writes for which no request waits
_ANNOUNCE: Final = 10.0  # seconds between signs of life, which also tell the server's time
_MAX_CALLERS: Final = 16_384
_MAX_COUNTERS: Final = 1024  # callers whose counters are kept, of some kilobytes each
_MAX_USERS: Final = 256  # users of one tenant in one report
GONE_AFTER: Final = 3 * _ANNOUNCE  # seconds without one, after which people take a gateway for dead
ALIVE: Final = "alive"  # the first part of the keys of the signs of life


class Ledger:
    """Used on one event loop. bucket: set once there is one, and again after each new connection. `start` it, and `close` it.

    plans: returns those in force. longest: seconds that a stream may take at most. holder: the name of this process's leases; a
    new one after each start, because it is unknown how much the last one had spent. approver: signs and checks additions.
    """

    def __init__(
        self,
        plans: Callable[[], Plans],
        gateway: str,
        log: Log,
        *,
        longest: float,
        approver: Approver,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self.bucket: Bucket | None = None
        self.alerts: BudgetAlerts | None = None
        self.holder = f"{gateway}.{secrets.token_hex(4)}"
        self._gateway = gateway
        self._log = log
        self._longest = longest
        self.approver = approver
        self._clock = clock
        self._offset = 0.0
        self._draws: dict[str, Draw] = {}
        self._lender = Lender(self.holder)
        self._callers: dict[tuple[str, str, str, str | None, tuple[str, ...]], Caller | None] = {}
        self._counters: dict[Caller, CallersCounters] = {}  # of those who asked in the last second
        self._calendar = Calendar()
        self._tending: tasks.Background | None = None
        self._announced = float("-inf")
        self._kept_at = float("inf")  # on the monotonic clock: when a sign of life was last written, or first tried
        self._told = False
        self._closing = False
        self._source = plans
        self._plans = plans()

    @property
    def plans(self) -> Plans:
        """The plans in force now. A reservation under older plans is settled at its own prices."""
        plans = self._source()
        if plans is not self._plans:
            self._plans = plans
            self._callers.clear()
        return plans

    def now(self) -> float:
        return self._clock() + self._offset

    @property
    def writable(self) -> bool:
        """Whether the bucket has accepted writes lately. A full one, or one without a leader, accepts none."""
        return time.monotonic() < self._kept_at + GONE_AFTER

    # The path of a request

    async def reserve(self, who: Principal, model: str, ceilings: Reservation) -> Hold:
        """Charges a request's ceilings to every budget of its caller.

        If only reservations of streams that have just ended are in the way, it waits for their settlement. So a client that
        sends one request after another is not refused because its last one is not settled yet.

        Raises UnknownPlan, AboveLimit, Exhausted or BudgetUnavailable; nothing is charged then.
        """
        plans = self.plans
        caller, price = self._caller(plans, who), plans.price_of(model)
        amounts = callers.ceiling_of(price, ceilings.max_prompt_tokens, ceilings.max_tokens)
        # Nearly always the ceilings fit every limit and the present leases: then nothing lowers them.
        if amounts.fit(caller.least) and isinstance(found := self._charged(caller, price, ceilings, amounts), Hold):
            return found
        deadline = asyncio.get_running_loop().time() + SETTLE_LIMIT
        while True:
            try:
                return await self._reserve(who, model, ceilings)
            except Exhausted as refused:
                keys = [scope.key for scope in self._caller(self.plans, who).scopes]
                if refused.retry_after > SOON or not await self._lender.unsettled.fewer(keys, deadline):
                    raise

    async def _reserve(self, who: Principal, model: str, ceilings: Reservation) -> Hold:
        """Raises as `reserve`."""
        plans = self.plans
        caller, price = self._caller(plans, who), plans.price_of(model)
        try:
            whole, most = self._most(caller, price, ceilings)
        except AboveLimit:
            await self._look(caller)
            whole, most = self._most(caller, price, ceilings)
        deadline = asyncio.get_running_loop().time() + DRAW_LIMIT
        least = fitting.least(whole, most)
        asked, prompt = self._lowered(caller, price, whole), most
        if most < ceilings.max_prompt_tokens:
            prompt = max(least, min(most, self._left(caller, price, asked)))
        for _ in range(_SMALLER):
            try:
                return await self._hold(caller, price, replace(asked, max_prompt_tokens=prompt), deadline)
            except Exhausted:  # the draws of others are known now
                fewer = self._lowered(caller, price, asked)
                left = min(prompt, self._left(caller, price, fewer))
                if left < least or (left, fewer) == (prompt, asked):
                    raise
                asked, prompt = fewer, left
        smallest = replace(asked, max_tokens=asked.floor, max_prompt_tokens=least)
        return await self._hold(caller, price, smallest, deadline)

    def _most(self, caller: Caller, price: Price | None, ceilings: Reservation) -> tuple[Reservation, int]:
        """What may be reserved at all, by the ceilings as they were raised. Raises AboveLimit."""
        raised = with_additions(caller, self._draws, self._calendar.at(self.now()))
        whole = fitting.lowered(ceilings, price, fitting.at_ceilings(raised))
        return whole, fitting.most(raised, price, whole)

    async def _look(self, caller: Caller) -> None:
        """Reads the caller's budgets for additions, if that was not done lately: a request above its limits draws nothing."""
        now, bucket = self.now(), self.bucket
        for scope in caller.scopes:
            draw = self._draw(scope)
            if bucket is None or abs(now - draw.looked) < _LOOK:
                continue
            draw.looked = draw.account.touched = now
            with contextlib.suppress(FabricError):
                if (entry := await bucket.read(scope.key)) is not None:
                    draw.account.see(self._record(scope.key, entry, scope.name))

    async def _hold(self, caller: Caller, price: Price | None, ceilings: Reservation, deadline: float) -> Hold:
        amounts = callers.ceiling_of(price, ceilings.max_prompt_tokens, ceilings.max_tokens)
        while not isinstance(found := self._charged(caller, price, ceilings, amounts), Hold):
            await self._draw_for(caller, amounts, found, deadline)
        return found

    def _charged(self, caller: Caller, price: Price | None, ceilings: Reservation, amounts: Amounts) -> Hold | list[Counter]:
        """The reservation; or the counters that lack something for it. amounts: of the ceilings."""
        now = self.now()
        counters = self._counters_of(caller, now)
        charges = counters.charges(amounts)
        if short := lacking(charges, now):
            return short
        commit(charges)
        for key in counters.running_low():  # draws before a request has to wait for it
            self._wake(self._draws[key])
        return Hold(caller, price, ceilings, self._lender, counters)

    def _left(self, caller: Caller, price: Price | None, ceilings: Reservation) -> int:
        """The prompt tokens, of those asked for, that fit the rest of the caller's limits, as far as this gateway knows."""
        rests = self._counters_of(caller, self.now()).remaining()
        rooms = (fitting.room(kind, rest, price, ceilings.max_tokens) for kind, rest in rests)
        return min([ceilings.max_prompt_tokens, *(room for room in rooms if room is not None)])

    def _lowered(self, caller: Caller, price: Price | None, asked: Reservation) -> Reservation:
        """With as much of a default output as the rest of the caller's limits has, as far as this gateway knows."""
        if asked.floor == asked.max_tokens:
            return asked
        return fitting.lowered(asked, price, self._counters_of(caller, self.now()).remaining())

    def _caller(self, plans: Plans, who: Principal) -> Caller:
        key = (who.issuer, who.tenant, who.subject, who.plan, who.groups if plans.groups else ())
        if key not in self._callers:
            if len(self._callers) >= _MAX_CALLERS:
                self._callers.clear()
            self._callers[key] = callers.caller(plans, *key)
        found = self._callers[key]
        if found is None:
            raise UnknownPlan
        return found

    def _counters_of(self, caller: Caller, now: float) -> CallersCounters:
        """Those of now. Their accounts count as used."""
        windows, found = self._calendar.at(now), self._counters.get(caller)
        if found is None or not found.current(windows, self._draws):
            if len(self._counters) >= _MAX_COUNTERS:
                self._counters.clear()
            accounts = [(scope, self._draw(scope).account) for scope in caller.scopes]
            found = self._counters[caller] = CallersCounters(caller, windows, accounts)
        found.touch(now)
        return found

    def _draw(self, scope: BudgetScope) -> Draw:
        found = self._draws.get(scope.key)
        if found is None:
            account = Account(scope.key, scope.name, self.holder, self._longest)
            found = self._draws[scope.key] = Draw(account)
        return found

    async def _draw_for(self, caller: Caller, amounts: Amounts, short: Sequence[Counter], deadline: float) -> None:
        """Waits until the budgets that lack something were drawn from. Raises Exhausted or BudgetUnavailable."""
        charges = self._counters_of(caller, self.now()).by_scope(amounts)
        wanting = {scope.key: scope for scope, counter, _ in charges if counter in short}
        waiters = []
        for scope in wanting.values():
            need = Need({kind: (amounts.of(kind), ceiling) for kind, ceiling in scope.limits})
            waiter = Waiter(need, asyncio.get_running_loop().create_future())
            draw = self._draw(scope)
            draw.waiting = [*(draw.waiting or ()), waiter]
            self._wake(draw)
            waiters.append(waiter)
        try:
            async with asyncio.timeout_at(deadline):
                met = [await waiter.met for waiter in waiters]
        except TimeoutError as exc:
            raise BudgetUnavailable from exc
        finally:
            for waiter in waiters:
                waiter.met.cancel()
        if not all(met):
            now = self.now()
            counters = self._counters_of(caller, now)
            if self.alerts is not None:
                charges = counters.by_scope(amounts)
                self.alerts.refused(((self._draw(scope).account, counter, amount) for scope, counter, amount in charges), now)
            raise Exhausted.of(caller.plan, counters, amounts, now)

    async def usage(self, tenant: str) -> list[Line]:
        """The budgets of a tenant, and those of its users that this gateway has served lately. Raises FabricUnavailable."""
        if self.bucket is None:
            raise FabricUnavailable("not connected to NATS")
        keys = [*callers.shared_of(self.plans, tenant)]
        keys += [key for key in self._draws if key.startswith(callers.users_of(tenant))][:_MAX_USERS]
        entries = [(key, await self.bucket.read(key)) for key in keys]
        records = {key: self._record(key, entry, "").merged() for key, entry in entries if entry is not None}
        holders = {
            name
            for record in records.values()
            for kept in record.windows.values()
            for at in kept.values()
            for name in at.shares
        }
        return list(lines(records, frozenset(holders), plans=self.plans))

    async def tenants(self) -> tuple[dict[str, TenantUse], bool]:
        """Every tenant, as `tenants.tenants`. Raises FabricUnavailable."""
        if self.bucket is None:
            raise FabricUnavailable("not connected to NATS")
        return await tenants(self.bucket, self.plans, self.approver, self.now())

    async def own_usage(self, who: Principal) -> list[OwnLimit]:
        """A caller's own limits and those of its tenant, as the fabric has them. Raises UnknownPlan or FabricUnavailable."""
        if self.bucket is None:
            raise FabricUnavailable("not connected to NATS")
        now, found = self.now(), list[OwnLimit]()
        for scope in self._caller(self.plans, who).scopes:
            if scope.label == callers.PLAN:  # how far a whole plan is used is for the operator
                continue
            entry = await self.bucket.read(scope.key)
            record = None if entry is None else self._record(scope.key, entry, "")
            draw = self._draw(scope)
            for kind, ceiling in scope.limits:
                number = windows_at(now)[kind]
                extra = 0 if record is None else record.added_to(kind, number)
                found.append(OwnLimit(scope.label, kind, ceiling + extra, draw.used(kind, number, record), ends(kind, number)))
        return found

    async def change(self, scope: BudgetScope, kind: LimitKind, amount: int | None, number: str) -> tuple[int | None, int]:
        """Raises a ceiling for the rest of its window: by an amount, or so far that all of the plan's ceiling remains.

        number: of the addition; the second of the same number changes nothing. Returns by how much it was raised, as
        `CeilingChange.done`, and the number of the window. Raises FabricUnavailable: then it may have been raised, or may not.
        """
        draw, now = self._draw(scope), self.now()
        draw.account.touched = now
        change = CeilingChange(kind, windows_at(now)[kind], number, amount, asyncio.get_running_loop().create_future())
        draw.changes.append(change)
        self._wake(draw)
        try:
            return await asyncio.wait_for(change.done, DRAW_LIMIT), change.window
        except TimeoutError as exc:
            raise FabricUnavailable("the budget could not be changed in time: repeat it with the same id") from exc
        finally:
            change.done.cancel()

    # Draws, one at a time for each budget

    def _wake(self, draw: Draw) -> None:
        if draw.task is None or draw.task.done():
            draw.task = tasks.detach("budget draw", self._run(draw))

    async def _run(self, draw: Draw) -> None:
        """Writes until no request waits."""
        while True:
            waiters = [waiter for waiter in draw.waiting or () if not waiter.met.done()]
            draw.waiting = None
            try:
                met = await self._write(draw, [waiter.need for waiter in waiters])
            except FabricError as exc:
                draw.waiting = [waiter for waiter in (*waiters, *(draw.waiting or ())) if not waiter.met.done()]
                if not draw.waiting and not draw.changing:
                    return
                await asyncio.sleep(_BUSY if isinstance(exc, FabricBusy) else _AGAIN)
                continue
            for waiter, each in zip(waiters, met, strict=True):
                if not waiter.met.done():
                    waiter.met.set_result(each)
            if not draw.waiting and not draw.changing:
                return

    async def _write(self, draw: Draw, needs: Sequence[Need], *, leave: bool = False) -> tuple[bool, ...]:
        """Makes one successful write. Raises FabricError."""
        if self.bucket is None:
            raise FabricUnavailable("not connected to NATS")
        account = draw.account
        for number in range(_TRIES):
            if not draw.known and await self._read(draw) and not leave:
                return (True,) * len(needs)  # those that still lack something ask again
            now = self.now()
            record, results = draw.changed(self.approver)
            proposal = account.leave(record, now) if leave else account.propose(record, self._calendar.at(now), needs, now)
            account.send(proposal)
            try:
                await self._put(draw, proposal)
            except Conflict:
                account.conflict(proposal)
                await asyncio.sleep(random.uniform(0, _BACK_OFF * number))  # noqa: S311 - the order of waiting is no secret
            else:
                account.confirm(proposal, now)
                answer(results)
                if self.alerts is not None:
                    self.alerts.wrote(account, proposal, now)
                return proposal.met
        raise FabricUnavailable("too many gateways change this budget at once")

    async def _read(self, draw: Draw) -> bool:
        """Whether it shows that the write in doubt has happened."""
        assert self.bucket is not None  # noqa: S101 - `_write` has checked
        entry = await self.bucket.read(draw.account.key)
        draw.record = None if entry is None else self._record(draw.account.key, entry, draw.account.name)
        draw.revision = 0 if entry is None else entry.revision
        draw.known = True
        if draw.record is not None:
            draw.account.see(draw.record)
        if (late := draw.happened(self.now())) is not None and self.alerts is not None:
            self.alerts.wrote(draw.account, late, self.now())
        return late is not None

    def _record(self, key: str, entry: Entry, name: str) -> Record:
        own = parsed(entry.value) if entry.value else Record(name)
        current = windows_at(max(self.now(), entry.time))  # its time is the server's
        return own.with_others(entry.others, current, self.approver.check(key))

    async def _put(self, draw: Draw, proposal: Proposal) -> None:
        """After any result but success, the record is read again before the next try."""
        assert self.bucket is not None  # noqa: S101 - `_write` has checked
        draw.known = False
        try:
            draw.revision = await self.bucket.write(draw.account.key, proposal.record.encode(), draw.revision)
        except Conflict:
            raise
        except BaseException:
            draw.doubt(proposal)
            raise
        draw.record, draw.known = proposal.record, True

    # Work that no request waits for

    def start(self) -> None:
        """Begins, or continues at once with a new bucket."""
        self._announced = float("-inf")
        if self._tending is None:
            self._kept_at = time.monotonic()
            self._tending = tasks.start("budgets", self._tend)

    async def _tend(self) -> None:
        while True:
            now = self.now()
            self._counters = {caller: each for caller, each in self._counters.items() if abs(now - each.asked) <= _TICK}
            if self.bucket is not None:
                try:
                    await self._announce(self.bucket)
                    await self._keep_up()
                except FabricError as exc:
                    if not self._told:
                        self._log.warning("budgets unavailable", reason=str(exc))
                    self._told = True
                except Exception as exc:  # noqa: BLE001 - foreign text: any failure is a failed try
                    if not self._told:
                        tasks.failed("budgets", exc)
                    self._told = True
                else:
                    self._told = False
            await asyncio.sleep(_TICK)

    async def _announce(self, bucket: Bucket) -> None:
        """Publishes which leases are alive, and learns the server's time."""
        began = self._clock()
        if abs(began - self._announced) < _ANNOUNCE:
            return
        key = f"{ALIVE}.{self._gateway}"
        entry = await bucket.read(key)
        with contextlib.suppress(Conflict):  # two processes of one name: each has its own leases
            await bucket.write(key, self.holder.encode(), 0 if entry is None else entry.revision)
        written, asked = await bucket.read(key), self._clock()
        if written is not None:
            self._offset = written.time - (began + asked) / 2
        self._announced, self._kept_at = began, time.monotonic()

    async def _keep_up(self) -> None:
        """Reports and gives back when it is time to, and forgets accounts at rest."""
        now = self.now()
        due = []
        for key, draw in list(self._draws.items()):
            if draw.task is not None and not draw.task.done():
                continue
            if draw.account.due(now):
                due.append(draw)
            elif draw.account.at_rest and now - draw.account.touched > _TICK:
                del self._draws[key]
        gate = asyncio.Semaphore(_AT_ONCE)

        async def write(draw: Draw) -> None:
            async with gate:
                self._wake(draw)
                if draw.task is not None:
                    await asyncio.wait({draw.task}, timeout=DRAW_LIMIT)  # the waiting requests keep it going

        await tasks.together(*(write(draw) for draw in due))

    async def close(self) -> None:
        """Gives back the rest, after the last settlements. Remaining reservations are forfeited."""
        if self._tending is not None:
            await self._tending.close()
        await tasks.settle(*(draw.task for draw in self._draws.values() if draw.task is not None), limit=2 * DRAW_LIMIT)
        gate = asyncio.Semaphore(_AT_ONCE)

        async def leave(draw: Draw) -> bool:
            async with gate:
                try:
                    await self._write(draw, (), leave=True)
                except FabricError:
                    return False
            return True

        try:
            async with asyncio.timeout(DRAW_LIMIT):
                left = all(await tasks.together(*map(leave, self._draws.values())))
        except TimeoutError:
            left = False
        except Exception as exc:  # noqa: BLE001 - the rest of the gateway has to close too
            tasks.failed("budgets", exc)
            left = False
        if not left:
            self._log.warning("budgets not given back", remedy="they are void when their window ends")
