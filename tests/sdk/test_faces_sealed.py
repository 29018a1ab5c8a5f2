"""The Responses and Messages APIs through the seal, by their vendors' own clients."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import closing
from typing import Any

import anthropic
import openai
import pytest

import lacre
from lacre_backend.api.app import create_app
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
