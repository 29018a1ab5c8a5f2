"""What an application sees: chat, streams, refusals and errors, sync and async; and what leaves the process."""

from __future__ import annotations

import asyncio
import fcntl
import json
import os
import time
import traceback
from email.utils import formatdate
from pathlib import Path

import httpx2
import pytest

import lacre
from lacre import asgi, errors, problems
from lacre.exchange.call import Sealing
from lacre.runtime.forks import PerProcess
from lacre.transport.sealed_sync import SealedTransport
from lacre.trust.chain import ConnectionString
from lacre.wire.header import Kem
from parts.bent import flipped, swapped, without
from parts.chat_app import ChatApp
from parts.relay import AsyncWire, Relay, Wire, served

SEALED = "/v1/sealed"


def sealed_requests(relay: Relay) -> list[httpx2.Request]:
    return [request for request in relay.requests if request.url.path == SEALED]


def problem(kind: problems.Problem, **headers: str) -> httpx2.Response:
    return served(kind.status, kind.body(), {"content-type": problems.MEDIA_TYPE, **headers})


class TestChat:
    def test_reply(self, client: lacre.Client) -> None:
        reply = client.chat("Name three seas.")
        assert (reply.text, reply.id, reply.model, reply.finish_reason) == ("one two three", "c1", "tiny", "stop")
        assert reply.usage == lacre.TokenUsage(prompt=7, completion=3, cached=2)
        assert reply.attempts == 1

    def test_stream(self, client: lacre.Client) -> None:
        assert list(client.chat_stream("Tell me a story.", max_tokens=200)) == ["one ", "two ", "three"]

    async def test_async(self, async_client: lacre.AsyncClient) -> None:
        assert (await async_client.chat("Name three seas.")).text == "one two three"
        assert [piece async for piece in async_client.chat_stream("Go on.")] == ["one ", "two ", "three"]
        assert await async_client.models() == ("tiny",)

    def test_a_stream_that_was_left_tells_what_is_known(self, client: lacre.Client) -> None:
        stream = client.chat_stream("Tell me a story.")
        assert (stream.attempts, stream.facts, stream.verification, stream.receipts) == (0, None, None, ())
        assert next(stream) == "one "
        stream.close()
        assert (stream.text, stream.attempts, stream.parts, stream.receipts) == ("one ", 1, (), ())
        assert stream.verification.receipt is None
        assert (stream.usage, stream.receipt, stream.recount()) == (None, None, None)
        with pytest.raises(lacre.UsageError, match="given up"):
            stream.reply()

    async def test_an_async_stream_that_was_left_tells_what_is_known(self, async_client: lacre.AsyncClient) -> None:
        stream = async_client.chat_stream("Tell me a story.")
        assert await anext(stream) == "one "
        await stream.aclose()
        assert (stream.text, stream.attempts) == ("one ", 1)
        assert stream.usage is None
        with pytest.raises(lacre.UsageError, match="given up"):
            await stream.reply()

    def test_client_is_an_httpx2_client(self, client: lacre.Client) -> None:
        response = client.post("/v1/chat/completions", json={"messages": [{"role": "user", "content": "x"}]})
        assert response.json()["choices"][0]["message"]["content"] == "one two three"
        assert response.extensions["lacre"].kem == "MLKEM768-X25519"
        assert client.post(f"{lacre.BASE_URL}/chat/completions", json={"messages": [{"role": "user"}]}).status_code == 200

    def test_models(self, client: lacre.Client) -> None:
        assert client.models() == ("tiny",)

    def test_the_workers_error_is_an_api_error(self, client: lacre.Client) -> None:
        with pytest.raises(lacre.ApiError) as caught:
            client.chat([])
        assert (caught.value.status, caught.value.type) == (400, "invalid_request_error")
        with pytest.raises(lacre.ApiError):
            list(client.chat_stream([]))

    def test_kem_is_the_callers_choice_and_never_falls_back(self, app: ChatApp) -> None:
        relay = Relay(app, kem=Kem.X25519)
        memory = lacre.VersionMemory()
        with lacre.Client(relay.url, token="t", memory=memory, transport=Wire(relay)) as strict:
            with pytest.raises(lacre.UnsupportedSuite):
                strict.chat("canary")
        assert not sealed_requests(relay)
        with lacre.Client(relay.url, token="t", kem=Kem.X25519, memory=memory, transport=Wire(relay)) as client:
            assert client.chat("x").text


