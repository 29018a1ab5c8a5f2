"""The typed parameters of a chat are the members that the worker reads."""

from __future__ import annotations

import asyncio
import inspect
import json
from typing import Any, get_args, get_type_hints

import pytest

import lacre
from lacre.chat import params
from lacre_backend.api import requests
from lacre_backend.api.app import create_app
from parts.echo_engine import EchoEngine
from parts.relay import Relay, connect, connect_async

READ = frozenset(requests.ChatCompletionRequest.model_fields)
WITHOUT_EFFECT = frozenset(requests._INERT) | frozenset(requests._IGNORED)
OWN = {"messages", "stream", "resume"}  # the client writes these itself
DEPRECATED = {"functions", "function_call"}  # OpenAI's, replaced by `tools`
OF_TEXTS = {"echo", "best_of"}  # of text completions
NOT_HERE = {"audio", "prediction", "web_search_options", "moderation", "prompt_cache_options"}  # refused, whatever their value

# What a caller may pass for each parameter of a chat: a value that has an effect, or one that has none.
SAMPLES: dict[str, Any] = {
    "model": "tiny", "max_tokens": 40, "max_completion_tokens": 40, "temperature": 0.5, "top_p": 0.5, "n": 1, "stop": ["x"],
    "seed": 3, "frequency_penalty": 0.5, "presence_penalty": 0.5, "logit_bias": {"3": 1.0}, "logprobs": True,
    "top_logprobs": None,
    "response_format": {"type": "text"}, "tools": [], "tool_choice": "none", "parallel_tool_calls": True,
    "reasoning_effort": "low", "verbosity": None, "stream_options": None, "store": False, "service_tier": "auto",
    "modalities": ["text"], "user": "u", "metadata": {"a": "b"}, "safety_identifier": "s", "prompt_cache_key": "k",
    "prompt_cache_retention": "24h", "cache_control": {"type": "ephemeral"}, "top_k": 5, "min_p": 0.1, "repeat_penalty": 1.1,
    "chat_template_kwargs": {}, "max_reasoning_tokens": 9, "continue_final_message": False,
}  # fmt: skip


def test_the_names_are_the_workers() -> None:
    typed = frozenset(params.ChatParams.__annotations__)
    assert typed >= READ - OWN
    assert typed <= READ | WITHOUT_EFFECT
    assert WITHOUT_EFFECT - typed - READ == DEPRECATED | OF_TEXTS | NOT_HERE
    assert get_args(params.Effort) == get_args(requests.Effort)


def test_the_names_of_streams_and_explanations_are_the_workers() -> None:
    assert params.StreamChoices.__annotations__.keys() <= requests.StreamOptions.model_fields.keys()
    own = {"messages", "answer", "lens", "parts"}
    assert params.ExplainParams.__annotations__.keys() == requests.ExplainRequest.model_fields.keys() - own


@pytest.mark.parametrize("name", sorted(params.ChatParams.__annotations__))
def test_the_worker_takes_each(name: str) -> None:
    """Sealed, sync and async, whole and as a stream."""
    relay, given = Relay(create_app([EchoEngine(name="tiny")])), {name: SAMPLES[name]}

    async def ask() -> str:
        async with connect_async(relay, retries=0, keep_identifying_fields=True) as other:
            return (await other.chat("the sea", **given)).text  # type: ignore[arg-type]

    with connect(relay, retries=0, keep_identifying_fields=True) as client:
        assert client.chat("the sea", **given).text == client.chat_stream("the sea", **given).reply().text == "the sea"  # type: ignore[arg-type]
    assert asyncio.run(ask()) == "the sea"
    assert all(
        json.loads(opened.request.content).get(name) == SAMPLES[name] for opened in relay.opened if name != "stream_options"
    )


@pytest.mark.parametrize("kind", [lacre.Client, lacre.AsyncClient])
def test_both_clients_have_all_methods(kind: type[Any]) -> None:
    other = lacre.AsyncClient if kind is lacre.Client else lacre.Client
    for name in ("chat", "chat_stream", "continue_stream", "embed", "tokenize", "rerank", "explain", "with_options", "models"):
        mine, theirs = (inspect.signature(getattr(each, name)) for each in (kind, other))
        assert list(mine.parameters) == list(theirs.parameters)
    shared = get_type_hints(lacre.Client.__init__).keys() ^ get_type_hints(lacre.AsyncClient.__init__).keys()
    assert not shared and {"max_concurrency", "cache_scope"} <= get_type_hints(lacre.Client.__init__).keys()
