"""`client.explain`, sync and async, of an app that really explains: the API over an echo."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import closing
from typing import Any

import pytest

import lacre
from lacre.asgi import EXTENSION
from lacre.errors import ProtocolError, VerificationError
from lacre_backend.api.app import create_app
from parts.bent import flipped
from parts.echo_engine import LAYERS, UNLIKELY, EchoEngine
from parts.relay import Relay, connect, connect_async

DOCUMENTS = {"north": "Oslo", "south": "Rome"}


@pytest.fixture
def relay() -> Iterator[Relay]:
    with closing(EchoEngine(name="tiny", n_ctx=512)) as engine:
        yield Relay(create_app([engine]))


def test_documents_before_a_question(relay: Relay) -> None:
    with connect(relay) as client:
        told = client.explain("Where?", parts=DOCUMENTS, answer="Oslo\n\nRo")
    assert [(part.id, part.text) for part in told.parts] == list(DOCUMENTS.items())
    # The echo says "Oslo, Rome, Where?": without Oslo the answer begins elsewhere, without Rome its end is another.
    assert [part.drop for part in told.parts] == [-6 * UNLIKELY, -2 * UNLIKELY]
    assert told.top is told.parts[0] and told.top.share == pytest.approx(6 / 8)
    assert (told.answer, told.logprob, told.model) == ("Oslo\n\nRo", 0.0, "tiny")
    assert "".join(token.text for token in told.tokens) == told.answer
    assert {token.bits for token in told.tokens} == {0.0}
    assert (told.usage.completion, told.usage.prompt) == (0, told.receipt.prompt_tokens)
    assert not [secret for secret in ("Oslo", "Rome", "Where") if secret in repr(told)]


async def test_the_model_answers_and_a_list_has_numbers(relay: Relay) -> None:
    async with connect_async(relay) as client:
        told = await client.explain("Where?", parts=["Oslo", "Rome"], max_tokens=4)
    assert (told.answer, [part.id for part in told.parts], told.usage.completion) == ("Oslo", ["1", "2"], 4)
    assert told.top is told.parts[0]
    outer = relay.sealed[-1].headers
    assert (outer["lacre-action"], outer["lacre-max-tokens"]) == ("explain", "4")


def test_parts_of_ones_own_messages(relay: Relay) -> None:
    content = [{"type": "text", "id": "a", "text": "Oslo"}, {"type": "text", "text": "Where?"}]
    with connect(relay) as client:
        told = client.explain([{"role": "user", "content": content}], parts={"b": "Rome"}, answer="Rome", model="tiny")
        alone = client.explain("Where?", answer="Here.")
    assert [part.id for part in told.parts] == ["b", "a"]
    assert [part.drop > 0 for part in told.parts] == [True, False]
    assert (alone.parts, alone.top) == ((), None)
    assert alone.tokens[-1].bits > 1


def test_a_lens(relay: Relay) -> None:
    with connect(relay) as client:
        told = client.explain("Where?", parts=DOCUMENTS, answer="Os!", lens=True)
        outer = relay.sealed[-1].headers
        assert client.explain("Where?", parts=DOCUMENTS, answer="Os!").lens is None
    assert (outer["lacre-action"], relay.sealed[-1].headers["lacre-action"]) == ("lens", "explain")
    assert told.lens is not None
    assert told.lens.layers == tuple(range(LAYERS))
    first, _, last = told.lens.tokens
    assert (first.text, first.ranks, first.says, first.settled) == ("O", (2, 2, 1), ("?", "?", "O"), 2)
    assert first.probabilities[-1] == 1.0
    assert (last.ranks[-1], last.settled) == (2, None)
    assert "O" not in repr(told.lens).replace("LensToken", "").replace("Lens", "")


async def test_a_lens_for_the_async_client(relay: Relay) -> None:
    async with connect_async(relay) as client:
        told = await client.explain("Where?", parts=["Oslo"], max_tokens=4, lens=True)
    assert told.lens is not None
    assert [token.text for token in told.lens.tokens] == list("Oslo")


@pytest.mark.parametrize(
    ("messages", "parts"),
    [
        ("q", "one text"), ("q", 7), ("q", ["a", 7]), ("q", {7: "a"}), ([], ["a"]),
        ([{"role": "assistant", "tool_calls": []}], ["a"]), ([{"role": "user", "content": None}], ["a"]), (b"q", ["a"]),
    ],
)  # fmt: skip
def test_wrong_arguments(relay: Relay, messages: Any, parts: Any) -> None:
    with connect(relay) as client, pytest.raises(lacre.UsageError):
        client.explain(messages, parts=parts)
    assert not relay.requests


def test_an_answer_cut_anywhere_explains_nothing(relay: Relay) -> None:
    """At each byte of the sealed answer, and with each of its bytes changed."""
    sealed: list[bytes] = []

    def kept(pieces: list[bytes]) -> list[bytes]:
        sealed[:] = [b"".join(pieces)]
        return pieces

    relay.bend = kept
    options = {"retries": 0, "resume": 0}
    with connect(relay, **options) as client:
        assert client.explain("q", parts=["a"], answer="a", lens=True).parts
        for place in range(0, len(sealed[0]), max(len(sealed[0]) // 64, 1)):
            for bend in (lambda data, place=place: data[:place], lambda data, place=place: flipped(data, place)):
                relay.bend = lambda pieces, bend=bend: [bend(b"".join(pieces))]
                with pytest.raises((ProtocolError, VerificationError)):
                    client.explain("q", parts=["a"], answer="a", lens=True)


def test_a_refusal_of_the_worker(relay: Relay) -> None:
    with connect(relay) as client, pytest.raises(lacre.ApiError, match="At most 16"):
        client.explain("q", parts=["a"] * 17)


@pytest.mark.parametrize(
    ("bent", "error"),
    [
        ({"parts": []}, lacre.InvalidMessage), ({"answer": None, "tokens": 3}, lacre.InvalidMessage),
        ({"parts": [{"id": "other", "drop": 1.0, "share": 1.0}]}, lacre.InvalidMessage),
        ({"logprob": "x"}, lacre.InvalidMessage),
        ({"usage": {"prompt_tokens": 1, "completion_tokens": 1}}, lacre.InvalidReceipt),
    ],
)  # fmt: skip
def test_an_answer_that_explains_something_else(bent: Mapping[str, Any], error: type[lacre.LacreError]) -> None:
    answer = {
        "id": "expl-1", "model": "tiny", "answer": "a", "logprob": -1.0, "parts": [{"id": "1", "drop": 1.0, "share": 1.0}],
        "tokens": [{"text": "a", "bits": 1.4}], "usage": {"prompt_tokens": 7, "completion_tokens": 0},
    }  # fmt: skip

    def relay_of(body: Mapping[str, Any]) -> Relay:
        async def app(scope: Any, receive: Any, send: Any) -> None:
            scope["extensions"][EXTENSION].usage.prompt_tokens = 7
            await receive()
            await send({"type": "http.response.start", "status": 200, "headers": []})
            await send({"type": "http.response.body", "body": json.dumps(body).encode()})

        return Relay(app)

    with connect(relay_of(answer)) as client:
        assert client.explain("q", parts=["t"]).parts[0].drop == 1.0
    with connect(relay_of({**answer, **bent})) as client, pytest.raises(error):
        client.explain("q", parts=["t"])
