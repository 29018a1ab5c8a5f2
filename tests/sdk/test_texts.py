"""Vectors, tokens and ranks: what the client makes of an answer, and which answers it does not take."""

from __future__ import annotations

import asyncio
import base64
import json
import struct
from collections.abc import Callable
from typing import Any

import pytest

import lacre
from lacre.asgi import EXTENSION
from parts.chat_app import reply
from parts.relay import Relay, connect, connect_async


class Answering:
    """An app that answers every path with what it is told to, for seven tokens of a prompt."""

    def __init__(self, **members: Any) -> None:
        self.members = members
        self.asked: list[tuple[str, Any]] = []

    async def __call__(self, scope, receive, send) -> None:  # type: ignore[no-untyped-def]
        self.asked.append((scope["path"], json.loads((await receive())["body"])))
        used = scope["extensions"][EXTENSION].usage
        used.prompt_tokens, used.model_digest = 7, "sha256:77"
        await reply(send, 200, self.members)


def both(app: Answering, ask: Callable[[Any], Any]) -> list[Any]:
    """What the sync client says, and what the async one does."""
    with connect(Relay(app), retries=0) as client:
        said = ask(client)

    async def awaited() -> Any:
        async with connect_async(Relay(app), retries=0) as other:
            return await ask(other)

    return [said, asyncio.run(awaited())]


def in_base64(*numbers: float) -> str:
    return base64.b64encode(struct.pack(f"<{len(numbers)}f", *numbers)).decode()


class TestEmbed:
    def test_vectors_in_the_order_of_the_texts(self) -> None:
        data = [{"index": 1, "embedding": in_base64(0.5, -1.0)}, {"index": 0, "embedding": [1, 0.25]}]
        app = Answering(model="tiny", data=data, usage={"prompt_tokens": 7, "total_tokens": 7})
        for told in both(app, lambda client: client.embed(["a", "b"], dimensions=2)):
            assert told.vectors == ((1.0, 0.25), (0.5, -1.0))
            assert (told.usage.prompt, told.receipt.prompt_tokens, told.attempts, told.model) == (7, 7, 1, "tiny")
        asked = {"model": "tiny", "input": ["a", "b"], "encoding_format": "base64", "dimensions": 2}
        assert app.asked == [("/v1/embeddings", asked)] * 2

    @pytest.mark.parametrize(
        "data",
        [
            [],
            [{"index": 0, "embedding": [1.0]}] * 2,
            [{"index": 0, "embedding": [1.0]}, {"index": 1, "embedding": [1.0, 2.0]}],
            [{"index": 0, "embedding": [1.0]}, {"index": 2, "embedding": [1.0]}],
            [{"embedding": "AAAA"}, {"embedding": "AAAA"}],
            [{"embedding": in_base64(float("nan"))}, {"embedding": in_base64(1.0)}],
            [{"embedding": [True]}, {"embedding": [1.0]}],
            {"index": 0},
        ],
        ids=["none", "one twice", "of two lengths", "a gap", "half a number", "not a number", "not numbers", "no list"],
    )
    def test_another_answer_is_none(self, data: Any) -> None:
        with connect(Relay(Answering(data=data))) as client, pytest.raises(lacre.InvalidMessage, match="one vector for each"):
            client.embed(["a", "b"])

    def test_an_answer_that_contradicts_its_receipt(self) -> None:
        app = Answering(data=[{"embedding": [1.0]}], usage={"prompt_tokens": 8})
        with connect(Relay(app)) as client, pytest.raises(lacre.InvalidReceipt):
            client.embed("a")

    @pytest.mark.parametrize("texts", [[], 5, None, b"a", {"a": "b"}, ["a", 5]], ids=repr)
    def test_mistakes(self, texts: Any) -> None:
        app = Answering()
        with connect(Relay(app)) as client:
            for ask in (client.embed, lambda given: client.rerank("q", given)):
                with pytest.raises(lacre.UsageError):
                    ask(texts)
            with pytest.raises(lacre.UsageError, match="timout"):
                client.embed("a", timout=3)  # type: ignore[call-arg]
        assert not app.asked


class TestTokenize:
    def test_a_text_and_messages(self) -> None:
        turns = [{"role": "user", "content": "a"}]
        for prompt, sent in (("a b", {"prompt": "a b"}), (turns, {"messages": turns})):
            app = Answering(tokens=[4, 5, 6], count=3, max_model_len=512)
            for told in both(app, lambda client, prompt=prompt: client.tokenize(prompt)):  # type: ignore[misc]
                assert (told.ids, len(told), told.limit) == ((4, 5, 6), 3, 512)
                assert told.verification.receipt is not None
            assert app.asked == [("/v1/tokenize", {**sent, "model": "tiny"})] * 2

    @pytest.mark.parametrize("members", [{}, {"tokens": [1], "count": 2}, {"tokens": [-1], "count": 1}], ids=repr)
    def test_another_answer_is_none(self, members: dict[str, Any]) -> None:
        with connect(Relay(Answering(**{"max_model_len": 9, **members}))) as client, pytest.raises(lacre.InvalidMessage):
            client.tokenize("a")


class TestRerank:
    RESULTS = ({"index": 2, "relevance_score": 0.5}, {"index": 0, "relevance_score": 2})

    def test_the_best_first(self) -> None:
        app = Answering(results=list(self.RESULTS), usage={"total_tokens": 7})
        for told in both(app, lambda client: client.rerank("q", ["a", "b", "c"], top_n=2, model="other")):
            assert [(each.index, each.score, each.text) for each in told.results] == [(0, 2.0, "a"), (2, 0.5, "c")]
            assert told.usage.prompt == 7
        asked = {"model": "other", "query": "q", "documents": ["a", "b", "c"], "top_n": 2}
        assert app.asked == [("/v1/rerank", asked)] * 2

    @pytest.mark.parametrize("documents", [["a", "b"], ["a", "b", "c"]], ids=["an unknown place", "too few"])
    def test_another_answer_is_none(self, documents: list[str]) -> None:
        with connect(Relay(Answering(results=list(self.RESULTS)))) as client, pytest.raises(lacre.InvalidMessage):
            client.rerank("q", documents)
