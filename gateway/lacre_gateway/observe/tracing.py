"""Traces of sealed requests, for any OTLP collector. Off unless the settings name one; the SDK is imported only then.

Rules:
- A span is made when its request is over, from times and numbers that were kept anyway: during a request, tracing costs
  nothing.
- A span holds pool, model, sizes, counts and outcomes, and never content. It does not name the caller, because many people can
  read a trace store. The audit log knows the caller by the request id.
- A caller's `traceparent` makes its span the parent. The trace ends here: neither the grant nor the message to the worker has
  it.
- All names are in this file. They are OpenTelemetry's for generative AI and HTTP; ours begin with `lacre.`.
"""

from __future__ import annotations

import asyncio
import time
from typing import TYPE_CHECKING, Final, Protocol

from lacre.errors import SettingsError
from lacre.problems import Problem
from lacre_gateway.audit.entries import Intent
from lacre_gateway.budget.settlement import Verdict
from lacre_gateway.settings import Tracing

if TYPE_CHECKING:
    from opentelemetry.context import Context
    from opentelemetry.sdk.trace import TracerProvider

SERVICE: Final = "lacre-gateway"
PROVIDER: Final = "lacre"
# gen_ai.operation.name, for actions that OpenTelemetry has a name for.
_OPERATIONS: Final = {"chat": "chat", "complete": "text_completion", "embed": "embeddings"}

PROVIDER_NAME: Final = "gen_ai.provider.name"
OPERATION_NAME: Final = "gen_ai.operation.name"
REQUEST_MODEL: Final = "gen_ai.request.model"
REQUEST_MAX_TOKENS: Final = "gen_ai.request.max_tokens"
INPUT_TOKENS: Final = "gen_ai.usage.input_tokens"
CACHED_TOKENS: Final = "gen_ai.usage.cache_read.input_tokens"
OUTPUT_TOKENS: Final = "gen_ai.usage.output_tokens"
METHOD: Final = "http.request.method"
ROUTE: Final = "http.route"
STATUS: Final = "http.response.status_code"
ERROR: Final = "error.type"
SERVICE_NAME: Final = "service.name"
SERVICE_INSTANCE: Final = "service.instance.id"
FIRST_RECORD: Final = "lacre.first_record"  # an event: the answer begins
_EXPORT_LIMIT: Final = 5.0  # seconds for the collector to take a batch
_FLUSH_LIMIT: Final = 5000  # milliseconds for the last spans to leave when the process ends


class Timed(Protocol):
    """The times of a request (an `Exchange`), on the monotonic clock. traceparent: as W3C writes it."""

    @property
    def since(self) -> float: ...
    @property
    def first_byte(self) -> float | None: ...
    @property
    def status(self) -> int | None: ...
    @property
    def traceparent(self) -> str | None: ...


class Tracer:
    """Sends spans in the background; if the collector is away, only spans are lost. instance: the name of this process."""

    def __init__(self, settings: Tracing, instance: str) -> None:
        """Raises SettingsError if OpenTelemetry's SDK is not installed."""
        self._provider = _provider(settings, instance)
        self._tracer = self._provider.get_tracer("lacre")

    def ended(
        self, intent: Intent, timed: Timed, verdict: Verdict, *, outcome: str, end: float, problem: Problem | None
    ) -> None:
        """Makes the request's span: called once, after its end and settlement. end: on the monotonic clock."""
        from opentelemetry import trace  # noqa: PLC0415 - only if tracing is on

        offset = time.time() - time.monotonic()
        span = self._tracer.start_span(
            f"{_operation(intent.action)} {intent.model}",
            context=_parent(timed.traceparent),
            kind=trace.SpanKind.SERVER,
            attributes=_attributes(intent, timed, outcome, verdict, problem),
            start_time=_nanoseconds(timed.since + offset),
        )
        if timed.first_byte is not None:
            span.add_event(FIRST_RECORD, timestamp=_nanoseconds(timed.first_byte + offset))
        if outcome in ("broken", "interrupted") or (problem is not None and problem.status >= 500):
            span.set_status(trace.StatusCode.ERROR)
        span.end(_nanoseconds(end + offset))

    async def close(self) -> None:
        """Sends the last spans."""
        await asyncio.to_thread(self._provider.force_flush, _FLUSH_LIMIT)
        await asyncio.to_thread(self._provider.shutdown)


def _provider(settings: Tracing, instance: str) -> TracerProvider:
    try:
        from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter  # noqa: PLC0415 - an extra
        from opentelemetry.sdk.resources import Resource  # noqa: PLC0415
        from opentelemetry.sdk.trace import TracerProvider  # noqa: PLC0415
        from opentelemetry.sdk.trace.export import BatchSpanProcessor  # noqa: PLC0415
        from opentelemetry.sdk.trace.sampling import ParentBasedTraceIdRatio  # noqa: PLC0415
    except ImportError as exc:
        raise SettingsError("tracing: OpenTelemetry is not installed: pip install 'lacre[gateway,tracing]'") from exc
    provider = TracerProvider(
        sampler=ParentBasedTraceIdRatio(settings.sample),
        resource=Resource({SERVICE_NAME: SERVICE, SERVICE_INSTANCE: instance}),
        shutdown_on_exit=False,
    )
    exporter = OTLPSpanExporter(endpoint=f"{settings.endpoint}/v1/traces", timeout=_EXPORT_LIMIT)
    provider.add_span_processor(BatchSpanProcessor(exporter))
    return provider


def _parent(traceparent: str | None) -> Context | None:
    """The caller's span; None if it sent none that can be read."""
    from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator  # noqa: PLC0415

    return None if traceparent is None else TraceContextTextMapPropagator().extract({"traceparent": traceparent})


def _attributes(
    intent: Intent, timed: Timed, outcome: str, verdict: Verdict, problem: Problem | None
) -> dict[str, str | int | bool]:
    attributes: dict[str, str | int | bool | None] = {
        OPERATION_NAME: _operation(intent.action),
        PROVIDER_NAME: PROVIDER,
        REQUEST_MODEL: intent.model,
        REQUEST_MAX_TOKENS: intent.max_tokens,
        METHOD: "POST",
        ROUTE: "/v1/sealed",
        STATUS: timed.status or (None if problem is None else problem.status),
        ERROR: _error(outcome, problem),
        "lacre.request_id": intent.request_id,
        "lacre.pool": intent.pool,
        "lacre.action": intent.action,
        "lacre.shape": intent.shape,
        "lacre.kem": intent.kem,
        "lacre.sealed_bytes": intent.sealed_bytes,
        "lacre.decision": intent.decision,
        "lacre.outcome": outcome,
        "lacre.receipted": verdict.receipt is not None,
    }
    if (used := verdict.receipt) is not None:
        attributes[INPUT_TOKENS] = used.prompt_tokens
        attributes[CACHED_TOKENS] = used.cached_tokens
        attributes[OUTPUT_TOKENS] = used.completion_tokens
    return {name: value for name, value in attributes.items() if value is not None}


def _operation(action: str) -> str:
    return _OPERATIONS.get(action, action)


def _error(outcome: str, problem: Problem | None) -> str | None:
    if problem is not None:
        return problem.slug
    return None if outcome == "answered" else outcome


def _nanoseconds(seconds: float) -> int:
    return int(seconds * 1e9)
