"""The real `openai` client, sealed by one argument: what reaches whom, and that its streams, errors and retries work."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import AsyncIterator, Iterator
from typing import Any

import httpx2
import openai
import pytest

import lacre
from lacre import problems
from lacre_backend.api.app import create_app
from parts.bent import without
from parts.echo_engine import EchoEngine
from parts.relay import AsyncWire, Relay, Wire, connect, connect_async, refusing

MESSAGES: list[Any] = [{"role": "user", "content": "the sea"}]
ASK: dict[str, Any] = {"model": "tiny", "messages": MESSAGES}
OPTIONS: dict[str, Any] = {"base_url": lacre.BASE_URL, "api_key": "sealed-key", "max_retries": 0}
NAMED = {"organization": "org-secret", "project": "proj-secret"}
TRACE = "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01"

# All that a worker may read of a request's headers, to the letter: no machine, library or person can hide in it.
INSIDE = {
    "content-type": "application/json",
    "accept": "application/json",
    "date": r"[A-Z][a-z]{2}, \d\d [A-Z][a-z]{2} \d{4} \d\d:\d\d:\d\d GMT",
    "lacre-cache-salt": "[0-9a-f]{32}",
    "lacre-pool": "default",
    "lacre-model": "tiny",
    "lacre-action": "chat|complete",
    "lacre-shape": "pad",
}
OF_A_STREAM = {"lacre-resume": r"\?1"}
OF_A_NAMED_CEILING = {"lacre-max-tokens": r"\d+"}
OF_A_DEFAULT_CEILING = {"lacre-most-tokens": r"\d+"}
# All that a gateway may: what policy needs, and what HTTP does.
OUTSIDE = {
    "host", "content-type", "content-length", "accept", "accept-encoding", "connection", "user-agent", "authorization",
    "incremental", "lacre-pool", "lacre-model", "lacre-action", "lacre-max-tokens", "lacre-max-tokens-default", "lacre-shape",
    "lacre-affinity",
}  # fmt: skip

# What an application may give away about itself and its users without a thought. None is of hex digits alone: a cache salt is,
# and may hold any four of them.
TELLING: dict[str, Any] = {
    "user": "jo@example.com",
    "metadata": {"customer": "no. 4711"},
    "safety_identifier": "sid-8812",
    "prompt_cache_key": "tenant-77-conversation-3",
    "extra_headers": {
        "traceparent": TRACE, "tracestate": "vendor=x1", "baggage": "userId=alice", "cookie": "session=c00kie",
        "x-request-id": "req-5150", "idempotency-key": "idem-99", "x-forwarded-for": "203.0.113.9", "referer": "https://intra.example",
        "from": "jo@example.com", "x-datadog-trace-id": "trace-12345678", "accept-language": "de-AT",
    },
}  # fmt: skip
SECRETS = (
    "jo@example", "no. 4711", "sid-8812", "tenant-77", TRACE, "vendor=x1", "alice", "c00kie", "req-5150", "idem-99",
    "203.0.113.9", "intra.example", "trace-12345678", "de-AT", "org-secret", "proj-secret", "in-the-query",
    "t0ken", "sealed-key",
)  # fmt: skip


@pytest.fixture
def engine() -> Iterator[EchoEngine]:
    engine = EchoEngine(name="tiny", n_ctx=512)
    yield engine
    engine.close()


@pytest.fixture
def relay(engine: EchoEngine) -> Relay:
    return Relay(create_app([engine]))


@pytest.fixture
def sync_openai(relay: Relay) -> Iterator[openai.OpenAI]:
    with connect(relay, token="t0ken") as client:
        yield openai.OpenAI(http_client=client, **OPTIONS, **NAMED)


@pytest.fixture
async def async_openai(relay: Relay) -> AsyncIterator[openai.AsyncOpenAI]:
    async with connect_async(relay, token="t0ken") as client:
        yield openai.AsyncOpenAI(http_client=client, **OPTIONS, **NAMED)


def check_inside(relay: Relay) -> list[dict[str, Any]]:
    """The bodies that reached the worker, once nothing else did that could tell who asked."""
    for opened in relay.opened:
        request = opened.request
        assert [name for name in INSIDE if len(opened.headers(name)) != 1] == []
        allowed = INSIDE | (OF_A_STREAM if b'"stream"' in request.content else {})
        allowed |= OF_A_NAMED_CEILING if b'"max_tokens"' in request.content else OF_A_DEFAULT_CEILING
        assert len(request.headers) == len(allowed)
        assert [name for name, value in request.headers if not re.fullmatch(allowed[name], value)] == []
        assert (request.scheme, request.authority, request.trailers) == ("https", "lacre.invalid", ())
        everything = repr((request.path, request.headers)) + request.content.decode()
        assert [telling for telling in SECRETS if telling in everything] == []
    return [json.loads(opened.request.content) for opened in relay.opened]


def check_outside(relay: Relay) -> None:
    for request in relay.sealed:
        assert {*request.headers} <= OUTSIDE
        assert request.headers["user-agent"] == f"lacre/{lacre.__version__}"
        assert request.headers["authorization"] == "Bearer t0ken"  # the gateway's own; `api_key` goes nowhere
        assert b"the sea" not in request.content


class TestWhoIsInsideTheSeal:
    def test_sync(self, sync_openai: openai.OpenAI, relay: Relay) -> None:
        options: dict[str, Any] = {"max_tokens": 20, "store": False, "service_tier": "auto"}
        completion = sync_openai.chat.completions.create(**ASK, **options, **TELLING)
        assert completion.choices[0].message.content == "the sea"
        chunks = list(sync_openai.chat.completions.create(**ASK, stream=True, **TELLING))
        assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == "the sea"
        sync_openai.completions.create(model="tiny", prompt="the sea", user="jo@example.com")
        assert check_inside(relay) == [ASK | options, ASK | {"stream": True}, {"model": "tiny", "prompt": "the sea"}]
        check_outside(relay)

    async def test_async(self, async_openai: openai.AsyncOpenAI, relay: Relay) -> None:
        completion = await async_openai.chat.completions.create(**ASK, **TELLING)
        assert completion.choices[0].message.content == "the sea"
        stream = await async_openai.chat.completions.create(**ASK, stream=True, **TELLING)
        assert "".join([chunk.choices[0].delta.content or "" async for chunk in stream]) == "the sea"
        assert check_inside(relay) == [ASK, ASK | {"stream": True}]
        check_outside(relay)

    def test_defaults_of_the_client_do_not_go_in_either(self, sync_openai: openai.OpenAI, relay: Relay) -> None:
        headers = {"x-user": "jo@example.com", "traceparent": TRACE, "user-agent": "intra.example/1.0"}
        telling = sync_openai.with_options(default_headers=headers)
        telling.chat.completions.create(**ASK)
        assert check_inside(relay) == [ASK]
        check_outside(relay)

    def test_the_salt_is_not_the_users(self, relay: Relay) -> None:
        """Each client draws its own: two of one user do not look alike to a worker."""
        for _ in range(2):
            with connect(relay) as client:
                client.chat("x")
                client.chat("x")
        assert len({opened.headers("lacre-cache-salt")[0] for opened in relay.opened}) == 2


class TestAnswers:
    def test_logprobs_and_usage_in_a_padded_stream(self, sync_openai: openai.OpenAI) -> None:
        options: dict[str, Any] = {"logprobs": True, "top_logprobs": 5, "stream_options": {"include_usage": True}}
        chunks = list(sync_openai.chat.completions.create(**ASK, stream=True, **options))
        assert [chunk.usage.completion_tokens for chunk in chunks if chunk.usage] == [7]
        choices = [chunk.choices[0] for chunk in chunks if chunk.choices]
        listed = [entry for choice in choices if choice.logprobs for entry in choice.logprobs.content or []]
        assert "".join(entry.token for entry in listed) == "the sea"

    def test_the_receipt_is_there_when_the_stream_has_ended(self, sync_openai: openai.OpenAI) -> None:
        stream = sync_openai.chat.completions.create(**ASK, stream=True)
        facts = stream.response.extensions["lacre"]
        assert facts.receipt is None
        list(stream)
        assert facts.receipt.completion_tokens == 7
        raw = sync_openai.chat.completions.with_raw_response.create(**ASK)
        assert raw.http_response.extensions["lacre"].receipt.final
        assert [model.id for model in sync_openai.models.list()] == ["tiny"]

    @pytest.mark.parametrize("resume", [0, 2])
    async def test_the_fill_is_no_event(self, relay: Relay, resume: int) -> None:
        """Without resuming the bytes are the worker's own; with it, marks and fill are gone."""
        lines: list[str] = []
        async with connect_async(relay, resume=resume) as client:
            streaming = openai.AsyncOpenAI(http_client=client, **OPTIONS).chat.completions.with_streaming_response
            async with streaming.create(**ASK, stream=True) as response:
                lines += [line async for line in response.iter_lines()]
        assert any(line.startswith(":") for line in lines) == (resume == 0)
        assert not any(line.startswith("id:") for line in lines)
        assert sum(line.startswith("data:") for line in lines) == 10  # the role, seven tokens, the finish, [DONE]


