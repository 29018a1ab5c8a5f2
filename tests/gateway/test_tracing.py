"""Traces as a collector receives them: OTLP over HTTP, taken by a real server and read with OpenTelemetry's own messages."""

from __future__ import annotations

import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import httpx2
import pytest
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from opentelemetry.semconv._incubating.attributes import gen_ai_attributes
from opentelemetry.semconv.attributes import error_attributes, http_attributes, service_attributes

from lacre import problems
from lacre_gateway.observe import tracing
from parts.keys import MODEL
from parts.memory_fabric import MemoryDelivery
from parts.stage import Stage

from .conftest import PutUp

TRACE, SPAN = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"
PROMPT = b'{"messages":[{"role":"user","content":"s3cr3t-canary"}]}'


class Collector(ThreadingHTTPServer):
    """bodies: what was exported."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Taking)
        self.bodies: list[bytes] = []
        self.url = f"http://127.0.0.1:{self.server_address[1]}"

    def spans(self) -> list[Any]:
        requests = map(ExportTraceServiceRequest.FromString, self.bodies)
        return [span for sent in requests for at in sent.resource_spans for scope in at.scope_spans for span in scope.spans]


class Taking(BaseHTTPRequestHandler):
    server: Collector

    def do_POST(self) -> None:
        assert self.path == "/v1/traces"
        self.server.bodies.append(self.rfile.read(int(self.headers["content-length"])))
        self.send_response(200)
        self.end_headers()

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def collector() -> Iterator[Collector]:
    with Collector() as collector:
        thread = threading.Thread(target=collector.serve_forever)
        thread.start()
        yield collector
        collector.shutdown()
        thread.join()


@pytest.fixture
async def traced(collector: Collector, put_up: PutUp) -> Stage:
    return await put_up(settings=f'tracing = {{ endpoint = "{collector.url}" }}')


async def ask(stage: Stage, token: str | None = None, **headers: str | None) -> httpx2.Response:
    async with stage.http("203.0.113.77") as client:
        return await stage.post(client, token, **headers, body=stage.seal(content=PROMPT)[0])


def attributes(span: Any) -> dict[str, Any]:
    return {at.key: getattr(at.value, at.value.WhichOneof("value")) for at in span.attributes}


async def test_a_request(traced: Stage, collector: Collector) -> None:
    async with traced.fake_worker():
        answer = await ask(traced, traceparent=f"00-{TRACE}-{SPAN}-01")
    await traced.gateway.close()
    [span] = collector.spans()
    assert span.name == f"chat {MODEL}"
    assert (span.trace_id.hex(), span.parent_span_id.hex()) == (TRACE, SPAN)
    told = attributes(span)
    assert told["lacre.request_id"] == answer.headers["lacre-request-id"]
    assert {name: told[name] for name in told if name.startswith("gen_ai.")} == {
        "gen_ai.operation.name": "chat", "gen_ai.provider.name": "lacre", "gen_ai.request.model": MODEL,
        "gen_ai.request.max_tokens": 256, "gen_ai.usage.input_tokens": 12, "gen_ai.usage.cache_read.input_tokens": 2,
        "gen_ai.usage.output_tokens": 7,
    }  # fmt: skip
    assert (told["http.response.status_code"], told["lacre.outcome"], told["lacre.pool"]) == (200, "answered", "default")
    [event] = span.events
    assert event.name == "lacre.first_record"
    assert span.start_time_unix_nano < event.time_unix_nano < span.end_time_unix_nano


async def test_a_refusal(traced: Stage, collector: Collector) -> None:
    await ask(traced, lacre_action="http")
    await ask(traced)
    await traced.gateway.close()
    denied, unserved = map(attributes, collector.spans())
    assert (denied["error.type"], denied["http.response.status_code"]) == ("path-not-allowed", 403)
    assert denied["lacre.decision"] == "deny"
    assert (unserved["error.type"], unserved["http.response.status_code"]) == (problems.NO_WORKER.slug, 503)
    assert [span.status.code for span in collector.spans()] == [0, 2]  # the second is the service's fault


async def test_nobody_is_named(traced: Stage, collector: Collector) -> None:
    """Neither content nor who asks: of the token, of its claims, of the address."""
    token = traced.issuer.token(sub="canary-sub", tenant="canary-tenant", groups=["canary-group"], jti="canary-jti")
    async with traced.fake_worker():
        await ask(traced, token, cookie="canary-cookie")
    await traced.gateway.close()
    sent = b"".join(collector.bodies)
    assert collector.spans()
    for secret in (b"canary", b"s3cr3t", b"203.0.113.77", token.encode(), traced.issuer.ed.public_key().public_bytes_raw()):
        assert secret not in sent


async def test_the_worker_learns_nothing_of_it(traced: Stage) -> None:
    """Not in the grant, not in the message, and not inside: what reaches the worker is the same bytes as without."""
    works = []
    async with traced.fake_worker() as worker:
        original = worker._serve

        async def serve(delivery: MemoryDelivery) -> None:
            works.append(delivery.work)
            await original(delivery)

        worker._serve = serve  # type: ignore[method-assign]
        await ask(traced, traceparent=f"00-{TRACE}-{SPAN}-01", tracestate="canary=1", baggage="canary=2")
    [work] = works
    told = repr(worker.grants[0]).encode() + work.grant.encode() + work.sealed + repr(work).encode() + worker.opened[0]
    for name in (TRACE.encode(), bytes.fromhex(TRACE), SPAN.encode(), b"traceparent", b"canary="):
        assert name not in told


async def test_traceparents_that_are_none(traced: Stage, collector: Collector) -> None:
    for value in ("", "00-0-0-01", f"00-{'0' * 32}-{SPAN}-01", f"ff-{TRACE}-{SPAN}-01", "x" * 5000):
        await ask(traced, traceparent=value)
    await traced.gateway.close()
    assert [span.parent_span_id for span in collector.spans()] == [b""] * 5


async def test_a_collector_that_is_away(put_up: PutUp) -> None:
    stage = await put_up(settings='tracing = { endpoint = "http://127.0.0.1:9" }')
    assert (await ask(stage)).status_code == 503  # as ever: there is no worker


NAMES = {
    gen_ai_attributes: {
        "PROVIDER_NAME": "GEN_AI_PROVIDER_NAME", "OPERATION_NAME": "GEN_AI_OPERATION_NAME",
        "REQUEST_MODEL": "GEN_AI_REQUEST_MODEL", "REQUEST_MAX_TOKENS": "GEN_AI_REQUEST_MAX_TOKENS",
        "INPUT_TOKENS": "GEN_AI_USAGE_INPUT_TOKENS", "OUTPUT_TOKENS": "GEN_AI_USAGE_OUTPUT_TOKENS",
        "CACHED_TOKENS": "GEN_AI_USAGE_CACHE_READ_INPUT_TOKENS",
    },
    http_attributes: {"METHOD": "HTTP_REQUEST_METHOD", "ROUTE": "HTTP_ROUTE", "STATUS": "HTTP_RESPONSE_STATUS_CODE"},
    error_attributes: {"ERROR": "ERROR_TYPE"},
    service_attributes: {"SERVICE_NAME": "SERVICE_NAME"},
}  # fmt: skip


def test_the_names_are_opentelemetrys() -> None:
    for theirs, names in NAMES.items():
        for ours, name in names.items():
            assert getattr(tracing, ours) == getattr(theirs, name), ours
    assert set(tracing._OPERATIONS.values()) <= {value.value for value in gen_ai_attributes.GenAiOperationNameValues}


def test_off_it_is_not_even_imported() -> None:
    code = (
        "import sys, lacre_gateway.serve, lacre_gateway.admin.api; "
        "assert not [name for name in sys.modules if name.startswith('opentelemetry.sdk')]"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
