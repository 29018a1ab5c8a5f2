"""The gateway's counters, for Prometheus. One registry for each app.

Rules:
- Labels come from closed sets: outcomes and problems of our own tables, pools and models of the signed manifest. A value that a
  caller chose is never a label.
- A request is counted once, when it ends, from plain numbers that its `Exchange` kept; a record costs two additions.
- Counters that every request changes are plain numbers, on the event loop only; the library's locks are for the rest.
- States, as opposed to events, are read when Prometheus asks.
"""

from __future__ import annotations

import time
from bisect import bisect_left
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import accumulate
from typing import Final, Protocol

from prometheus_client import CollectorRegistry, Counter, Histogram, ProcessCollector, generate_latest
from prometheus_client.core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    HistogramMetricFamily,
    InfoMetricFamily,
    Metric,
)
from prometheus_client.registry import Collector

from lacre import __version__
from lacre.problems import Problem
from lacre_gateway.budget.settlement import Verdict

CONTENT_TYPE: Final = "text/plain; version=0.0.4; charset=utf-8"
# Seconds: from a denial on loopback to the longest stream of a large model.
DURATIONS: Final = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 300, 1800)
_COMMITS: Final = (0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 5)
_NO_PROBLEM: Final = "none"
_Counts = defaultdict[tuple[str, ...], int]  # by the labels' values


class FinishedRequest(Protocol):
    """A request's numbers at its end (an `Exchange`). Times are on the monotonic clock; None: it did not get that far."""

    @property
    def since(self) -> float: ...
    @property
    def first_byte(self) -> float | None: ...
    @property
    def received(self) -> int: ...
    @property
    def sent(self) -> int: ...
    @property
    def records(self) -> int: ...
    @property
    def started(self) -> bool: ...


@dataclass(frozen=True, slots=True)
class Totals:
    """All that ended since the start. ended: by outcome. first_byte: requests by the bounds of `DURATIONS`. Tokens are those of
    verified receipts; cached ones are among the prompt's.
    """

    ended: Mapping[str, int]
    first_byte: tuple[int, ...]
    prompt: int
    cached: int
    completion: int


class Durations:
    """How many requests took how long, in the buckets of `DURATIONS`. Used on one thread."""

    def __init__(self) -> None:
        self._counts = [0] * (len(DURATIONS) + 1)
        self._sum = 0.0

    def observe(self, seconds: float) -> None:
        self._counts[bisect_left(DURATIONS, seconds)] += 1
        self._sum += seconds

    @property
    def counts(self) -> tuple[int, ...]:
        """For each bound, and for all that took longer."""
        return tuple(self._counts)

    def add_to(self, family: HistogramMetricFamily, *labels: str) -> None:
        bounds = [*(str(float(bound)) for bound in DURATIONS), "+Inf"]
        counts = map(float, accumulate(self._counts))
        family.add_metric(labels, list(zip(bounds, counts, strict=True)), self._sum)


