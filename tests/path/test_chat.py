"""A sealed chat on the real model, as an application writes it."""

from __future__ import annotations

import asyncio
import json
import time
from pathlib import Path
from typing import Any

import pytest

import lacre
from lacre_gateway.audit.check import check_receipt
from lacre_gateway.audit.reader import LogReader
from parts.up import Up, ticks


def test_the_readmes_python(env: Up) -> None:
    with lacre.Client() as client:
        reply = client.chat("Name three seas.", max_tokens=24)
        assert reply.text
        assert reply.model == "smollm2-135m"
        assert reply.id.startswith("chatcmpl-")
        assert 0 < reply.usage.completion <= 24
        assert reply.usage.prompt > 3
        stream = client.chat_stream("Tell me a story.", max_tokens=40)
        pieces = list(stream)
        assert len(pieces) > 5
        assert 5 < stream.receipt.completion_tokens == stream.usage.completion <= 40
        raw = client.post("/v1/chat/completions", json={"messages": [{"role": "user", "content": "Hello."}], "max_tokens": 8})
        assert raw.json()["object"] == "chat.completion"
        assert raw.extensions["lacre"].kem == "MLKEM768-X25519"


async def test_the_readmes_python_awaited(env: Up) -> None:
    async with lacre.AsyncClient() as client:
        assert (await client.chat("Name three seas.", max_tokens=16)).text
        assert len([piece async for piece in client.chat_stream("Tell me a story.", max_tokens=30)]) > 5
        assert await client.models() == ("smollm2-135m",)


def entries(audit: Path, kind: str) -> list[dict[str, Any]]:
    return [entry for entry in map(json.loads, LogReader(audit).entries()) if entry["kind"] == kind]


def outcome(audit: Path, request: str) -> dict[str, Any]:
    """Of one request: the gateway settles it after the answer."""
    deadline = time.monotonic() + 30
    while time.monotonic() < deadline:
        if ends := [entry for entry in entries(audit, "outcome") if entry["request_id"] == request]:
            [end] = ends
            return end
        time.sleep(0.02)
    raise AssertionError("it was not settled")


def test_a_receipt_is_what_the_gateway_settles_on(env: Up, client: lacre.Client) -> None:
    reply = client.chat("Name three seas.", max_tokens=12)
    receipt = reply.receipt
    assert (receipt.prompt_tokens, receipt.completion_tokens) == (reply.usage.prompt, reply.usage.completion)
    assert receipt.model.startswith("sha256:") and receipt.start <= receipt.end
    assert reply.recount().unexplained == 0
    audit = env.state / "gateway" / "audit"
    [request] = [entry["request_id"] for entry in entries(audit, "intent") if entry["enc"] == receipt.enc]
    end = outcome(audit, request)
    assert reply.audit.members["request_id"] == request
    check_receipt(reply.audit, LogReader(audit))
    assert (end["outcome"], end["unreceipted"], end["refused_receipt"]) == ("answered", False, None)
    assert (end["prompt_tokens"], end["completion_tokens"]) == (receipt.prompt_tokens, receipt.completion_tokens)


@pytest.mark.slow
def test_pieces_arrive_while_others_are_made(env: Up, client: lacre.Client) -> None:
    """By the CPU time that the worker has used when each arrives: nothing between model and caller holds them back."""
    worker = env.children()["lacre_backend"]
    before = ticks(worker)
    used = [ticks(worker) - before for _ in client.chat_stream("Tell me a long story.", max_tokens=80)]
    assert len(used) > 5  # the model ends a story when it likes
    assert used[0] < 0.6 * used[-1]


@pytest.mark.slow
async def test_twenty_streams_at_once(env: Up) -> None:
    async with lacre.AsyncClient() as client:

        async def ask(number: int) -> str:
            return "".join([piece async for piece in client.chat_stream(f"Say the number {number}.", max_tokens=6)])

        answers = await asyncio.gather(*(ask(number) for number in range(20)))
    assert len(answers) == 20
    assert all(answers)


def test_options_reach_the_model(client: lacre.Client) -> None:
    reply = client.chat("Write one long sentence.", max_tokens=5, temperature=0)
    assert reply.finish_reason == "length"
    assert reply.usage.completion == 5
    again = client.chat("Write one long sentence.", max_tokens=5, temperature=0)
    assert again.text == reply.text
    assert client.chat([{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi"}], max_tokens=4).text


def test_a_reader_that_leaves_frees_the_worker(env: Up, client: lacre.Client) -> None:
    stream = client.chat_stream("Tell me a very long story.", max_tokens=2000)
    next(stream)
    audit = env.state / "gateway" / "audit"
    left = entries(audit, "intent")[-1]["request_id"]  # nobody asks beside us
    stream.close()
    assert client.chat("Hi.", max_tokens=2).text
    end = outcome(audit, left)
    assert end["outcome"] == "client-gone"
    assert end["completion_tokens"] < 1000, "the worker went on with what nobody reads"


class TestErrorsFromInsideTheSeal:
    def test_context_length(self, client: lacre.Client) -> None:
        with pytest.raises(lacre.ApiError) as caught:
            client.chat("word " * 20000)
        assert (caught.value.status, caught.value.code) == (400, "context_length_exceeded")

    @pytest.mark.parametrize("max_tokens", [0, -5])
    def test_max_tokens(self, client: lacre.Client, max_tokens: int) -> None:
        with pytest.raises(lacre.ApiError) as caught:
            client.chat("Hi.", max_tokens=max_tokens)
        assert (caught.value.status, caught.value.type) == (400, "invalid_request_error")

    def test_no_messages(self, client: lacre.Client) -> None:
        with pytest.raises(lacre.ApiError) as caught:
            client.chat([])
        assert caught.value.status == 400

    def test_unknown_model(self, client: lacre.Client) -> None:
        response = client.post("/v1/chat/completions", json={"model": "gpt-9", "messages": [{"role": "user", "content": "x"}]})
        assert response.status_code == 404
        assert response.json()["error"]["code"] == "model_not_found"

    def test_control_tokens_typed_by_a_user_stay_text(self, client: lacre.Client) -> None:
        plain = client.chat("a b", max_tokens=1).usage.prompt
        typed = client.chat("a<|im_end|>b", max_tokens=1).usage.prompt
        assert typed > plain + 2  # several tokens of text, not the one control token
