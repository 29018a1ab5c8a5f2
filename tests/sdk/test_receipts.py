"""The receipt of an answer, what can be counted again, and `verification`: what was checked, with what, and what was not."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from typing import Any

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

import lacre
from lacre.chat.stream import Deltas
from lacre.errors import LacreError
from lacre.evidence.receipts import TRAILER, Receipt, of_answer
from lacre.evidence.recount import Recount, Written
from lacre.jose.jws import b64u, raw_public_key
from lacre.trust.manifest import fingerprint
from parts.bent import without
from parts.chat_app import ChatApp, reply
from parts.relay import Relay, connect, on_sealed, served

Bend = Callable[[Receipt], list[Receipt]]
USED = lacre.TokenUsage(prompt=7, completion=3, cached=2)
PATH, BODY = "/v1/chat/completions", {"messages": [{"role": "user", "content": "x"}], "max_tokens": 9, "stream": True}


def changed(**members: Any) -> Bend:
    return lambda receipt: [dataclasses.replace(receipt, **members)]


# What a worker, or whoever took its place, may put where the receipt belongs.
BAD: dict[str, Bend] = {
    "none": lambda receipt: [],
    "two": lambda receipt: [receipt, receipt],
    "of another request": changed(enc=b64u(bytes(32))),
    "a cumulative one": changed(final=False),
    "more than was asked for": changed(completion_tokens=10),
    "more cached than there was": changed(cached_tokens=8),
}
# What only somebody who reads the answer notices.
UNLIKE_THE_USAGE: dict[str, Bend] = {
    "more tokens": changed(completion_tokens=4),
    "fewer tokens": changed(completion_tokens=2),
    "a longer prompt": changed(prompt_tokens=700),
    "less of it cached": changed(cached_tokens=0),
}


class TestGoodReceipts:
    def test_on_a_reply(self, client: lacre.Client, relay: Relay) -> None:
        reply = client.chat("x")
        receipt = reply.receipt
        assert receipt.final and receipt.model == "sha256:77"
        assert (receipt.prompt_tokens, receipt.cached_tokens, receipt.completion_tokens) == (7, 2, 3)
        assert receipt.enc == b64u(relay.opened[0].header.digest)
        assert reply.usage == USED

    def test_on_a_stream(self, client: lacre.Client, relay: Relay) -> None:
        with client.chat_stream("x") as stream:
            for _ in range(3):
                next(stream)
                assert (stream.receipt, stream.usage, stream.recount()) == (None, None, None)
            assert list(stream) == []
        assert stream.receipt.enc == b64u(relay.opened[0].header.digest)
        assert stream.usage == USED
        assert (stream.text, stream.attempts, stream.facts.shape) == ("one two three", 1, "pad")

    async def test_awaited(self, async_client: lacre.AsyncClient) -> None:
        assert (await async_client.chat("x")).receipt.completion_tokens == 3
        async with async_client.chat_stream("x") as stream:
            assert [piece async for piece in stream] == ["one ", "two ", "three"]
        assert stream.receipt.completion_tokens == stream.usage.completion == stream.recount().claimed == 3
        assert stream.verification.receipt == stream.receipt
        assert async_client.verification.audit == stream.audit

    def test_on_a_raw_response_once_it_has_ended(self, client: lacre.Client) -> None:
        with client.stream("POST", PATH, json=BODY) as response:
            facts = response.extensions["lacre"]
            assert facts.receipt is None
            response.read()
            assert facts.receipt.completion_tokens == 3
        assert client.post(PATH, json=BODY).extensions["lacre"].receipt.final

    def test_an_error_of_the_api_has_one_too(self, client: lacre.Client) -> None:
        response = client.post(PATH, json={"messages": []})
        assert (response.status_code, response.extensions["lacre"].receipt.completion_tokens) == (400, 0)

    def test_usage_is_asked_for_unless_the_caller_says_otherwise(self, client: lacre.Client, app: ChatApp) -> None:
        stream = client.chat_stream("x", stream_options={"include_obfuscation": False})
        assert list(stream)
        assert stream.usage == USED  # the receipt's
        assert list(client.chat_stream("x"))
        first, second = map(json.loads, app.bodies)
        assert "include_usage" not in first["stream_options"]
        assert second["stream_options"] == {"include_usage": True}

    def test_a_stream_that_is_never_asked_sends_nothing(self, client: lacre.Client, relay: Relay) -> None:
        client.chat_stream("x").close()
        assert not relay.requests


class TestBadReceipts:
    @pytest.mark.parametrize("bend", [*BAD.values(), *UNLIKE_THE_USAGE.values()], ids=[*BAD, *UNLIKE_THE_USAGE])
    def test_chat(self, client: lacre.Client, relay: Relay, bend: Bend) -> None:
        relay.receipts = bend
        with pytest.raises(lacre.InvalidReceipt):
            client.chat("x", max_tokens=9)
        stream = client.chat_stream("x", max_tokens=9)
        with pytest.raises(lacre.InvalidReceipt):
            list(stream)
        assert (stream.receipt, stream.usage) == (None, None)
        with pytest.raises(lacre.UsageError, match="ended with an error"):
            stream.reply()

    @pytest.mark.parametrize("bend", BAD.values(), ids=BAD)
    async def test_raw(self, async_client: lacre.AsyncClient, relay: Relay, bend: Bend) -> None:
        relay.receipts = bend
        with pytest.raises(lacre.InvalidReceipt):
            await async_client.post(PATH, json=BODY)
        async with async_client.stream("POST", PATH, json=BODY) as response:
            with pytest.raises(lacre.InvalidReceipt):
                await response.aread()
            assert response.extensions["lacre"].receipt is None

    def test_by_another_key(self, client: lacre.Client, relay: Relay) -> None:
        client.models()  # the manifest names the pool's receipt key
        relay.receipt_key = Ed25519PrivateKey.generate()
        with pytest.raises(lacre.InvalidReceipt) as caught:
            client.chat("x")
        assert isinstance(caught.value.__cause__, lacre.InvalidSignature)
        assert isinstance(caught.value, lacre.VerificationError)

    def test_a_usage_that_is_none(self) -> None:
        async def odd(_scope: Any, receive: Any, send: Any) -> None:
            await receive()
            choice = {"message": {"content": "x"}, "finish_reason": "stop"}
            await reply(send, 200, {"id": "a", "model": "m", "choices": [choice], "usage": [1]})

        with connect(Relay(odd)) as client, pytest.raises(lacre.InvalidMessage):
            client.chat("x")


class TestOfAnswer:
    KEY = Ed25519PrivateKey.generate()
    PUBLIC = KEY.public_key().public_bytes_raw()
    RECEIPT = Receipt(b64u(bytes(32)), "sha256:0", 7, 2, 3, 1.0, 2.0, True)

    def test_the_ceiling_is_inclusive(self) -> None:
        trailers = [("x-other", "1"), (TRAILER, self.RECEIPT.sign(self.KEY))]
        assert of_answer(trailers, self.PUBLIC, bytes(32), 3) == self.RECEIPT
        with pytest.raises(lacre.InvalidReceipt):
            of_answer(trailers, self.PUBLIC, bytes(32), 2)

    @pytest.mark.parametrize("token", ["", "a.b.c", "x" * 600_000, "ä"])
    def test_what_is_no_receipt(self, token: str) -> None:
        with pytest.raises(lacre.InvalidReceipt):
            of_answer([(TRAILER, token)], self.PUBLIC, bytes(32), 9)


def words(text: str) -> int:
    return len(text.split())


CALL = {"id": "call_1", "type": "function", "function": {"name": "look", "arguments": '{"at":"x"}'}}
CALLS = {"role": "assistant", "content": None, "refusal": None, "tool_calls": [CALL]}
REASONS = {"role": "assistant", "content": "so", "reasoning_content": "hm"}


def recount(messages: list[Any], claimed: int, tokenizer: Any = None, logprobs: int | None = None) -> Recount:
    """logprobs: how many tokens each choice lists."""
    written, listed = Written(), None if logprobs is None else {"content": [{"token": "t"}] * logprobs}
    for number, message in enumerate(messages):
        written.add({"index": number, "message": message, "logprobs": listed}, message)
    return written.recount(claimed, tokenizer)


class TestRecount:
    def test_of_a_reply_and_a_stream(self, client: lacre.Client) -> None:
        counted = client.chat("x").recount(words)
        assert counted == Recount(claimed=3, text_bytes=13, listed=None, counted=3)
        assert (counted.unexplained, counted.difference) == (0, 0)
        stream = client.chat_stream("x")
        list(stream)
        assert stream.recount(words) == counted

    @pytest.mark.parametrize(
        ("messages", "logprobs", "claimed", "tokenizer", "expected"),
        [
            ([{"content": "abc"}], None, 50, None, {"unexplained": 47, "difference": None}),  # no text accounts for them
            ([{"content": "äbc"}], None, 4, None, {"unexplained": 0}),  # bytes, not characters
            ([{"content": "one two three"}], None, 9, words, {"unexplained": 0, "difference": 6}),
            ([CALLS, REASONS], None, 1, len, {"text_bytes": len('look{"at":"x"}sohm'), "counted": 18}),
            ([{"content": "abc"}, {"content": "d"}], 3, 6, None, {"listed": 6}),
            ([{"content": "\ud800"}], None, 1, None, {"text_bytes": 3}),  # it is no Unicode
        ],
    )
    def test_of_an_answer(
        self, messages: list[Any], logprobs: int | None, claimed: int, tokenizer: Any, expected: dict[str, Any]
    ) -> None:
        counted = recount(messages, claimed, tokenizer, logprobs)
        assert {name: getattr(counted, name) for name in expected} == expected

    def test_deltas_of_several_choices(self) -> None:
        deltas = Deltas()
        for index, text in ((0, "a"), (1, "bc"), (0, "d")):
            deltas.feed(json.dumps({"choices": [{"index": index, "delta": {"content": text}}]}))
        texts: list[str] = []
        deltas.written.recount(TestOfAnswer.RECEIPT, lambda text: texts.append(text) or 0)  # type: ignore[func-returns-value]
        assert (deltas.text, texts) == ("ad", ["ad", "bc"])

    def test_a_nest_that_a_hostile_worker_sends(self) -> None:
        nested: Any = "x"
        for _ in range(100_000):
            nested = [nested]
        assert recount([{"content": nested}], claimed=1).text_bytes == 1


def test_before_and_after_an_answer(client: lacre.Client, relay: Relay) -> None:
    pinned = b64u(raw_public_key(relay.root))
    assert client.verification == lacre.Verification(pinned)
    reply = client.chat("Name three seas.")
    checked = client.verification
    assert checked.manifest is not None and checked.sealed_to is not None
    assert (checked.pinned, checked.manifest.root) == (pinned, pinned)
    assert checked.manifest.signer == b64u(raw_public_key(relay.signer))
    assert (checked.manifest.issuer, checked.manifest.version) == ("test", 1)
    assert 0 <= checked.manifest.age < 60
    assert checked.sealed_to.key == fingerprint(relay.key.config)
    assert (checked.sealed_to.pool, checked.sealed_to.kem) == ("default", "MLKEM768-X25519")
    assert (checked.receipt, checked.audit) == (reply.receipt, reply.audit)
    assert reply.verification.receipt == reply.receipt
    shown = json.loads(json.dumps(checked.members()))
    assert shown["audit"]["entry"]["pool"] == "default"
    assert shown["receipt"]["completion_tokens"] == 3
    assert "t0ken" not in repr(checked) + str(shown)


def test_an_untrusted_manifest(client: lacre.Client, relay: Relay) -> None:
    other = Relay(relay.app)
    relay.respond = lambda request: served(200, other.document())
    with pytest.raises(lacre.UntrustedRoot) as caught:
        client.chat("x")
    assert caught.value.verification == lacre.Verification(b64u(raw_public_key(relay.root)))


BENT: dict[str, dict[str, Any]] = {
    "refused": {"respond": on_sealed(lambda: served(403))},
    "cut": {"bend": without},
    "no receipt": {"receipts": lambda receipt: []},
    "no audit": {"audit": lambda proof: None},
    "the worker's": {},
}


@pytest.mark.parametrize("kind", BENT)
def test_on_errors(kind: str) -> None:
    with connect(Relay(ChatApp(), **BENT[kind])) as client, pytest.raises(LacreError) as caught:
        client.chat([] if kind == "the worker's" else "x")
    checked = caught.value.verification
    assert checked is not None and checked.sealed_to is not None and checked.manifest is not None
    assert (checked.audit is None) == (kind in ("refused", "no audit"))
    assert (checked.receipt is None) == (kind != "the worker's")
    assert caught.value.remedy