def own(relay: Relay, wire: type[Wire | AsyncWire]) -> dict[str, Any]:
    return {"url": relay.url, "token": "t0ken", "memory": lacre.VersionMemory(), "transport": wire(relay)}


class TestInAWord:
    def test_sync(self, relay: Relay) -> None:
        with lacre.OpenAI(**own(relay, Wire)) as talker:
            assert isinstance(talker, openai.OpenAI)
            completion = talker.chat.completions.create(**ASK)
            again = talker.with_options(max_retries=0).chat.completions.create(**ASK)
        assert completion.choices[0].message.content == again.choices[0].message.content == "the sea"
        check_inside(relay)

    async def test_async(self, relay: Relay) -> None:
        async with lacre.AsyncOpenAI(**own(relay, AsyncWire)) as talker:
            completion = await talker.chat.completions.create(**ASK)
        assert completion.choices[0].message.content == "the sea"

    def test_the_environments_address_is_not_asked(self, relay: Relay, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("OPENAI_BASE_URL", "https://api.openai.com/v1")
        monkeypatch.setenv("OPENAI_API_KEY", "sk-secret")
        with lacre.OpenAI(**own(relay, Wire)) as talker:
            talker.chat.completions.create(**ASK)
        check_outside(relay)

    def test_without_the_package_it_says_what_to_install(self) -> None:
        code = "import sys; sys.modules['openai'] = None; import lacre; lacre.OpenAI"
        done = subprocess.run([sys.executable, "-c", code], check=False, capture_output=True, text=True)
        assert "pip install 'lacre[openai]'" in done.stderr


class TestErrors:
    @pytest.mark.parametrize(
        ("kind", "error"),
        [
            (problems.INVALID_TOKEN, openai.AuthenticationError),
            (problems.FORBIDDEN, openai.PermissionDeniedError),
            (problems.INVALID_HEADERS, openai.BadRequestError),
            (problems.UNKNOWN_POOL, openai.NotFoundError),
            (problems.REPLAYED, openai.ConflictError),
            (problems.TOO_LARGE, openai.APIStatusError),
            (problems.UNKNOWN_KEY, openai.UnprocessableEntityError),
            (problems.RATE_LIMITED, openai.RateLimitError),
            (problems.NO_WORKER, openai.InternalServerError),
            (problems.WORKER_LOST, openai.InternalServerError),
        ],
        ids=lambda value: getattr(value, "slug", ""),
    )
    async def test_refusals_are_its_own(
        self, async_openai: openai.AsyncOpenAI, relay: Relay, kind: problems.Problem, error: type[openai.APIStatusError]
    ) -> None:
        relay.respond = refusing(kind, retry_after="70")
        for stream in (False, True):
            with pytest.raises(error) as caught:
                await async_openai.chat.completions.create(**ASK, stream=stream)  # type: ignore[call-overload]
            assert caught.value.status_code == kind.status
            assert caught.value.type == "lacre_gateway_refusal"
            assert caught.value.code == ("model_not_found" if kind is problems.UNKNOWN_POOL else kind.slug)
            assert caught.value.response.headers["retry-after"] == "70"
            assert isinstance(caught.value.response.extensions["lacre.refusal"], lacre.RefusedError)

    def test_errors_from_inside_the_seal(self, sync_openai: openai.OpenAI) -> None:
        with pytest.raises(openai.BadRequestError) as caught:
            sync_openai.chat.completions.create(model="tiny", messages=[{"role": "user", "content": "x" * 600}])
        assert caught.value.code == "context_length_exceeded"
        with pytest.raises(openai.NotFoundError):
            sync_openai.chat.completions.create(model="gone", messages=MESSAGES)

    def test_a_retry_is_a_fresh_seal(self, sync_openai: openai.OpenAI, relay: Relay) -> None:
        busy = refusing(problems.BUSY, retry_after="0")
        relay.respond = lambda request: busy(request) if len(relay.sealed) == 1 else None
        retrying = sync_openai.with_options(max_retries=1)
        assert retrying.chat.completions.create(**ASK).choices[0].message.content == "the sea"
        first, second = relay.sealed
        assert first.content[7:] != second.content[7:] and len(first.content) == len(second.content)

    @pytest.mark.parametrize(
        ("spoil", "error"),
        [
            ({"bend": without}, lacre.TruncatedStream),
            ({"bend": lambda pieces: [*pieces, b"\0"]}, lacre.OpenError),
            ({"receipts": lambda receipt: []}, lacre.InvalidReceipt),
        ],
        ids=["cut", "extended", "no receipt"],
    )
    def test_an_answer_that_proves_nothing(self, engine: EchoEngine, spoil: Any, error: type[lacre.LacreError]) -> None:
        """Lacre's own error, whole or streamed; never tried again, and never an end that looks good."""
        relay = Relay(create_app([engine]), **spoil)
        patient = openai.OpenAI(http_client=connect(relay, retries=0, resume=0), **OPTIONS | {"max_retries": 2})
        with pytest.raises(error):
            patient.chat.completions.create(**ASK)
        chunks = []
        with pytest.raises(error):
            chunks.extend(patient.chat.completions.create(**ASK, stream=True))
        assert len(chunks) == 9  # all but `[DONE]`
        assert len(relay.sealed) == 2

    @pytest.mark.parametrize(
        ("fault", "error"),
        [(httpx2.ReadTimeout("slow"), openai.APITimeoutError), (httpx2.ConnectError("gone"), openai.APIConnectionError)],
        ids=["timeout", "no connection"],
    )
    def test_the_network(self, relay: Relay, fault: Exception, error: type[Exception]) -> None:
        def fail(_request: httpx2.Request) -> httpx2.Response:
            raise fault

        relay.respond = fail
        with connect(relay, retries=0) as client, pytest.raises(error) as caught:
            openai.OpenAI(http_client=client, **OPTIONS).chat.completions.create(**ASK)
        assert isinstance(caught.value.__cause__, lacre.NetworkError)


async def test_leaving_a_stream_early(async_openai: openai.AsyncOpenAI) -> None:
    stream = await async_openai.chat.completions.create(**ASK, stream=True)
    async for _ in stream:
        break
    await stream.close()
    assert stream.response.is_closed
    assert stream.response.extensions["lacre"].receipt is None
