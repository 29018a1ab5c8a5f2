"""The state of a running answer: another client continues it, whole and once, and nobody else can read it."""

from __future__ import annotations

import asyncio
import secrets
import time
from collections.abc import Iterator
from contextlib import closing
from dataclasses import replace
from typing import Any

import pytest

import lacre
from lacre.asgi import App
from lacre.exchange.first_choice import FirstChoice
from lacre.exchange.stream_state import LIFETIME, StreamState
from lacre.jose.jws import b64u_decode
from lacre_backend.api.app import create_app
from parts.echo_engine import CHAT_TEMPLATE, EchoEngine
from parts.relay import Relay, connect, connect_async
from parts.scripted_engine import ScriptedEngine

SAID = "日本 and 😀 seas"
KEY = secrets.token_bytes(32)
RESUME = {"digest": "sha256:77", "tokens": [1, 2]}
SPOKEN = {"role": "assistant", "content": "one", "reasoning": "hm"}
UNTIL = time.time() + 10 * LIFETIME  # a whole run of tests may last longer than a state lives
STATE = StreamState(b'{"messages":[]}', RESUME, SPOKEN, {"id": "c1"}, UNTIL)
ROOT = b"r" * 32


@pytest.fixture
def app() -> App:  # type: ignore[override]
    return create_app([EchoEngine(name="tiny")])


@pytest.fixture
def relay(app: App) -> Relay:
    return Relay(app)


def begun(relay: Relay, pieces: int) -> tuple[str, str]:
    """The state of an answer of which so many pieces were read, and its id."""
    with connect(relay) as client:
        stream = client.chat_stream(SAID, max_tokens=400)
        for _ in range(pieces):
            next(stream)
        state, name = stream.state(KEY), stream.id
        stream.close()
    return state, name


@pytest.mark.parametrize("pieces", [1, 2, 7])
@pytest.mark.parametrize("resume", [0, 3])
def test_another_client_reads_the_whole_answer(relay: Relay, pieces: int, resume: int) -> None:
    state, name = begun(relay, pieces)
    with connect(relay, resume=resume) as other:
        stream = other.continue_stream(state, key=KEY)
        said = list(stream)
    assert "".join(said) == SAID == stream.reply().text
    assert (stream.id, stream.finish_reason) == (name, "stop")
    assert stream.receipt is not None and stream.usage is not None
    assert stream.usage.completion == stream.receipt.completion_tokens < len(SAID.encode())


def test_async_and_once_more(relay: Relay) -> None:
    state, _ = begun(relay, 2)

    async def read() -> str:
        async with connect_async(relay) as other:
            stream = other.continue_stream(state, key=KEY)
            for _ in range(3):
                await anext(stream)
            again = stream.state(KEY)
            await stream.aclose()
            return (await other.continue_stream(again, key=KEY).reply()).text

    assert asyncio.run(read()) == SAID


def test_a_worker_with_another_model_file(relay: Relay) -> None:
    state, _ = begun(relay, 2)
    with connect(relay) as other:
        root = other._sealed.root
        opened = StreamState.open(state, KEY, root, time.time())
        bent = replace(opened, resume={**opened.resume, "digest": "sha256:00"}).seal(KEY, root)
        with pytest.raises(lacre.ApiError) as caught:
            other.continue_stream(bent, key=KEY).reply()
    assert caught.value.code == "model_changed"


@pytest.mark.parametrize("key", [secrets.token_bytes(32), b"short", "text", None], ids=["another", "short", "str", "None"])
def test_keys(relay: Relay, key: Any) -> None:
    state, _ = begun(relay, 2)
    with connect(relay) as other, pytest.raises(lacre.UsageError):
        other.continue_stream(state, key=key)


def test_old_states_and_the_text_of_new_ones(relay: Relay) -> None:
    state, _ = begun(relay, 2)
    assert all(said not in b64u_decode(state) for said in (b"messages", "日".encode(), b"sha256"))
    with connect(relay) as other:
        opened = StreamState.open(state, KEY, other._sealed.root, time.time())
        assert 0 < opened.until - time.time() <= LIFETIME
        old = replace(opened, until=time.time() - 1).seal(KEY, other._sealed.root)
        with pytest.raises(lacre.Expired):
            other.continue_stream(old, key=KEY)


@pytest.fixture
def thinking() -> Iterator[Relay]:
    """Of an engine that first thinks, and may call functions."""
    with closing(ScriptedEngine(lambda _: "<think>I should\nsay so.</think>It rains in Porto.")) as engine:
        engine.model = replace(engine.model, chat_template=CHAT_TEMPLATE + "{# </think> #}")
        yield Relay(create_app([engine]), model="scripted")


