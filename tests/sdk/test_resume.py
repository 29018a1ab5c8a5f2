"""Answers that break off and are gone on with: against the real API over an echo, cut at every record."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any

import httpx2
import openai
import pytest
from hypothesis import given
from hypothesis import strategies as st

import lacre
from lacre import problems
from lacre.asgi import App
from lacre.errors import InvalidMessage
from lacre.evidence.audit_proof import HEADER
from lacre.evidence.receipts import TRAILER, Receipt
from lacre.exchange.resume_marks import Mark
from lacre.exchange.retry import ENDURANCE_RESUMING
from lacre.exchange.sse_join import Splice
from lacre.jose.jws import b64u
from lacre.wire import bhttp
from lacre.wire.header import MEDIA_TYPE_RESPONSE
from lacre.wire.opening import open_request
from lacre_backend.api.app import create_app
from parts import audited
from parts.bent import flipped, replaced, without
from parts.chat_app import reply
from parts.echo_engine import EchoEngine
from parts.relay import Relay, Stream, clocked, connect, connect_async, on_sealed, refusing, served

SAID = "日本 and 😀 seas"
MESSAGES: list[Any] = [{"role": "user", "content": SAID}]
BODY = {"messages": MESSAGES, "stream": True, "stream_options": {"include_usage": True}, "max_tokens": 400}
CUT = httpx2.RemoteProtocolError("peer closed connection without sending complete message body (incomplete chunked read)")
Bend = Callable[[list[bytes]], list[bytes]]


@pytest.fixture
def app() -> App:
    return create_app([EchoEngine(name="tiny")])


@pytest.fixture
def relay(app: App) -> Relay:
    return Relay(app)


@pytest.fixture
def client(relay: Relay) -> Iterator[lacre.Client]:
    with connect(relay) as client:
        yield client


def cut(*places: int) -> Bend:
    """Leaves so many records of the first answer, of the second and so on; all of those after that."""
    left = list(places)
    return lambda pieces: pieces[: left.pop(0)] if left else pieces


def events(client: httpx2.Client, body: dict[str, Any] = BODY, path: str = "/v1/chat/completions") -> list[Any]:
    """The objects of a stream, as any reader gets them, and `[DONE]`."""
    with client.stream("POST", path, json=body) as response:
        assert response.status_code == 200
        return [json.loads(data) if (data := each.data) != "[DONE]" else data for each in httpx2.EventSource(response)]


def same_but_name(chunks: Sequence[Any]) -> list[Any]:
    """What does not differ between two answers to one question: all but the name, the time and the usage."""
    own = {"id", "created", "usage"}
    return [chunk | dict.fromkeys(own & chunk.keys()) if isinstance(chunk, dict) else chunk for chunk in chunks]


def by_hand(relay: Relay, request: httpx2.Request) -> httpx2.Response:
    """The first answer breaks off after its head; all of the second one is in one record before the final chunk."""
    _, header, sealer = open_request({1: relay.key}, request.content)
    encoder = bhttp.ResponseEncoder()
    head = encoder.head(200, (("content-type", "application/json"),))
    proof = audited.proof(audited.entry(request.headers, request.content), relay.gateway_key)
    headers = {"content-type": MEDIA_TYPE_RESPONSE, HEADER: proof.header()}
    if len(relay.sealed) == 1:
        return httpx2.Response(200, headers=headers, stream=Stream([sealer.seal(head)], CUT))
    receipt = Receipt(b64u(header.digest), "sha256:00", 1, 0, 1, time.time(), time.time(), True).sign(relay.receipt_key)
    whole = head + encoder.data(b'{"ok":true}') + encoder.end(((TRAILER, receipt),))
    return httpx2.Response(200, headers=headers, stream=Stream([sealer.seal(whole) + sealer.finish()]))


class TestOneStream:
    def test_wherever_it_is_cut(self, client: lacre.Client, relay: Relay) -> None:
        """The seam shows in nothing but the usage: one id, one role, one end, each character once."""
        kept: list[int] = []
        relay.bend = lambda pieces: kept.append(len(pieces)) or pieces  # type: ignore[func-returns-value]
        whole = events(client)
        used = whole[-2]["usage"]
        for place in range(kept[0]):
            relay.bend = cut(place)
            got = events(client)
            assert same_but_name(got) == same_but_name(whole)
            assert len({(chunk["id"], chunk["created"]) for chunk in got[:-1]}) == 1
            usage = got[-2]["usage"]
            assert usage["completion_tokens"] == used["completion_tokens"]
            assert usage["total_tokens"] == usage["prompt_tokens"] + usage["completion_tokens"]
            assert (usage["prompt_tokens"] > used["prompt_tokens"]) == (place > 2)  # the head and the role are no tokens

    def test_what_it_took(self, client: lacre.Client, relay: Relay) -> None:
        relay.bend = cut(9)
        stream = client.chat_stream(SAID)
        assert "".join(stream) == stream.text == SAID
        assert (stream.attempts, len(stream.parts), stream.finish_reason) == (2, 1, "stop")
        [receipt], [first] = stream.receipts, stream.parts
        assert receipt == stream.receipt == stream.verification.receipt
        assert receipt.prompt_tokens == first.prompt + first.completion
        assert first.completion + receipt.completion_tokens == len(SAID.encode())
        assert stream.usage.prompt == first.prompt + receipt.prompt_tokens
        assert stream.usage.completion == len(SAID.encode())
        assert stream.recount(lambda text: len(text.encode())).difference == 0

    def test_the_rest_comes_at_once(self, client: lacre.Client, relay: Relay) -> None:
        """A worker may seal its trailers before the final chunk. Where they come with the head, receipt and proof are kept."""
        relay.respond = lambda request: by_hand(relay, request) if request.content else None
        response = client.post("/v1/chat/completions", json={"messages": MESSAGES})
        facts = response.extensions["lacre"]
        assert (response.json(), facts.attempts) == ({"ok": True}, 2)
        assert facts.trailers and facts.audit.members["enc"] == facts.receipt.enc

    @pytest.mark.parametrize("times", [2, 3])
    def test_more_breaks_of_the_connection_than_workers_may_be_lost(self, relay: Relay, times: int) -> None:
        relay.fault, relay.bend = CUT, cut(*[6] * times)
        with connect(relay) as client:
            stream = client.chat_stream(SAID)
            assert "".join(stream) == SAID
        assert (stream.attempts, len(stream.parts), stream.usage.completion) == (times + 1, times, len(SAID.encode()))

    @pytest.mark.parametrize(("fault", "places"), [(CUT, (9, 9)), (None, (8,))], ids=["cut", "a lost worker"])
    async def test_async(self, relay: Relay, fault: httpx2.TransportError | None, places: tuple[int, ...]) -> None:
        relay.fault, relay.bend = fault, cut(*places)
        async with connect_async(relay) as client:
            stream = client.chat_stream(SAID)
            assert "".join([piece async for piece in stream]) == SAID
        assert stream.attempts == len(places) + 1

    def test_openais_client(self, client: lacre.Client, relay: Relay) -> None:
        talker = openai.OpenAI(http_client=client, base_url=lacre.BASE_URL, api_key="sealed")
        relay.bend = cut(7)
        chunks = list(talker.chat.completions.create(model="tiny", messages=MESSAGES, stream=True))
        assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == SAID
        assert sum(chunk.choices[0].delta.role is not None for chunk in chunks) == 1
        assert [chunk.choices[0].finish_reason for chunk in chunks if chunk.choices[0].finish_reason] == ["stop"]

    def test_text_completions_and_their_offsets(self, client: lacre.Client, relay: Relay) -> None:
        body = {"prompt": SAID, "stream": True, "logprobs": 1, "max_tokens": 30}
        whole = events(client, body, "/v1/completions")
        for place in (6, 11):
            relay.bend = cut(place)
            assert same_but_name(events(client, body, "/v1/completions")) == same_but_name(whole)

    @pytest.mark.parametrize("stop", ["and 😀", "seas!"])
    def test_what_a_stop_string_holds_back(self, client: lacre.Client, relay: Relay, stop: str) -> None:
        whole = "".join(client.chat_stream(SAID, stop=stop))
        for place in range(3, 18):
            relay.bend = cut(place)
            assert "".join(client.chat_stream(SAID, stop=stop)) == whole

    def test_the_ceiling_is_the_whole_answers(self, client: lacre.Client, relay: Relay) -> None:
        relay.bend = cut(7)
        stream = client.chat_stream(SAID, max_tokens=10)
        assert "".join(stream) == SAID.encode()[:10].decode("utf-8", "replace")
        assert (stream.usage.completion, stream.finish_reason) == (10, "length")
        asked = [int(request.headers["lacre-max-tokens"]) for request in relay.sealed]
        assert asked == [10, 10 - stream.parts[0].completion]

    def test_nothing_lacks_but_the_end(self, client: lacre.Client, relay: Relay) -> None:
        relay.bend = lambda pieces: pieces[:-1] if len(relay.opened) == 1 else pieces
        stream = client.chat_stream(SAID, max_tokens=6)
        assert "".join(stream) == SAID.encode()[:6].decode()
        assert (stream.finish_reason, stream.receipt.completion_tokens, stream.usage.completion) == ("length", 0, 6)

    def test_a_worker_that_gives_up(self, app: App) -> None:
        """Its error, in the stream's own format, is not the caller's concern while another worker can go on."""
        calls = []

        async def shutting_down(scope: Any, receive: Any, send: Any) -> None:
            calls.append(scope)
            sent = []

            async def some(message: Any) -> None:
                sent.append(message)
                if len(sent) == 7 and len(calls) == 1:
                    error = {"error": {"message": "shutting down", "type": "server_error", "param": None, "code": None}}
                    await send({"type": "http.response.body", "body": b"data: " + json.dumps(error).encode() + b"\n\n"})
                elif len(sent) < 7 or len(calls) > 1:
                    await send(message)

            await app(scope, receive, some)

        relay = Relay(shutting_down)
        with connect(relay) as client:
            stream = client.chat_stream(SAID)
            assert "".join(stream) == SAID
            assert (stream.attempts, len(stream.receipts)) == (2, 2)
        calls.clear()
        with connect(relay, resume=0) as impatient, pytest.raises(lacre.ApiError):
            list(impatient.chat_stream(SAID))

    def test_a_whole_answer_is_asked_for_again(self, client: lacre.Client, relay: Relay) -> None:
        relay.bend = cut(0)
        reply = client.chat(SAID)
        assert (reply.text, reply.attempts) == (SAID, 2)
        assert reply.usage.completion == len(SAID.encode())


class TestBroken:
    def broken(self, client: lacre.Client, **params: Any) -> lacre.StreamBroken:
        with pytest.raises(lacre.StreamBroken) as caught:
            list(client.chat_stream(SAID, **params))
        assert caught.value.remedy and SAID.startswith(caught.value.text) and caught.value.text
        assert caught.value.verification is not None and caught.value.verification.sealed_to is not None
        return caught.value

    @pytest.mark.parametrize("resume", [1, 3, 5])
    def test_a_second_time(self, relay: Relay, resume: int) -> None:
        """Whatever the caller asks for: what ended two workers is not sent to a third."""
        relay.bend = lambda pieces: pieces[:6]
        with connect(relay, resume=resume, retries=5) as client:
            broken = self.broken(client)
        assert len(relay.opened) == 2
        assert 0 < broken.tokens < len(SAID.encode())
        assert type(broken.__cause__) is lacre.TruncatedStream

    @pytest.mark.parametrize("lost_first", [True, False])
    @pytest.mark.parametrize("problem", [problems.WORKER_LOST, problems.UNCLAIMED], ids=lambda problem: problem.slug)
    def test_before_or_after_a_worker_was_lost(self, relay: Relay, problem: problems.Problem, lost_first: bool) -> None:
        """Retries and resumed answers count together."""
        lost = iter([lost_first, not lost_first])
        relay.bend = cut(6, 6)
        relay.respond = on_sealed(lambda: served(problem.status, problem.body()) if next(lost) else None)
        with connect(relay, resume=5, retries=5) as client:
            broken = self.broken(client)
        assert len(relay.sealed) == 2
        assert type(broken.__cause__) is (lacre.TruncatedStream if lost_first else lacre.Unavailable)

    def test_by_the_connection_as_often_as_asked(self, relay: Relay) -> None:
        """No request ends a gateway: that is no worker that was lost, and the caller's number holds."""
        relay.fault, relay.bend = CUT, lambda pieces: pieces[:4]
        with connect(relay, resume=4) as client:
            broken = self.broken(client)
        assert len(relay.opened) == 5
        assert isinstance(broken.__cause__, lacre.TruncatedStream) and broken.__cause__.cut

    @pytest.mark.parametrize("lost", [(0, 1), (0, 2), (1, 3)])
    def test_both_ways(self, relay: Relay, lost: tuple[int, int]) -> None:
        """Breaks of the connection in between neither hide a lost worker nor count as one."""
        faults = iter([None if number in lost else CUT for number in range(9)])

        def bend(pieces: list[bytes]) -> list[bytes]:
            relay.fault = next(faults)
            return pieces[:4]

        relay.bend = bend
        with connect(relay, resume=9, retries=9) as client:
            self.broken(client)
        assert len(relay.opened) == lost[1] + 1

    def test_when_going_on_took_long(self, relay: Relay) -> None:
        """A call ends while somebody waits for it, however many connections break."""
        relay.fault, relay.bend = CUT, lambda pieces: pieces[:4]
        began = time.time()
        # Each sealed request takes more than half of what there is, but for the first one.
        with clocked(relay, lambda: began + 0.6 * ENDURANCE_RESUMING * len(relay.opened), resume=9) as client:
            with pytest.raises(lacre.StreamBroken):
                events(client, path="/chat/completions")
        assert len(relay.opened) == 3

    def test_two_choices(self, client: lacre.Client, relay: Relay) -> None:
        relay.bend = cut(12)
        self.broken(client, n=2)
        assert len(relay.opened) == 1

    def test_another_model_file(self, relay: Relay) -> None:
        def bend(pieces: list[bytes]) -> list[bytes]:
            if len(relay.opened) > 1:
                return pieces
            other = EchoEngine(name="tiny")
            other.model = replace(other.model, digest="sha256:" + "0" * 64)
            relay.app = create_app([other])
            return pieces[:8]

        relay.bend = bend
        with connect(relay) as client:
            broken = self.broken(client)
        assert "409" in str(broken)
        assert len(relay.opened) == 2

    def test_a_refusal_in_between(self, client: lacre.Client, relay: Relay) -> None:
        relay.bend = cut(8)
        forbidden = refusing(problems.FORBIDDEN)
        relay.respond = lambda request: forbidden(request) if relay.opened else None
        broken = self.broken(client)
        assert isinstance(broken.__cause__, lacre.Forbidden)
        assert len(relay.opened) == 1

    def test_not_wanted(self, relay: Relay) -> None:
        relay.bend = cut(8)
        with connect(relay, resume=0) as client, pytest.raises(lacre.TruncatedStream) as caught:
            list(client.chat_stream(SAID))
        assert type(caught.value) is lacre.TruncatedStream
        assert len(relay.opened) == 1
        assert "lacre-resume" not in dict(relay.opened[0].request.headers)

    def test_an_altered_record_is_an_attack(self, client: lacre.Client, relay: Relay) -> None:
        relay.bend = lambda pieces: replaced(pieces, 7, flipped(pieces[7]))
        with pytest.raises(lacre.VerificationError):
            list(client.chat_stream(SAID))
        assert len(relay.opened) == 1

    def test_what_may_have_an_effect_runs_once(self, relay: Relay) -> None:
        async def effect(scope: Any, receive: Any, send: Any) -> None:
            await receive()
            await reply(send, 200, "done")

        relay.app, relay.bend = effect, without
        with connect(relay) as client, pytest.raises(lacre.TruncatedStream):
            client.post("/v1/payments", json={"stream": True})
        assert len(relay.opened) == 1


