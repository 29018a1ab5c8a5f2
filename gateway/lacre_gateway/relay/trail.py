"""The audit trail of one request: an intent, and then exactly one outcome in every case."""

from __future__ import annotations

import asyncio
import hashlib
import time
from types import TracebackType
from typing import Self

from lacre.evidence.audit_proof import AuditProof
from lacre.problems import Problem
from lacre.runtime.records import record
from lacre_gateway.audit.entries import Intent, Outcome
from lacre_gateway.audit.log import Recorded
from lacre_gateway.budget.callers import Amounts
from lacre_gateway.budget.holds import BudgetRefused, Hold
from lacre_gateway.budget.settlement import Claim, Verdict
from lacre_gateway.gateway import Gateway
from lacre_gateway.http.exchange import Exchange
from lacre_gateway.relay.failures import ANSWERED, REFUSED, outcome_of, refusal_for


@record(frozen=True, slots=True)
class _End:
    """How a request ended, in the terms of `Outcome`. problem: the problem that the client gets instead of an answer."""

    outcome: str
    status: int | None
    problem: Problem | None = None
    exceeded: str | None = None


class Trail:
    """A context: it records the intent on entry, and the outcome after any exit, once the claim has its verdict and the intent
    is durable. A claim gets it after the answer's last bytes have left. A request that could not be recorded costs nothing, so
    budgets and log agree.

    claim: the worker's claim of the usage; None if no worker was asked. hold: the reservation; settled with the claim.
    """

    def __init__(self, gateway: Gateway, exchange: Exchange, intent: Intent, hold: Hold | None = None) -> None:
        self._gateway = gateway
        self._exchange = exchange
        self._intent = intent
        self._hold = hold
        self._since = time.monotonic()
        self._recorded: asyncio.Future[Recorded] | None = None
        self.claim: Claim | None = None

    def __enter__(self) -> Self:
        try:
            self._recorded = self._exchange.recorded = self._gateway.audit.append(self._intent)
        except BaseException:
            self._settle(REFUSED, Verdict())
            raise
        return self

    async def durable(self) -> Recorded:
        """Waits until the intent is durable, and under a signed checkpoint. Before `proof`.

        Raises AuditUnavailable. Cancelling the wait does not remove the entry.
        """
        assert self._recorded is not None  # noqa: S101 - since `__enter__`
        return self._recorded.result() if self._recorded.done() else await asyncio.shield(self._recorded)

    async def proof(self) -> AuditProof:
        """As `durable`, for the answer's header. It forgets the entry: an answer may take minutes."""
        proof = (await self.durable()).proof()
        self._recorded = self._exchange.recorded = None
        return proof

    def __exit__(self, _type: type[BaseException] | None, error: BaseException | None, _trace: TracebackType | None) -> None:
        end = self._end(error)
        ended = time.monotonic()
        if self._hold is not None:
            self._hold.stream_over()

        def record(verdict: Verdict) -> None:
            self._record(end, ended - self._since, verdict)
            if (tracer := self._gateway.tracer) is not None:
                tracer.ended(self._intent, self._exchange, verdict, outcome=end.outcome, end=ended, problem=end.problem)

        def settle(_: object) -> None:
            if self.claim is not None and self.claim.receipts:
                self._gateway.settlement.settle(self.claim, record)
            else:
                record(Verdict())

        if self._recorded is None or self._recorded.done():
            settle(None)
        else:
            self._recorded.add_done_callback(settle)

    def _record(self, end: _End, duration: float, verdict: Verdict) -> None:
        used = verdict.receipt
        if self.claim is not None:
            self._gateway.metrics.settled(self._intent.pool, self._intent.model, verdict)
        recorded = self._recorded is None or self._recorded.exception() is None
        money = self._settle(end.outcome if recorded else REFUSED, verdict)
        self._gateway.audit.note(
            Outcome(
                request_id=self._intent.request_id,
                time=round(self._intent.time + duration, 3),
                outcome=end.outcome,
                status=end.status,
                unreceipted=used is None,
                receipt=None if verdict.token is None else hashlib.sha256(verdict.token).hexdigest(),
                refused_receipt=verdict.refused,
                prompt_tokens=None if used is None else used.prompt_tokens,
                cached_tokens=None if used is None else used.cached_tokens,
                completion_tokens=None if used is None else used.completion_tokens,
                money=money,
                problem=None if end.problem is None else end.problem.slug,
                exceeded=end.exceeded,
                duration=round(duration, 6),
            )
        )

    def _settle(self, outcome: str, verdict: Verdict) -> int | None:
        """The charge for the receipt, in micro-units. A refused or unrecorded request costs nothing."""
        hold, used = self._hold, verdict.receipt
        if hold is None:
            return None
        if outcome == REFUSED or used is None:
            hold.settle(Amounts(0 if outcome == REFUSED else 1, 0, 0))
            return 0
        money = hold.cost(used.prompt_tokens, used.cached_tokens, used.completion_tokens)
        hold.settle(Amounts(1, used.prompt_tokens + used.completion_tokens, money))
        return money

    def _end(self, error: BaseException | None) -> _End:
        if error is None:
            return _End(ANSWERED, self._exchange.status)
        outcome = outcome_of(error, started=self._exchange.started)
        if outcome != REFUSED:
            return _End(outcome, self._exchange.status)
        problem = refusal_for(error).problem
        return _End(outcome, problem.status, problem, error.exceeded if isinstance(error, BudgetRefused) else None)
