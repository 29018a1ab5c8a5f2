"""Maps every failure of a request to the problem that the caller gets: errors become problems only here.

Any error outside this table is a fault of the gateway, and the caller learns only that.
"""

from __future__ import annotations

import asyncio
from types import TracebackType
from typing import Final

from lacre import problems
from lacre.errors import Detail, LacreError, MessageTooLarge, ProtocolError
from lacre.problems import Problem
from lacre_fabric.work.contract import (
    DuplicateWork,
    FabricError,
    FabricLost,
    FabricUnavailable,
    FrameGap,
    FrameMissing,
    NoQueue,
    NoWorkers,
    QueueFull,
    QueueTimeout,
    ReaderStalled,
    WorkerLost,
)
from lacre_gateway.audit.log import AuditUnavailable
from lacre_gateway.budget.fields import details
from lacre_gateway.budget.holds import AboveLimit, BudgetRefused, Exhausted, UnknownPlan
from lacre_gateway.budget.in_flight import LimitExceeded
from lacre_gateway.budget.plans import LimitKind
from lacre_gateway.http.exchange import ClientGone, Exchange, Stalled
from lacre_gateway.http.refusal import Refusal
from lacre_gateway.observe.metrics import Metrics

# Seconds. Presence is published each second and answers take some, so sooner is pointless, and much later wastes a free worker.
_RETRY_SOON: Final = 2.0
_RETRY_LATER: Final = 5.0

# The first match decides.
_TABLE: Final[tuple[tuple[type[Exception], Problem, float | None], ...]] = (
    (DuplicateWork, problems.REPLAYED, None),
    (NoWorkers, problems.NO_WORKER, _RETRY_LATER),
    (NoQueue, problems.NO_WORKER, _RETRY_SOON),  # as if without workers: nothing took the request, so another pool may
    (QueueFull, problems.BUSY, _RETRY_LATER),
    (QueueTimeout, problems.BUSY, _RETRY_LATER),
    (WorkerLost, problems.WORKER_LOST, None),
    (FrameGap, problems.WORKER_LOST, None),
    (FabricError, problems.UNAVAILABLE, _RETRY_SOON),
    (AuditUnavailable, problems.AUDIT_UNAVAILABLE, _RETRY_SOON),
    (MessageTooLarge, problems.TOO_LARGE, None),
    (ProtocolError, problems.INVALID_REQUEST, None),
)

# Their texts are our own, or the message server's, and hold nothing of the request.
_OURS: Final = (FabricError, AuditUnavailable)

# The statuses of refusals that a caller causes by its request. The others are our fault, or the network's.
CALLERS_FAULT: Final = frozenset({400, 401, 403, 404, 408, 409, 413, 415, 422, 429})

ANSWERED: Final = "answered"
REFUSED: Final = "refused"

# The problems that a worker may report for a request that it did not answer. Others are not accepted.
_FROM_WORKERS: Final = frozenset({
    problems.INVALID_REQUEST,
    problems.UNKNOWN_KEY,
    problems.INVALID_GRANT,
    problems.REPLAYED,
    problems.TOO_LARGE,
    problems.BUSY,
    problems.UNCLAIMED,
})  # fmt: skip


class WorkerRefused(Exception):
    """A worker answered with a problem instead of an answer."""

    def __init__(self, problem_type: bytes) -> None:
        super().__init__("a worker refused the request")
        problem = problems.BY_TYPE.get(problem_type.decode("ascii", "replace"))
        self.problem = problem if problem in _FROM_WORKERS else problems.WORKER_LOST


# Every intended failure of a request. Any other error is a bug: it reaches the server, which logs its place. The server answers
# INTERNAL if nothing was answered yet, and otherwise aborts the connection.
FAILURES: Final = (Refusal, LimitExceeded, BudgetRefused, WorkerRefused, Stalled, LacreError)

# Failures that break off an answer without its worker's fault: of our own part, the message server, or the reader.
_WORKER_LIVES: Final = (Stalled, ReaderStalled, FrameMissing, FabricUnavailable, FabricLost, AuditUnavailable)


class CountedRequest:
    """A context that counts the request while it runs, and then how it ended."""

    __slots__ = ("_exchange", "_metrics")

    def __init__(self, metrics: Metrics, exchange: Exchange) -> None:
        self._metrics = metrics
        self._exchange = exchange

    def __enter__(self) -> None:
        self._metrics.live.add(self._exchange)

    def __exit__(self, _kind: type[BaseException] | None, error: BaseException | None, _trace: TracebackType | None) -> None:
        if error is None:
            self._metrics.ended(self._exchange, ANSWERED)
            return
        outcome = outcome_of(error, started=self._exchange.started)
        self._metrics.ended(self._exchange, outcome, refusal_for(error).problem if outcome == REFUSED else None)


def outcome_of(error: BaseException, *, started: bool) -> str:
    """How a failed request ended, in a word. started: whether its answer had begun."""
    if isinstance(error, ClientGone):
        return "client-gone"
    if isinstance(error, asyncio.CancelledError):
        return "interrupted"
    return "broken" if started else REFUSED


def may_be_lost(error: Exception) -> bool:
    """Whether an answer may have broken off because its worker died: true unless another cause is known."""
    return not isinstance(error, _WORKER_LIVES)


def refusal_for(error: BaseException) -> Refusal:
    """The refusal that tells the caller as much of `error` as a caller may know."""
    if isinstance(error, Refusal):
        return error
    if isinstance(error, LimitExceeded):
        return _of_process(error)
    if isinstance(error, BudgetRefused):
        return _of_budget(error)
    if isinstance(error, WorkerRefused):
        retry_after = _RETRY_LATER if error.problem.status == 503 else None
        return Refusal(error.problem, retry_after=retry_after, noted="a worker refused it")
    for kind, problem, retry_after in _TABLE:
        if isinstance(error, kind):
            noted = str(error) if isinstance(error, _OURS) else ""
            return Refusal(problem, retry_after=retry_after, noted=noted)
    return Refusal(problems.INTERNAL)


def _of_process(error: LimitExceeded) -> Refusal:
    """A process's own limits are only for its operator to know."""
    if not error.own:
        return Refusal(problems.OVERLOADED, retry_after=error.retry_after, details={"limit": error.name, "scope": "gateway"})
    said: dict[str, Detail] = {"limit": error.name, "scope": "user", "ceiling": error.ceiling}
    return Refusal(problems.RATE_LIMITED, retry_after=error.retry_after, details=said)


def _of_budget(error: BudgetRefused) -> Refusal:
    if isinstance(error, Exhausted):
        spent = error.kind in (LimitKind.TOKENS_PER_DAY, LimitKind.MONEY_PER_MONTH)
        problem = problems.BUDGET_SPENT if spent else problems.RATE_LIMITED
        noted = f"used up: {error.exceeded or 'by reservations that have ended since'}"
        return Refusal(problem, retry_after=error.retry_after, details=details(error.kind, error.met), noted=noted)
    if isinstance(error, AboveLimit):
        return Refusal(problems.ABOVE_LIMIT, details=details(error.kind, error.met), noted=str(error))
    if isinstance(error, UnknownPlan):
        return Refusal(problems.UNKNOWN_PLAN, noted="plan: not in plans.toml")
    return Refusal(problems.BUDGET_UNAVAILABLE, retry_after=_RETRY_SOON, noted="budgets: NATS did not answer in time")
