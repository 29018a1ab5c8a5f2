"""A sealed chat on the real model, as an application writes it."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import pytest

import lacre
from lacre_gateway.audit.check import check_receipt
from lacre_gateway.audit.reader import LogReader
from parts.stage.standing import entries
from parts.up import Up, ticks
from parts.waiting import wait_until


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


def outcome(audit: Path, request: str) -> dict[str, Any]:
    """Of one request: the gateway settles it after the answer."""

    def ends() -> list[dict[str, Any]]:
        return [entry for entry in entries(audit, "outcome") if entry["request_id"] == request]

    wait_until(ends, 30, lambda: "it was not settled")
    [end] = ends()
    return end


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


HI = [{"role": "user", "content": "Hi."}]


@pytest.mark.parametrize(
    ("body", "status", "code"),
    [
        ({"messages": [{"role": "user", "content": "word " * 20000}]}, 400, "context_length_exceeded"),
        ({"messages": HI, "max_tokens": 0}, 400, "below_min_value"),
        ({"messages": HI, "max_tokens": -5}, 400, "below_min_value"),
        ({"messages": []}, 400, "empty_array"),
        ({"messages": HI, "model": "gpt-9"}, 404, "model_not_found"),  # the gateway's word for it
    ],
    ids=["context length", "no tokens", "less than none", "no messages", "unknown model"],
)
def test_errors_as_openai_has_them(client: lacre.Client, body: dict[str, Any], status: int, code: str) -> None:
    response = client.post("/v1/chat/completions", json=body)
    error = response.json()["error"]
    assert (response.status_code, error["code"]) == (status, code)
    assert error["type"] == ("invalid_request_error" if status == 400 else "lacre_gateway_refusal")


def test_control_tokens_typed_by_a_user_stay_text(client: lacre.Client) -> None:
    plain, typed = (client.chat(text, max_tokens=1).usage.prompt for text in ("a b", "a<|im_end|>b"))
    assert typed > plain + 2  # several tokens of text, not the one control token