def event(text: str, mark: Mark | None = None, **members: Any) -> bytes:
    chunk = {"id": "c1", "created": 1, "choices": [{"index": 0, "delta": {"content": text}}], **members}
    return (b"" if mark is None else f"id: {mark}\n".encode()) + b"data: " + json.dumps(chunk).encode() + b"\n\n"


class TestSplice:
    STREAM = (
        b":fill\n\n"
        + event("", choices=[{"index": 0, "delta": {"role": "assistant", "content": ""}}])
        + event("a", Mark(3, 0, 1, [7]))
        + b":    \n\n"
        + event("bc", Mark(3, 0, 3, [8, 9]))
        + event("d")
        + b"data: [DONE]\n\n"
    )

    @given(st.lists(st.integers(0, len(STREAM)), max_size=6))
    def test_pieces_make_no_difference(self, places: list[int]) -> None:
        ends = sorted(places)
        splice = Splice(marked=True)
        out = b"".join(splice.feed(self.STREAM[a:b]) for a, b in zip([0, *ends], [*ends, len(self.STREAM)], strict=True))
        assert out.count(b"data:") == 3 and out.endswith(b'"bc"}}]}\n\n')
        assert (splice.tokens, splice.said.text) == ([7, 8, 9], "abc")
        assert splice.end().count(b"data:") == 2
        assert b":fill" not in out and b"id:" not in out

    def test_an_empty_mark_closes(self) -> None:
        splice = Splice(marked=True)
        for each in (event("a", Mark(1, 0, 1, [1])), event("b").replace(b"data:", b"id:\ndata:"), event("c")):
            assert splice.feed(each)
        assert not splice.open

    @pytest.mark.parametrize("mark", ["3.0.2:7", "3.0.0:", "x", "3.0.1:-7", "3.0.1:7,", "1.1.1:1" + "0" * 12])
    def test_marks_that_are_none_and_an_event_without_end(self, mark: str) -> None:
        with pytest.raises(InvalidMessage):
            Splice(marked=True).feed(event("a").replace(b"data:", f"id: {mark}\ndata:".encode()))
        with pytest.raises(lacre.MessageTooLarge):
            Splice(marked=True).feed(b"data: " + bytes(2**20))

    def test_events_of_one_token_are_kept_together(self) -> None:
        """Only the last has a mark. The others are delivered and noted with it, or dropped at a seam and repeated."""
        splice = Splice(marked=True)
        thought = event("", choices=[{"index": 0, "delta": {"reasoning": "hm", "reasoning_content": "hm"}}])
        opened = {"index": 0, "id": "call_1", "type": "function", "function": {"name": "now", "arguments": ""}}
        called = event("", choices=[{"index": 0, "delta": {"tool_calls": [opened]}}])
        assert splice.feed(thought) == splice.feed(event("a")) == b""
        assert splice.feed(event("b", Mark(3, 0, 1, [7]))).count(b"data:") == 3
        assert splice.feed(event("c")) == splice.feed(called) == b""
        assert splice.said.text == "ab"
        splice.seam()
        assert splice.feed(event("c")) == b""
        assert splice.feed(called.replace(b"data:", b"id: 4.0.1:8\ndata:")).count(b"data:") == 2
        assert splice.said.delta == {
            "role": "assistant", "content": "abc", "reasoning": "hm", "reasoning_content": "hm", "tool_calls": [opened]
        }  # fmt: skip
        assert splice.tokens == [7, 8] and not splice.said.partly
