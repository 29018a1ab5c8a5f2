"""The Responses and Messages APIs through the seal, by their vendors' own clients."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Iterator
from contextlib import closing
from typing import Any

import anthropic
import httpx2
import openai
import pytest

import lacre
from lacre_backend.api.app import create_app
from parts.echo_engine import CHAT_TEMPLATE
from parts.relay import Relay, connect
from parts.scripted_engine import ScriptedEngine

SAID: list[Any] = [{"role": "user", "content": "Hi"}]
CALL = '<tool_call>\n{"name": "weather", "arguments": {"place": "Porto"}}\n</tool_call>'
SCHEMA = {"type": "object", "properties": {"place": {"type": "string"}}}
RESPONSE: dict[str, Any] = {
    "model": "scripted",
    "input": SAID,
    "tools": [{"type": "function", "name": "weather", "parameters": SCHEMA}],
}
MESSAGE: dict[str, Any] = {
    "model": "scripted", "messages": SAID, "max_tokens": 200, "tools": [{"name": "weather", "input_schema": SCHEMA}]
}  # fmt: skip
Ask = Callable[[lacre.Client], object]


def respond(sealed: lacre.Client) -> object:
    client = openai.OpenAI(http_client=sealed, base_url=lacre.BASE_URL, api_key="secret-key", max_retries=0)
    with client.responses.stream(**RESPONSE, metadata={"who": "jo@example"}, user="jo@example") as stream:
        return stream.until_done().get_final_response().output


def message(sealed: lacre.Client) -> object:
    client = anthropic.Anthropic(http_client=sealed, base_url=lacre.ORIGIN, api_key="secret-key", max_retries=0)
    with client.messages.stream(**MESSAGE, metadata={"user_id": "jo@example"}) as stream:
        return stream.get_final_message().content


@pytest.fixture
def relay() -> Iterator[Relay]:
    with closing(ScriptedEngine(lambda _: f"It rains.\n{CALL}")) as engine:
        yield Relay(create_app([engine]), model="scripted")


BOTH = pytest.mark.parametrize("ask", [respond, message])


@BOTH
def test_nobody_behind_the_seal_learns_who_asks(relay: Relay, ask: Ask) -> None:
    with connect(relay) as sealed:
        assert "Porto" in str(ask(sealed))
    [inside], [outside] = relay.opened, relay.sealed
    assert outside.headers["lacre-action"] == "chat"
    for secret in ("jo@example", "secret-key"):
        assert secret not in inside.request.content.decode() + str(inside.request.headers) + str(outside.headers)
    assert json.loads(inside.request.content)["model"] == "scripted"


@BOTH
def test_a_stream_cut_at_any_byte_is_never_a_short_answer(relay: Relay, ask: Ask) -> None:
    """The cut ends in order, as one that a gateway makes: only the seal can tell."""
    places: list[int] = []
    lengths: list[int] = []

    def bend(pieces: list[bytes]) -> list[bytes]:
        whole = b"".join(pieces)
        lengths.append(len(whole))
        return [whole[: places.pop()]] if places else [whole]

    relay.bend = bend
    with connect(relay, retries=0, resume=0) as sealed:
        ask(sealed)
        # A prime step, so that the cuts fall on every part of a record; and each of the last bytes.
        cuts = [*range(0, lengths[0] - 20, 397), *range(lengths[0] - 20, lengths[0])]
        places += cuts
        for _ in cuts:
            with pytest.raises((lacre.LacreError, anthropic.APIConnectionError)) as caught:
                ask(sealed)
            assert isinstance(caught.value, lacre.LacreError) or isinstance(caught.value.__cause__, lacre.LacreError)
    assert len(lengths) == 1 + len(cuts)


CUT = httpx2.RemoteProtocolError("peer closed connection without sending complete message body (incomplete chunked read)")
THOUGHT = "The sky <b> is grey, 世界"
TALK = f"<think>\n{THOUGHT}\n</think>\n\nIt rains.\n{CALL}\n{CALL.replace('Porto', 'Faro 🦈')}"
TOOLS: list[Any] = [{"type": "function", "function": {"name": "weather", "parameters": SCHEMA}}]


def chat(sealed: lacre.Client) -> object:
    client = openai.OpenAI(http_client=sealed, base_url=lacre.BASE_URL, api_key="none", max_retries=0)
    with client.chat.completions.stream(
        model="scripted", messages=SAID, tools=TOOLS, stream_options={"include_usage": True}
    ) as stream:
        return stream.until_done().get_final_completion().to_dict()


def whole_response(sealed: lacre.Client) -> object:
    client = openai.OpenAI(http_client=sealed, base_url=lacre.BASE_URL, api_key="none", max_retries=0)
    with client.responses.stream(**RESPONSE) as stream:
        return stream.until_done().get_final_response().to_dict()


def whole_message(sealed: lacre.Client) -> object:
    client = anthropic.Anthropic(http_client=sealed, base_url=lacre.ORIGIN, api_key="none", max_retries=0)
    with client.messages.stream(**{**MESSAGE, "max_tokens": 400}) as stream:
        return stream.get_final_message().to_dict()


def apart(value: Any, path: str = "") -> tuple[Any, dict[str, int]]:
    """The answer without what two answers never share, and the counts of its tokens by name."""
    if isinstance(value, list):
        return [apart(each)[0] for each in value], {}
    if not isinstance(value, dict):
        return value, {}
    counts = dict(value.get("usage") or {})
    return {
        name: apart(each)[0] for name, each in value.items() if name not in ("id", "call_id", "created", "created_at", "usage")
    }, counts


@pytest.mark.parametrize("ask", [chat, whole_response, whole_message])
def test_an_answer_with_reasoning_and_calls_is_resumed_wherever_it_breaks(ask: Ask) -> None:
    """The vendors' own clients notice nothing: each part once, and all tokens counted."""
    kept: list[int] = []
    with closing(ScriptedEngine(lambda _: TALK)) as engine:
        engine.model = dataclasses.replace(engine.model, chat_template=CHAT_TEMPLATE + "{# </think> #}")
        relay = Relay(create_app([engine]), model="scripted", fault=CUT)
        relay.bend = lambda pieces: kept.append(len(pieces)) or pieces  # type: ignore[func-returns-value]
        with connect(relay, shape="none") as sealed:
            whole, used = apart(ask(sealed))
            assert THOUGHT in str(whole) and "Porto" in str(whole) and "Faro 🦈" in str(whole)
            resumptions = twice = 0
            for place in range(3, kept[0], 5):
                left = [9, place] if place % 2 else [place]  # every other answer breaks off twice
                relay.bend = lambda pieces, left=left: pieces[: left.pop()] if left else pieces
                relay.opened.clear()
                again, counts = apart(ask(sealed))
                assert again == whole
                assert len(relay.opened) in (2, 2 + place % 2)
                twice += len(relay.opened) > 2
                resumed = "resume" in json.loads(relay.opened[-1].request.content)
                resumptions += resumed
                told = {name: count for name, count in counts.items() if isinstance(count, int)}
                own = {name: used[name] for name in told}
                prompt = {name for name in told if name in ("prompt_tokens", "input_tokens", "total_tokens")}
                assert {name: n for name, n in told.items() if name not in prompt} == {
                    n: own[n] for n in own if n not in prompt
                }
                assert all((told[name] > own[name]) == resumed for name in prompt)
                assert reasoned(counts) == reasoned(used) > 0
            assert resumptions > 9 and twice > 4


