"""Buckets of requests and answers, and records that say nothing of their tokens."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable, Sequence

import httpx2
import pytest
from hypothesis import given
from hypothesis import strategies as st

import lacre
from lacre.errors import SettingsError, UsageError
from lacre.wire import bhttp
from lacre.wire.framing import MAX_CHUNK
from lacre.wire.header import MAX_SEALED_REQUEST, Kem
from lacre.wire.ohttp import seal_request
from lacre.wire.opening import PrivateKey
from lacre.wire.padding import LARGEST_REQUEST, SMALLEST, UNIT, bucket, request_length, shape_named
from lacre.wire.records import END, LARGEST_FLOOR, Records, records
from parts.bent import cut as split
from parts.bent import without
from parts.chat_app import ChatApp
from parts.relay import Relay, connect

KEYS = {kem: PrivateKey.generate(1, kem).config for kem in Kem}
STREAM = (("content-type", "text/event-stream; charset=utf-8"), ("cache-control", "no-store"))
JSON = (("content-type", "application/json"),)
RECEIPT = (("lacre-receipt", "x" * 560),)

lengths = st.integers(0, LARGEST_REQUEST)


def chunk(**delta: object) -> bytes:
    """A token's event, as the API makes it."""
    event = {
        "id": "chatcmpl-" + "0" * 24, "object": "chat.completion.chunk", "created": 1780000000, "model": "smollm2-135m",
        "system_fingerprint": "fp_0123456789ab", "usage": None,
        "choices": [{"index": 0, "delta": {"content": "", **delta}, "logprobs": None, "finish_reason": None}],
    }  # fmt: skip
    return b"data: " + json.dumps(event, ensure_ascii=False, separators=(",", ":")).encode() + b"\n\n"


class TestBuckets:
    @given(lengths, lengths)
    def test_at_most_12_percent_longer_and_never_decreasing(self, one: int, other: int) -> None:
        one, other = sorted((one, other))
        assert one <= request_length(one) <= max(SMALLEST, one * 1.12)
        assert request_length(one) <= request_length(other)
        assert bucket(one) <= bucket(other)
        assert request_length(request_length(one)) == request_length(one)

    def test_so_few_that_each_tells_six_bits(self) -> None:
        edges = {request_length(length) for length in range(0, LARGEST_REQUEST + 1, 101)} | {LARGEST_REQUEST}
        assert len(edges) == 68
        assert min(edges) == SMALLEST == 4096
        assert all(later <= earlier * 1.12 for earlier, later in itertools.pairwise(sorted(edges)))

    @pytest.mark.parametrize("kem", Kem)
    def test_the_largest_may_be_sealed(self, kem: Kem) -> None:
        sealed, _, _ = seal_request(KEYS[kem], bytes(LARGEST_REQUEST))
        assert len(sealed) <= MAX_SEALED_REQUEST
        with pytest.raises(lacre.MessageTooLarge):  # what no bucket holds is left for sealing to refuse
            seal_request(KEYS[kem], bytes(LARGEST_REQUEST + MAX_CHUNK))
        assert request_length(LARGEST_REQUEST + 1) == LARGEST_REQUEST + 1


class TestSealedRequests:
    """The bound and the buckets hold for what an observer sees: the sealed bytes."""

    @pytest.mark.parametrize("kem", Kem)
    @pytest.mark.parametrize("length", [4097, 5000, 16384, 16385, 100_000, 1_000_000])
    def test_overhead_of_the_sealed_request(self, kem: Kem, length: int) -> None:
        plain, _, _ = seal_request(KEYS[kem], bytes(length))
        padded, _, _ = seal_request(KEYS[kem], bytes(request_length(length)))
        assert len(plain) <= len(padded) <= len(plain) * 1.12

    @pytest.mark.parametrize(
        ("prompts", "size"),
        [(["", "x", "Is it cancer?", "y" * 3000], 5240), (["x" * n for n in range(20_000, 20_900, 100)], 23567)],
    )
    def test_prompts_of_one_bucket_look_alike(self, relay: Relay, client: lacre.Client, prompts: list[str], size: int) -> None:
        for prompt in prompts:
            client.chat(prompt)
        assert {len(request.content) for request in relay.sealed} == {size}

    def test_none_is_left_as_it_is(self, relay: Relay) -> None:
        with connect(relay, shape="none") as client:
            client.chat("x")
            client.chat("xx")
        first, second = relay.sealed
        assert len(second.content) == len(first.content) + 1
        assert first.headers["lacre-shape"] == "none"

    def test_a_shape_that_the_pool_does_not_take_or_that_there_is_not(self, app: ChatApp) -> None:
        relay = Relay(app, shapes=("none",))
        with connect(relay) as client, pytest.raises(SettingsError, match="none"):
            client.chat("canary")
        assert not relay.opened
        for take in (shape_named, lambda name: connect(relay, shape=name)):
            with pytest.raises(UsageError, match="pad, none"):
                take("paced")


