"""What a gateway really shows Prometheus, by name."""

from __future__ import annotations

import re
from collections.abc import Iterator
from functools import cache

from prometheus_client.core import Metric
from prometheus_client.parser import text_string_to_metric_families

from lacre_fabric.work.contract import Backlog
from lacre_fabric.work.model_counts import ModelCounts
from lacre_gateway.admin import gauges, model_metrics
from lacre_gateway.budget.settlement import Verdict
from lacre_gateway.observe.metrics import Metrics, States

_NAME = re.compile(r"\b(?:vllm:|lacre_|process_|gen_ai_server_)[a-z_]+")


class _Exchange:
    since = first_byte = 0.0
    received = sent = records = 0
    started = False


@cache
def counted() -> frozenset[str]:
    """Everything that is counted by events, as it is shown after one of each; and the gauges, by the names in their source."""
    metrics = Metrics()

    def nothing() -> Iterator[Metric]:
        yield from ()

    States(metrics, [nothing])
    metrics.ended(_Exchange(), "answered")
    metrics.settled("default", "m1", Verdict(None, None))
    metrics.committed(0.1, 1)
    metrics.administered("admin:usage", "permitted")
    shown = text_string_to_metric_families(metrics.show().decode())
    names = {sample.name for family in shown for sample in family.samples} | {"lacre_tokens_total"}
    counts = model_metrics.families({("p", "r", "m"): ModelCounts()}, {("p", "r"): Backlog(0, {"m": 0})})
    names |= {sample.name for family in counts for sample in family.samples}
    source = gauges.__spec__.loader.get_data(gauges.__file__).decode()  # type: ignore[union-attr]
    counters = {f"{name}_total" for name in re.findall(r'CounterMetricFamily\(\s*"(lacre_[a-z_]+)"', source)}
    return frozenset(names | counters | set(re.findall(r'"(lacre_[a-z_]+)"', source)))


def named_in(expression: str) -> set[str]:
    return set(_NAME.findall(expression))