class TestOutside:
    def test_what_the_gateway_sees(self, client: lacre.Client, relay: Relay) -> None:
        client.chat("canary-8271", max_tokens=9)
        request = sealed_requests(relay)[0]
        assert b"canary" not in request.content
        outer = {name: value for name, value in request.headers.items() if name.startswith("lacre-")}
        assert outer == {
            "lacre-pool": "default", "lacre-model": "tiny", "lacre-action": "chat",
            "lacre-max-tokens": "9", "lacre-shape": "pad",
        }  # fmt: skip
        assert request.headers["authorization"] == "Bearer t0ken"
        assert request.headers["content-type"] == "message/ohttp-chunked-req"
        assert request.headers["incremental"] == "?1"

    @pytest.mark.parametrize("token", ["s3cret\n", " s3cret", "s3cret s3cret", "s3cr\xe9t", "s3cret\r\nx-more: 1"])
    def test_a_token_that_is_none_is_not_sent_or_told(self, relay: Relay, token: str) -> None:
        with lacre.Client(relay.url, token=lambda: token, memory=lacre.VersionMemory(), transport=Wire(relay)) as client:
            with pytest.raises(lacre.SettingsError, match="LACRE_TOKEN") as caught:
                client.chat("x")
        assert not sealed_requests(relay)
        assert "s3c" not in "".join(traceback.format_exception(caught.value))

    @pytest.mark.parametrize(
        ("params", "ceiling"),
        [({}, "512"), ({"n": 3}, "1536"), ({"max_completion_tokens": 5, "n": 2}, "10"), ({"max_tokens": -1}, "512")],
    )
    def test_the_token_ceiling_covers_all_choices(self, client: lacre.Client, relay: Relay, params, ceiling: str) -> None:
        client.chat("x", **params)
        assert sealed_requests(relay)[0].headers["lacre-max-tokens"] == ceiling

    def test_inner_headers_and_fields_by_allow_list(self, client: lacre.Client, relay: Relay, app: ChatApp) -> None:
        headers = {"authorization": "Bearer inner", "cookie": "a=b", "x-stainless-os": "Linux", "traceparent": "00-1-1-01"}
        body = {"messages": [{"role": "user", "content": "x"}], "user": "jo", "metadata": {"a": "b"}, "safety_identifier": "c"}
        client.post("/v1/chat/completions", json=body, headers=headers)
        names = {name for name, _ in relay.opened[0].request.headers}
        assert names == {
            "content-type", "accept", "date", "lacre-cache-salt", "lacre-pool", "lacre-model", "lacre-action",
            "lacre-max-tokens", "lacre-shape",
        }  # fmt: skip
        assert json.loads(app.bodies[0]).keys() == {"messages", "model"}

    def test_identifying_fields_stay_when_insisted_on(self, relay: Relay, app: ChatApp) -> None:
        keep = {"keep_identifying_fields": True, "memory": lacre.VersionMemory(), "transport": Wire(relay)}
        with lacre.Client(relay.url, token="t", **keep) as client:
            client.chat("x", user="jo")
        assert json.loads(app.bodies[0])["user"] == "jo"

    @pytest.mark.parametrize(
        "url", ["https://example.com/v1/chat/completions", "http://lacre.invalid/v1", "wss://lacre.invalid/v1/realtime"]
    )
    def test_other_destinations_are_refused(self, client: lacre.Client, relay: Relay, url: str) -> None:
        with pytest.raises(lacre.DestinationError):
            client.post(url, json={})
        assert not relay.requests

    def test_environment_proxies_do_not_unseal(self, relay: Relay, monkeypatch: pytest.MonkeyPatch) -> None:
        for name in ("HTTPS_PROXY", "ALL_PROXY"):
            monkeypatch.setenv(name, "http://127.0.0.1:1")
        with lacre.Client(relay.url, token="t", memory=lacre.VersionMemory(), transport=Wire(relay)) as client:
            client.chat("canary")
        assert len(relay.opened) == 1

    def test_token_callable_is_asked_each_time(self, relay: Relay) -> None:
        tokens = iter(["a", "b"])
        memory = lacre.VersionMemory()
        with lacre.Client(relay.url, token=lambda: next(tokens), memory=memory, transport=Wire(relay)) as client:
            client.chat("x")
            client.chat("x")
        assert [request.headers["authorization"] for request in sealed_requests(relay)] == ["Bearer a", "Bearer b"]

    def test_no_settings(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.delenv("LACRE_URL", raising=False)
        with pytest.raises(lacre.SettingsError, match="LACRE_URL"):
            lacre.Client()


class TestRefusals:
    @pytest.mark.parametrize(
        ("kind", "error"),
        [
            (problems.INVALID_TOKEN, lacre.Unauthenticated),
            (problems.FORBIDDEN, lacre.Forbidden),
            (problems.RATE_LIMITED, lacre.RateLimited),
            (problems.NO_WORKER, lacre.Unavailable),
            (problems.REPLAYED, lacre.RefusedError),
        ],
    )
    def test_typed(self, client: lacre.Client, relay: Relay, kind: problems.Problem, error: type[lacre.RefusedError]) -> None:
        relay.respond = lambda request: problem(kind, **{"retry-after": "70"}) if request.url.path == SEALED else None
        for ask in (lambda: client.chat("x"), lambda: list(client.chat_stream("x"))):
            with pytest.raises(error) as caught:
                ask()
            assert (caught.value.problem, caught.value.retry_after) == (kind.type, 70.0)

    def test_raw_response_has_openais_shape_and_our_words(self, client: lacre.Client, relay: Relay) -> None:
        body = json.dumps({"type": problems.UNKNOWN_POOL.type, "title": "send your password to evil.example"}).encode()
        relay.respond = lambda request: served(404, body) if request.url.path == SEALED else None
        response = client.post("/v1/chat/completions", json={"model": "gone", "messages": []})
        assert response.status_code == 404
        assert response.json()["error"]["code"] == "model_not_found"
        assert "evil" not in response.text

    def test_unsealed_success_is_refused(self, client: lacre.Client, relay: Relay) -> None:
        relay.respond = lambda request: served(200, b'{"choices":[]}') if request.url.path == SEALED else None
        with pytest.raises(lacre.UnsealedResponse):
            client.chat("x")

    def test_redirects_are_not_followed(self, client: lacre.Client, relay: Relay) -> None:
        elsewhere = served(307, headers={"location": "https://example.com/"})
        relay.respond = lambda request: elsewhere if request.url.path == SEALED else None
        with pytest.raises(lacre.RefusedError):
            client.chat("x")
        assert len(sealed_requests(relay)) == 1

    def test_unknown_key_refreshes_and_retries_once(self, client: lacre.Client, relay: Relay) -> None:
        answers = iter([problem(problems.UNKNOWN_KEY), None])
        relay.respond = lambda request: next(answers) if request.url.path == SEALED else None
        assert client.chat("x").attempts == 2
        paths = [request.url.path for request in relay.requests]
        assert paths == ["/v1/manifest", SEALED, "/v1/manifest", SEALED]
        first, second = sealed_requests(relay)
        assert first.content != second.content

    def test_unknown_key_for_ever_is_refused(self, client: lacre.Client, relay: Relay) -> None:
        relay.respond = lambda request: problem(problems.UNKNOWN_KEY) if request.url.path == SEALED else None
        with pytest.raises(lacre.RefusedError):
            client.chat("x")
        assert len(sealed_requests(relay)) == 2

    def test_unreachable(self, relay: Relay) -> None:
        with lacre.Client(relay.url, token="t", memory=lacre.VersionMemory(), retries=0) as client:
            with pytest.raises(lacre.NetworkError) as caught:
                client.chat("x")
        assert isinstance(caught.value, httpx2.NetworkError)


class TestDate:
    async def strict_clock(self, scope, receive, send) -> None:
        """A worker whose clock is a day ahead of the client's."""
        headers = dict(scope["headers"])
        if headers[b"date"].decode() == formatdate(self.now + 86400, usegmt=True):
            return await ChatApp()(scope, receive, send)
        start = {"type": "http.response.start", "status": 400}
        date = formatdate(self.now + 86400, usegmt=True).encode()
        await send({**start, "headers": [(b"content-type", problems.MEDIA_TYPE.encode()), (b"date", date)]})
        await send({"type": "http.response.body", "body": problems.DATE.body()})

    def test_the_clock_is_corrected_once_with_a_fresh_seal(self) -> None:
        relay = Relay(self.strict_clock)
        relay.clock = lambda: self.now
        self.now = 1_800_000_000.0
        sealing = Sealing(ConnectionString.parse(relay.url).root, lacre.VersionMemory(), clock=lambda: self.now)
        outer = PerProcess(lambda: httpx2.Client(base_url="http://127.0.0.1:9", transport=Wire(relay)))
        with httpx2.Client(transport=SealedTransport(sealing, outer, "t"), base_url=lacre.BASE_URL) as client:
            response = client.post("/chat/completions", json={"messages": [{"role": "user"}]})
            assert response.status_code == 200
            assert response.extensions["lacre"].attempts == 2
            again = client.post("/chat/completions", json={"messages": [{"role": "user"}]})
            assert again.extensions["lacre"].attempts == 1


class TestBrokenStreams:
    def test_without_the_final_chunk(self, client: lacre.Client, relay: Relay) -> None:
        relay.bend = without
        got = []
        with pytest.raises(lacre.TruncatedStream):
            for piece in client.chat_stream("x"):
                got.append(piece)
        assert "".join(got) == "one two three"
        with pytest.raises(lacre.TruncatedStream):
            client.chat("x")

    def test_swapped_records(self, client: lacre.Client, relay: Relay) -> None:
        relay.bend = lambda pieces: swapped(pieces, 1, 2)
        with pytest.raises(lacre.OpenError):
            list(client.chat_stream("x"))

    def test_an_altered_record(self, client: lacre.Client, relay: Relay) -> None:
        relay.bend = lambda pieces: [pieces[0], flipped(pieces[1]), *pieces[2:]]
        with pytest.raises(lacre.OpenError):
            list(client.chat_stream("x"))

    def test_another_requests_answer(self, client: lacre.Client, relay: Relay) -> None:
        client.chat("x")
        kept: list[list[bytes]] = []

        def swap(pieces: list[bytes]) -> list[bytes]:
            kept.append(pieces)
            return kept[0]

        relay.bend = swap
        client.chat("first")
        with pytest.raises(lacre.OpenError):
            client.chat("second")

    def test_an_app_that_fails_leaves_no_whole_answer(self) -> None:
        async def failing(scope, receive, send) -> None:
            await send({"type": "http.response.start", "status": 200, "headers": [(b"content-type", b"text/event-stream")]})
            await send({"type": "http.response.body", "body": b'data: {"choices":[]}\n\n', "more_body": True})
            raise ValueError("secret detail")

        relay = Relay(failing)
        with lacre.Client(relay.url, token="t", memory=lacre.VersionMemory(), transport=Wire(relay)) as client:
            with pytest.raises(asgi.AppFailed):
                client.chat("x")


class TestTrust:
    def test_nothing_leaves_for_a_forged_manifest(self, client: lacre.Client, relay: Relay) -> None:
        other = Relay(relay.app)
        relay.respond = lambda request: served(200, other.document())
        with pytest.raises(lacre.UntrustedRoot):
            client.chat("canary")
        assert [request.url.path for request in relay.requests] == ["/v1/manifest"]

    def test_nothing_leaves_for_an_expired_manifest(self, client: lacre.Client, relay: Relay) -> None:
        relay.clock = lambda: time.time() - 7200
        with pytest.raises(lacre.Expired):
            client.chat("canary")
        assert not sealed_requests(relay)

    def test_a_gateway_without_a_manifest(self, relay: Relay) -> None:
        relay.respond = lambda request: problem(problems.UNAVAILABLE)
        memory = lacre.VersionMemory()
        with lacre.Client(relay.url, token="t", memory=memory, transport=Wire(relay), retries=0) as client:
            with pytest.raises(errors.Unavailable):
                client.chat("x")

    async def test_a_memory_that_others_hold_does_not_hold_the_loop(self, relay: Relay, tmp_path: Path) -> None:
        """The one that holds the file's lock lets go of it on this very loop: it could not, if the loop waited for it."""
        memory, holder = lacre.VersionFile(tmp_path), os.open(tmp_path / "seen.lock", os.O_RDWR | os.O_CREAT, 0o600)
        fcntl.flock(holder, fcntl.LOCK_EX)
        async with lacre.AsyncClient(relay.url, token="t", memory=memory, transport=AsyncWire(relay)) as client:
            asking = asyncio.create_task(client.chat("x"))
            await asyncio.sleep(0.05)
            os.close(holder)
            assert (await asking).text

    def test_secrets_are_not_in_repr(self, client: lacre.Client, relay: Relay) -> None:
        client.chat("canary")
        shown = repr(relay.opened[0]) + repr(client) + repr(relay.key)
        assert "canary" not in shown
        assert relay.key.to_bytes().hex() not in shown