def written(pieces: Sequence[bytes], headers: tuple[tuple[str, str], ...] = STREAM, last: bytes = b"") -> list[bytes]:
    """The plaintexts of an answer's records."""
    plain = records("pad")
    made = [plain.head(200, headers), *(plain.data(piece) for piece in pieces), *plain.end(last, RECEIPT)]
    return [record for record in made if record]


def read(made: Sequence[bytes]) -> tuple[bytes, tuple[tuple[str, str], ...]]:
    """The content and the trailers that a client finds in it."""
    decoder = bhttp.ResponseDecoder()
    events = [event for record in made for event in decoder.feed(record)] + decoder.close()
    content = b"".join(event.content for event in events if isinstance(event, bhttp.Data))
    [end] = [event for event in events if isinstance(event, bhttp.End)]
    return content, end.trailers


def begun(headers: tuple[tuple[str, str], ...] = STREAM) -> Records:
    plain = records("pad")
    plain.head(200, headers)
    return plain


def events_in(content: bytes) -> list[httpx2.ServerSentEvent]:
    headers = {"content-type": "text/event-stream"}
    return list(httpx2.EventSource(httpx2.Response(200, headers=headers, content=content, request=httpx2.Request("GET", "x:"))))


tokens = st.text(st.characters(exclude_categories=["Cs"]), max_size=40)
bodies = st.lists(st.binary(max_size=2000), max_size=6)
# Any event stream: events and comments, ended by any of the line ends there are, and cut anywhere.
lines = st.lists(st.sampled_from(["data: a", "data: b", "event: c", "id: 7", ": no", "", "", "retry: 5"]), max_size=20)


class TestEventStreams:
    @given(st.lists(tokens, min_size=1, max_size=8))
    def test_every_token_makes_the_same_record(self, texts: list[str]) -> None:
        head, *events, end = written([chunk(content=text) for text in texts], last=b"data: [DONE]\n\n")
        assert {len(head), *map(len, events)} == {UNIT}
        assert len(end) == END

    def test_all_kinds_of_chunk_fit_one_unit(self) -> None:
        usage = b'data: {"id":"chatcmpl-000000000000000000000000","object":"chat.completion.chunk","created":1780000000,"model":"smollm2-135m","system_fingerprint":"fp_0123456789ab","choices":[],"usage":{"prompt_tokens":123456,"completion_tokens":123456,"total_tokens":246912,"prompt_tokens_details":{"cached_tokens":123456}}}\n\n'  # noqa: E501
        pieces = [chunk(role="assistant", refusal=None), chunk(content="word"), chunk(), usage]
        assert [len(record) for record in written(pieces)] == [UNIT] * 5 + [END]

    @given(st.lists(st.integers(0, 3000), max_size=8))
    def test_records_never_shrink(self, sizes: list[int]) -> None:
        """So with logprobs a record tells at most that it is larger than all before it."""
        made = written([chunk(content="x" * size) for size in sizes])
        events = [len(record) for record in made[1:-1]]
        assert events == sorted(events)
        assert all(length % UNIT == 0 for length in map(len, made))

    def test_a_single_large_event_does_not_inflate_the_rest(self) -> None:
        _, _, after, _ = written([chunk(content="x" * 9000), chunk(content="x")])
        assert len(after) == LARGEST_FLOOR

    @pytest.mark.parametrize("length", [*range(496, 520), *range(1016, 1030), MAX_CHUNK - 2, MAX_CHUNK, MAX_CHUNK + 1])
    def test_every_remainder_is_filled(self, length: int) -> None:
        piece = b"data: ".ljust(length - 2, b"x") + b"\n\n"
        _, event, _ = made = written([piece])
        assert len(event) % UNIT == 0
        content, trailers = read(made)
        assert trailers == RECEIPT
        assert [each.data for each in events_in(content)] == ["x" * (length - 8)]

    @pytest.mark.parametrize("length", range(400, 530))
    def test_every_head_is_filled(self, length: int) -> None:
        made = written([chunk(content="x")], (*STREAM, ("x-long", "x" * length)))
        assert all(len(record) % UNIT == 0 for record in made)
        assert len(events_in(read(made)[0])) == 1

    @given(lines, st.sampled_from(["\n", "\r\n", "\r"]), st.data())
    def test_the_same_events_with_and_without(self, text: list[str], line_end: str, data: st.DataObject) -> None:
        """However an app cuts its stream, and whatever line ends it uses: readers see what they would have seen."""
        body = "".join(line + line_end for line in text).encode()
        cuts = data.draw(st.lists(st.integers(0, len(body)), max_size=6))
        *first, last = split(body, cuts)
        content, trailers = read(written(first, last=last))
        assert trailers == RECEIPT
        assert events_in(content) == events_in(body)

    @given(st.integers(1, 60_000), st.integers(1, 20_000))
    def test_a_line_longer_than_a_record(self, length: int, step: int) -> None:
        body = b"data: " + b"x" * length + b"\n\n"
        made = written([body[start : start + step] for start in range(0, len(body), step)])
        assert all(len(record) % UNIT == 0 for record in made)
        assert [event.data for event in events_in(read(made)[0])] == ["x" * length]

    def test_a_long_line_is_not_kept_back_for_long_and_an_event_leaves_with_its_last_byte(self) -> None:
        plain, held = begun(), 0
        for _ in range(100):
            held += 1000 - len(plain.data(b"x" * 1000))
            assert held < 2 * MAX_CHUNK
        plain = begun()
        assert plain.data(b"data: half") == b""
        assert b"data: half of it\n\n" in plain.data(b" of it\n\n")

    @pytest.mark.parametrize("headers", [(("content-length", "14"),), (("content-encoding", "gzip"),)])
    def test_what_may_not_be_filled_is_padded_as_a_whole(self, headers: tuple[tuple[str, str], ...]) -> None:
        body = b"data: [DONE]\n\n"
        made = written([body], (*STREAM, *headers))
        assert sum(map(len, made)) == SMALLEST
        assert read(made) == (body, RECEIPT)

    @pytest.mark.parametrize("status", [204, 304])
    def test_a_status_without_content_gets_none(self, status: int) -> None:
        plain = records("pad")
        assert plain.head(status, STREAM) == b""
        assert read([*plain.end(b"", RECEIPT)]) == (b"", RECEIPT)


