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
        self._requests = Counter("lacre_requests", "Sealed requests that ended.", ["outcome", "problem"], registry=registry)
        self._first_byte = Durations()
        self._whole: defaultdict[str, Durations] = defaultdict(Durations)  # by outcome
        self.received = self.sent = self.records = 0
        self._settlements = Counter(
            "lacre_settlements", "Requests sent to a worker, by the verdict on their receipt.", ["result"],
            registry=registry,
        )  # fmt: skip
        self._tokens = Counter(
            "lacre_tokens", "Tokens of verified receipts; cached ones are among the prompt's.", ["pool", "model", "kind"],
            registry=registry,
        )  # fmt: skip
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
        # Keeps the children that `labels` finds with a lock and a dictionary of texts: that costs more than the count itself.
        self._children: dict[tuple[str, str], Counter] = {}
        self._results: dict[str, Counter] = {}
        self._by_model: dict[tuple[str, str], tuple[Counter, Counter, Counter]] = {}
        registry.register(self)

    def ended(self, served: FinishedRequest, outcome: str, problem: Problem | None = None) -> None:
        """outcome: answered, refused, broken, client-gone, interrupted or failed. On the hot path: some microseconds."""
        self.live.discard(served)
        at = (outcome, _NO_PROBLEM if problem is None else problem.slug)
        child = self._children.get(at)
        if child is None:
            child = self._children[at] = self._requests.labels(*at)
        child.inc()
        self._whole[outcome].observe(time.monotonic() - served.since)
        self.received += served.received
        if served.first_byte is not None:
            self._first_byte.observe(served.first_byte - served.since)
            self.sent += served.sent
            self.records += served.records

    def settled(self, pool: str, model: str, verdict: Verdict) -> None:
        """pool, model: as the manifest names them."""
        used = verdict.receipt
        result = verdict.refused or ("receipted" if used is not None else "unreceipted")
        child = self._results.get(result)
        if child is None:
            child = self._results[result] = self._settlements.labels(str(result))
        child.inc()
        if used is not None:
            prompt, cached, completion = self._tokens_of(pool, model)
            prompt.inc(used.prompt_tokens)
            cached.inc(used.cached_tokens)
            completion.inc(used.completion_tokens)

    def _tokens_of(self, pool: str, model: str) -> tuple[Counter, Counter, Counter]:
        children = self._by_model.get((pool, model))
        if children is None:
            children = self._by_model[pool, model] = (
                self._tokens.labels(pool, model, "prompt"),
                self._tokens.labels(pool, model, "cached"),
                self._tokens.labels(pool, model, "completion"),
            )
        return children

    def totals(self) -> Totals:
        tokens: dict[str, int] = {}
        for family in self._tokens.collect():
            for sample in family.samples:
                if sample.name.endswith("_total"):
                    kind = sample.labels["kind"]
                    tokens[kind] = tokens.get(kind, 0) + int(sample.value)
        return Totals(
            ended={outcome: sum(durations.counts) for outcome, durations in self._whole.items()},
            first_byte=self._first_byte.counts,
            prompt=tokens.get("prompt", 0), cached=tokens.get("cached", 0), completion=tokens.get("completion", 0),
        )  # fmt: skip

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


def by_label(name: str, documentation: str, labels: tuple[str, ...], values: Labelled) -> GaugeMetricFamily:
    """values: by the labels' values, in their order."""
    family = GaugeMetricFamily(name, documentation, labels=labels)
    for at, value in values.items():
        family.add_metric(at, float(value))
    return family
