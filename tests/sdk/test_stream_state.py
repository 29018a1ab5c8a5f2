"""The state of a running answer: another client continues it, whole and once, and nobody else can read it."""

from __future__ import annotations

import asyncio
import secrets
import time
from dataclasses import replace
from typing import Any

import pytest

import lacre
from lacre.asgi import App
from lacre.exchange.stream_state import LIFETIME, StreamState
from lacre_backend.api.app import create_app
from parts.echo_engine import EchoEngine
from parts.relay import Relay, connect, connect_async

SAID = "日本 and 😀 seas"
KEY = secrets.token_bytes(32)
STATE = StreamState(b'{"messages":[]}', "sha256:77", (1, 2), "one", {"id": "c1"}, time.time() + LIFETIME)
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
        bent = replace(opened, digest="sha256:00").seal(KEY, root)
        with pytest.raises(lacre.ApiError) as caught:
            other.continue_stream(bent, key=KEY).reply()
    assert caught.value.code == "model_changed"


@pytest.mark.parametrize("key", [secrets.token_bytes(32), b"short", "text", None], ids=["another", "short", "str", "None"])
def test_keys(relay: Relay, key: Any) -> None:
    state, _ = begun(relay, 2)
    with connect(relay) as other, pytest.raises(lacre.UsageError):
        other.continue_stream(state, key=key)


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
