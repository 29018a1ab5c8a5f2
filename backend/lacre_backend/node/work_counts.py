"""Counts a worker's requests and tokens by model, for the presence that it announces. On the event loop alone."""

from __future__ import annotations

import time
from bisect import bisect_left
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice

from lacre import asgi
from lacre_fabric.work.model_counts import FIRST_OUTPUT, MAX_COUNTED, ModelCounts


@dataclass(slots=True, eq=False)
class _Running:
    model: str
    usage: asgi.Usage
    since: float


class WorkCounts:
    """Since the worker started."""

    def __init__(self) -> None:
        self._ended: dict[str, ModelCounts] = {}
        self._running: set[_Running] = set()
        self._told: dict[str, ModelCounts] = {}

    @contextmanager
    def counting(self, model: str, usage: asgi.Usage) -> Iterator[None]:
        """While a request of the model runs. The app writes `usage` meanwhile."""
        one = _Running(model, usage, time.monotonic())
        self._running.add(one)
        try:
            yield
        finally:
            self._running.discard(one)
            self._ended[model] = self._ended.get(model, ModelCounts()).plus(_counts(one))

    def now(self) -> dict[str, ModelCounts]:
        """Of each model with work so far. No count ever falls: an upstream's final usage may be less than its events."""
        found = dict(self._ended)
        running: dict[str, int] = {}
        for one in self._running:
            running[one.model] = running.get(one.model, 0) + 1
            found[one.model] = found.get(one.model, ModelCounts()).plus(_counts(one))
        told = self._told
        named = islice({**told, **found}, MAX_COUNTED)  # those told before come first: none may be missing for a while
        self._told = {model: _at_least(found[model], told.get(model, ModelCounts()), running.get(model, 0)) for model in named}
        return self._told


def _counts(one: _Running) -> ModelCounts:
    usage, first = one.usage, one.usage.first_output
    buckets = [0] * (len(FIRST_OUTPUT) + 1)
    seconds = 0.0
    if first is not None:
        seconds = max(0.0, first - one.since)
        buckets[bisect_left(FIRST_OUTPUT, seconds)] = 1
    return ModelCounts(0, usage.prompt_tokens, usage.cached_tokens, usage.completion_tokens, tuple(buckets), seconds)


def _at_least(counts: ModelCounts, told: ModelCounts, running: int) -> ModelCounts:
    return ModelCounts(
        running,
        max(counts.prompt, told.prompt),
        max(counts.cached, told.cached),
        max(counts.generated, told.generated),
        tuple(map(max, counts.first_output, told.first_output)),
        max(counts.seconds, told.seconds),
    )
