"""What workers do, by model, under the names that dashboards of model servers know.

Workers have no port: they announce these counts with their presence, and each gateway shows the sums that it heard. Names are
vLLM's for counts (its production metrics), and OpenTelemetry's for the time to the first token (its conventions for generative
AI). Every gateway tells of the same workers: take the highest value of them, not their sum.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from itertools import accumulate
from typing import Final

from prometheus_client.core import CounterMetricFamily, HistogramMetricFamily, Metric

from lacre_fabric.work.contract import Backlog
from lacre_fabric.work.model_counts import FIRST_OUTPUT, ModelCounts
from lacre_gateway.observe.metrics import Labelled, by_label

_LABELS: Final = ("pool", "region", "model_name")
_OTEL_LABELS: Final = ("pool", "region", "gen_ai_request_model")
_COUNTERS: Final[tuple[tuple[str, str, Callable[[ModelCounts], int]], ...]] = (
    ("vllm:prompt_tokens", "Prompt tokens that workers read; cached ones are among them.", lambda one: one.prompt),
    ("vllm:generation_tokens", "Tokens that workers generated.", lambda one: one.generated),
    ("vllm:prefix_cache_queries", "Prompt tokens that were looked up in a prefix cache.", lambda one: one.prompt),
    ("vllm:prefix_cache_hits", "Of these, tokens that the cache had.", lambda one: one.cached),
)


def families(counts: Mapping[tuple[str, str, str], ModelCounts], queues: Mapping[tuple[str, str], Backlog]) -> Iterator[Metric]:
    """counts: by pool, region and model. queues: by pool and region."""
    running: Labelled = {at: one.running for at, one in counts.items()}
    waiting: Labelled = {(*at, model): n for at, queue in queues.items() for model, n in queue.models.items()}
    yield by_label("vllm:num_requests_running", "Requests that workers answer now.", _LABELS, running)
    yield by_label("vllm:num_requests_waiting", "Requests that no worker has taken yet.", _LABELS, waiting)
    for name, documentation, of in _COUNTERS:
        counter = CounterMetricFamily(name, documentation, labels=_LABELS)
        for at, one in counts.items():
            counter.add_metric(at, of(one))
        yield counter
    first = HistogramMetricFamily(
        "gen_ai_server_time_to_first_token_seconds",
        "From when a worker takes a request to its first token.",
        labels=_OTEL_LABELS,
    )
    bounds = [*(str(bound) for bound in FIRST_OUTPUT), "+Inf"]
    for at, one in counts.items():
        buckets = list(zip(bounds, map(float, accumulate(one.first_output)), strict=True))
        first.add_metric(at, buckets, one.seconds)
    yield first