class TestWholeAnswers:
    @given(bodies, st.binary(max_size=40_000))
    def test_all_of_it_is_a_bucket_in_full_records(self, pieces: list[bytes], last: bytes) -> None:
        made = written(pieces, JSON, last)
        content, trailers = read(made)
        assert (content, trailers) == (b"".join(pieces) + last, RECEIPT)
        total = sum(map(len, made))
        assert total == bucket(total)
        assert total <= max(SMALLEST, (len(content) + 700 + 4 * len(pieces)) * 1.12)
        sealed = [length for record in made for length in _cut(len(record))]
        assert all(length == MAX_CHUNK for length in sealed[:-1])

    def test_a_large_body_flows(self) -> None:
        plain, out = begun(JSON), 0
        for _ in range(100):
            out += len(plain.data(b"x" * 10_000))
        assert out > 100 * 10_000 - MAX_CHUNK


def _cut(length: int) -> list[int]:
    return [min(MAX_CHUNK, length - start) for start in range(0, length, MAX_CHUNK)]


class TestThroughTheClient:
    """What an observer sees of whole exchanges."""

    @staticmethod
    def sizes(relay: Relay, ask: Callable[[lacre.Client], object]) -> list[int]:
        seen: list[int] = []

        def watch(pieces: list[bytes]) -> list[bytes]:
            seen.extend(map(len, pieces))
            return pieces

        relay.bend = watch
        with connect(relay) as client:
            ask(client)
        return seen

    def test_records_of_a_stream(self, relay: Relay) -> None:
        nonce, prefix, tag = 32, 2, 16
        *records, final = self.sizes(relay, lambda client: list(client.chat_stream("x")))
        assert records == [nonce + prefix + UNIT + tag, *[prefix + UNIT + tag] * 4]
        assert final == 1 + END + tag

    def test_an_answer_and_an_error(self, relay: Relay) -> None:
        answer = self.sizes(relay, lambda client: client.chat("x"))
        error = self.sizes(relay, lambda client: client.post("/v1/chat/completions", json={"messages": []}))
        assert answer == error == [32 + 1 + SMALLEST + 16]

    def test_the_last_text_waits_for_the_final_chunk(self, relay: Relay) -> None:
        """A client that stops at `[DONE]`, as `openai` does, has verified all of the answer then."""
        body = {"messages": [{"role": "user", "content": "x"}], "stream": True}
        with connect(relay) as client, client.stream("POST", "/v1/chat/completions", json=body) as response:
            for line in response.iter_lines():
                facts = response.extensions["lacre"]
                assert (facts.receipt is not None) == (line == "data: [DONE]")
                if line == "data: [DONE]":
                    break
        relay.bend, got = without, []
        with connect(relay) as client, client.stream("POST", "/v1/chat/completions", json=body) as response:
            with pytest.raises(lacre.TruncatedStream):
                got.extend(response.iter_lines())
        assert "data: [DONE]" not in got