@pytest.mark.parametrize("pieces", [1, 5, 30])
def test_reasoning_is_part_of_the_answer(thinking: Relay, pieces: int) -> None:
    with connect(thinking) as client:
        stream = client.chat_stream("Hi", max_tokens=200)
        events = stream.events()
        for _ in range(pieces):
            next(events)
        state = stream.state(KEY)
        stream.close()
        again = client.continue_stream(state, key=KEY)
        for _ in range(2):
            next(again.events())
        reply = client.continue_stream(again.state(KEY), key=KEY).reply()
    assert (reply.reasoning, reply.text) == ("I should\nsay so.", "It rains in Porto.")


CALL = '<tool_call>\n{"name": "weather", "arguments": {"place": "Porto"}}\n</tool_call>'
TOOLS: list[Any] = [{"type": "function", "function": {"name": "weather", "parameters": {"type": "object"}}}]


@pytest.mark.parametrize("events", [1, 9, 20, 33, 45])
def test_an_answer_with_reasoning_and_calls(events: int) -> None:
    """Wherever the state was taken, in the reasoning, the text or a call: the other client has all of it, and once."""
    with closing(ScriptedEngine(lambda _: f"<think>It is grey</think>\n\nIt rains.\n{CALL}\n{CALL}")) as engine:
        engine.model = replace(engine.model, chat_template=CHAT_TEMPLATE + "{# </think> #}")
        relay = Relay(create_app([engine]), model="scripted")
        with connect(relay) as client:
            stream = client.chat_stream(SAID, tools=TOOLS, max_tokens=400)
            source = stream.events()
            for _ in range(events):
                next(source)
            state = stream.state(KEY)
            stream.close()
        with connect(relay) as other:
            reply = other.continue_stream(state, key=KEY).reply()
    assert (reply.reasoning, reply.text, reply.finish_reason) == ("It is grey", "It rains.", "tool_calls")
    assert [(call.name, call.arguments) for call in reply.tool_calls] == [("weather", '{"place": "Porto"}')] * 2
    assert len({call.id for call in reply.tool_calls}) == 2


def test_what_another_process_cannot_be_told_of(thinking: Relay) -> None:
    with connect(thinking) as client:
        stream = client.chat_stream("Hi", max_tokens=200, logprobs=True)
        next(stream)
        with pytest.raises(lacre.UsageError, match="cannot be"):
            stream.state(KEY)
        assert stream.reply().text == "It rains in Porto."


@pytest.mark.parametrize(
    "choices",
    [
        [{"index": 1, "delta": {"content": "a"}}],
        [{"index": 0, "delta": {"content": "a"}}, {"index": 1, "delta": {}}],
        [{"index": 0, "delta": {"content": "a"}, "logprobs": {"content": []}}],
        [{"index": 0, "delta": {"audio": {"id": "x"}}}],
        [{"index": 0, "text": "a"}],
    ],
)
def test_more_than_a_state_holds(choices: list[Any]) -> None:
    told = FirstChoice()
    told.add({"choices": [{"index": 0, "delta": {"role": "assistant", "content": "", "refusal": None}, "logprobs": None}]})
    assert not told.partly
    told.add({"choices": choices})
    assert told.partly


def test_another_default_model(relay: Relay) -> None:
    """The client that continues may have another default: the state names the model."""
    state, _ = begun(relay, 2)
    with connect(relay) as other:
        stream = other.with_options(model="another").continue_stream(state, key=KEY)
        assert "".join(stream) == SAID


class TestToken:
    def test_says_nothing(self) -> None:
        sealed = STATE.seal(KEY, ROOT)
        assert StreamState.open(sealed, KEY, ROOT, time.time()) == STATE
        assert sealed != STATE.seal(KEY, ROOT)

    @pytest.mark.parametrize("place", [0, 20, -1])
    def test_altered(self, place: int) -> None:
        sealed = STATE.seal(KEY, ROOT)
        bent = list(sealed)
        bent[place] = "A" if bent[place] != "A" else "Q"
        with pytest.raises(lacre.UsageError):
            StreamState.open("".join(bent), KEY, ROOT, time.time())

    @pytest.mark.parametrize("token", ["", "x", "AAAA", "é", "A" * 100])
    def test_none(self, token: str) -> None:
        with pytest.raises(lacre.UsageError):
            StreamState.open(token, KEY, ROOT, time.time())

    def test_of_another_root_and_too_old(self) -> None:
        sealed = STATE.seal(KEY, ROOT)
        with pytest.raises(lacre.UsageError):
            StreamState.open(sealed, KEY, b"q" * 32, time.time())
        with pytest.raises(lacre.Expired):
            StreamState.open(sealed, KEY, ROOT, STATE.until)


def test_nothing_to_continue(relay: Relay) -> None:
    with connect(relay) as client:
        stream = client.chat_stream(SAID, max_tokens=400)
        with pytest.raises(lacre.UsageError, match="not begun"):
            stream.state(KEY)
        stream.reply()
        with pytest.raises(lacre.UsageError, match="has ended"):
            stream.state(KEY)
        several = client.chat_stream(SAID, max_tokens=400, n=2)
        next(several)
        with pytest.raises(lacre.UsageError):
            several.state(KEY)