class Metrics(Collector):
    """live: the running requests. since: when it began to count, on the monotonic clock.

    received, sent: bytes so far. records: pieces of answers so far.
    """

    def __init__(self) -> None:
        self.registry = registry = CollectorRegistry()
        self.live: set[FinishedRequest] = set()
        self.since = time.monotonic()
        ProcessCollector(registry=registry)
        self._first_byte = Durations()
        self._whole: defaultdict[str, Durations] = defaultdict(Durations)  # by outcome
        self.received = self.sent = self.records = 0
        self._ended: _Counts = defaultdict(int)  # by outcome and problem
        self._settled: _Counts = defaultdict(int)  # by the verdict
        self._checks: _Counts = defaultdict(int)  # of receipts, by kind
        self._tokens: _Counts = defaultdict(int)  # by pool, model and kind
        self._commits = Histogram(
            "lacre_audit_commit_seconds", "From a group of entries to their sync on the disk.", buckets=_COMMITS,
            registry=registry,
        )  # fmt: skip
        self._committed = Counter("lacre_audit_committed_entries", "Entries that were made durable.", registry=registry)
        self._commit_failures = Counter("lacre_audit_commit_failures", "Groups that could not be written.", registry=registry)
        self._unrecorded = Counter(
            "lacre_refusals_unrecorded", "Requests refused past their caller's limit of refusals; these have no audit entries.",
            registry=registry,
        )  # fmt: skip
        self._admin = Counter("lacre_admin_requests", "Calls of the admin API.", ["action", "outcome"], registry=registry)
        registry.register(self)

    def ended(self, served: FinishedRequest, outcome: str, problem: Problem | None = None) -> None:
        """outcome: answered, refused, broken, client-gone, interrupted or failed. On the hot path: some microseconds."""
        self.live.discard(served)
        self._ended[outcome, _NO_PROBLEM if problem is None else problem.slug] += 1
        self._whole[outcome].observe(time.monotonic() - served.since)
        self.received += served.received
        if served.first_byte is not None:
            self._first_byte.observe(served.first_byte - served.since)
            self.sent += served.sent
            self.records += served.records

    def settled(self, pool: str, model: str, verdict: Verdict) -> None:
        """pool, model: as the manifest names them."""
        used = verdict.receipt
        self._settled[str(verdict.refused or ("receipted" if used is not None else "unreceipted")),] += 1
        for found in verdict.checks:
            self._checks[found,] += 1
        if used is not None:
            self._tokens[pool, model, "prompt"] += used.prompt_tokens
            self._tokens[pool, model, "cached"] += used.cached_tokens
            self._tokens[pool, model, "completion"] += used.completion_tokens

    def totals(self) -> Totals:
        tokens = dict.fromkeys(("prompt", "cached", "completion"), 0)
        for (*_, kind), number in self._tokens.items():
            tokens[kind] += number
        ended = {outcome: sum(durations.counts) for outcome, durations in self._whole.items()}
        return Totals(ended=ended, first_byte=self._first_byte.counts, **tokens)

    def committed(self, seconds: float, entries: int) -> None:
        """A group of entries is durable. entries: 0 if it could not be written."""
        if entries:
            self._commits.observe(seconds)
            self._committed.inc(entries)
        else:
            self._commit_failures.inc()

    def unrecorded(self, count: int) -> None:
        """Counts requests that were refused without an entry of their own."""
        self._unrecorded.inc(count)

    def administered(self, action: str, outcome: str) -> None:
        """outcome: permitted or denied."""
        self._admin.labels(action, outcome).inc()

    def collect(self) -> Iterator[Metric]:
        first_byte = HistogramMetricFamily(
            "lacre_request_first_byte_seconds",
            "From a request's headers to the first byte of its answer; of requests that were answered.",
        )
        self._first_byte.add_to(first_byte)
        yield first_byte
        whole = HistogramMetricFamily("lacre_request_seconds", "From a request's headers to its end.", labels=["outcome"])
        for outcome, durations in self._whole.items():
            durations.add_to(whole, outcome)
        yield whole
        yield _counter("lacre_requests", "Sealed requests that ended.", ("outcome", "problem"), self._ended)
        told = "Requests sent to a worker, by the verdict on their receipt."
        yield _counter("lacre_settlements", told, ("result",), self._settled)
        told = "How receipts were checked, and what was wrong with their MACs."
        yield _counter("lacre_receipt_checks", told, ("check",), self._checks)
        told = "Tokens of verified receipts; cached ones are among the prompt's."
        yield _counter("lacre_tokens", told, ("pool", "model", "kind"), self._tokens)

    def show(self) -> bytes:
        """The text that Prometheus scrapes."""
        return generate_latest(self.registry)


class States(Collector):
    """Gauges that are read when Prometheus asks. readings: each returns families; runs on the event loop's thread."""

    def __init__(self, metrics: Metrics, readings: Iterable[Callable[[], Iterator[Metric]]]) -> None:
        self._metrics = metrics
        self._readings = tuple(readings)
        metrics.registry.register(self)

    def describe(self) -> Iterable[Metric]:
        return ()  # the families change with time; the registry need not ask to find out

    def collect(self) -> Iterator[Metric]:
        live = self._metrics.live
        yield InfoMetricFamily("lacre_build", "Which version runs.", value={"version": __version__})
        yield gauge("lacre_requests_in_flight", "Sealed requests under way.", len(live))
        yield gauge("lacre_streams_open", "Of these, answers whose first byte has left.", sum(each.started for each in live))
        yield CounterMetricFamily("lacre_received_bytes", "Bytes of sealed requests.", value=self._metrics.received)
        yield CounterMetricFamily("lacre_sent_bytes", "Bytes of sealed answers.", value=self._metrics.sent)
        yield CounterMetricFamily("lacre_records", "Pieces of answers that were forwarded.", value=self._metrics.records)
        for reading in self._readings:
            yield from reading()


Labelled = dict[tuple[str, ...], float]


def gauge(name: str, documentation: str, value: float) -> GaugeMetricFamily:
    return GaugeMetricFamily(name, documentation, value=float(value))


def _counter(name: str, documentation: str, labels: tuple[str, ...], values: _Counts) -> CounterMetricFamily:
    """values: by the labels' values, in their order."""
    family = CounterMetricFamily(name, documentation, labels=labels)
    for at, value in values.items():
        family.add_metric(at, value)
    return family


def by_label(name: str, documentation: str, labels: tuple[str, ...], values: Labelled) -> GaugeMetricFamily:
    """values: by the labels' values, in their order."""
    family = GaugeMetricFamily(name, documentation, labels=labels)
    for at, value in values.items():
        family.add_metric(at, float(value))
    return family