def reasoned(counts: Any) -> int:
    """The tokens of the reasoning."""
    found = [details for name, details in counts.items() if name in ("completion_tokens_details", "output_tokens_details")]
    return sum(each.get("reasoning_tokens", each.get("thinking_tokens", 0)) for each in found)


@pytest.mark.parametrize("ask", [chat, whole_response, whole_message])
@pytest.mark.parametrize("pieces", [4, 30])
def test_a_worker_that_gives_up_is_no_concern_of_the_callers(ask: Ask, pieces: int) -> None:
    """It says so in the stream, in the words of each API, and another worker continues."""
    with closing(ScriptedEngine(lambda _: TALK)) as engine:
        engine.model = dataclasses.replace(engine.model, chat_template=CHAT_TEMPLATE + "{# </think> #}")
        app = create_app([engine])
        calls: list[Any] = []

        async def failing(scope: Any, receive: Any, send: Any) -> None:
            calls.append(scope)
            sent: list[Any] = []

            async def some(message: Any) -> None:
                sent.append(message)
                if len(sent) == pieces and len(calls) == 1:
                    engine.close()
                await send(message)

            await app(scope, receive, some)
            engine._closed = False

        with connect(Relay(create_app([engine]), model="scripted"), shape="none") as sealed:
            whole, _ = apart(ask(sealed))
        with connect(Relay(failing, model="scripted"), shape="none") as sealed:
            assert apart(ask(sealed))[0] == whole
        assert len(calls) == 2
