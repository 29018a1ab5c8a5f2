"""Which action a request is, as client and worker both read it."""

from __future__ import annotations

import pytest

from lacre.errors import UsageError
from lacre.exchange.request import DEFAULT_MAX_TOKENS, NO_OUTPUT, Plain, action_of, prepare
from lacre.wire.outer import MAX_TOKENS


@pytest.mark.parametrize(
    ("method", "path", "action"),
    [
        ("POST", "/v1/chat/completions", "chat"),
        ("POST", "/v1/completions", "complete"),
        ("POST", "/v1/embeddings", "embed"),
        ("POST", "/v1/rerank", "rerank"),
        ("GET", "/v1/models", "inspect"),
        ("GET", "/v1/models/org/name", "inspect"),
        ("POST", "/v1/tokenize", "inspect"),
        ("DELETE", "/v1/models/name", "http"),  # OpenAI's way to delete a model: no mere look
        ("POST", "/v1/models", "http"),
        ("get", "/v1/models", "http"),
        ("GET", "/v1/modelsx", "http"),
        ("GET", "/v1/tokenize", "http"),
        ("POST", "/predict", "http"),
    ],
)
def test_action(method: str, path: str, action: str) -> None:
    assert action_of(method, path) == action


@pytest.mark.parametrize(
    ("path", "content", "model", "ceiling"),
    [
        ("/v1/embeddings", b'{"model": "e", "input": "x"}', "e", NO_OUTPUT),
        ("/v1/tokenize", b'{"model": "e", "prompt": "x"}', "e", NO_OUTPUT),
        ("/v1/tokenize", b'{"prompt": "x"}', "first", NO_OUTPUT),
        ("/v1/chat/completions", b'{"model": "e", "n": 2, "max_tokens": 3}', "e", 6),
    ],
)
def test_what_stands_outside(path: str, content: bytes, model: str, ceiling: int) -> None:
    prepared = prepare(Plain("POST", path, (), content), ("first", "e"), keep_identifying_fields=False)
    assert (prepared.model, prepared.max_tokens) == (model, ceiling)


@pytest.mark.parametrize(
    ("path", "headers", "model", "ceiling"),
    [
        ("/predict", {}, "first", DEFAULT_MAX_TOKENS),
        ("/predict", {"lacre-model": "e", "lacre-max-tokens": "4096"}, "e", 4096),
        ("/v1/chat/completions", {"lacre-model": "e", "lacre-max-tokens": "4096"}, "e", DEFAULT_MAX_TOKENS),
    ],
)
def test_what_a_body_cannot_say_a_header_can(path: str, headers: dict[str, str], model: str, ceiling: int) -> None:
    plain = Plain("POST", path, tuple(headers.items()), b'{"instances": [], "user": "u"}')
    prepared = prepare(plain, ("first", "e"), keep_identifying_fields=True)
    assert (prepared.model, prepared.max_tokens) == (model, ceiling)
    assert not prepared.plain.headers  # copies of what stands outside are the seal's own to make


@pytest.mark.parametrize(
    "headers",
    [{"lacre-model": "e f"}, {"lacre-max-tokens": "0"}, {"lacre-max-tokens": "4k"}, {"lacre-max-tokens": str(MAX_TOKENS + 1)}],
)
def test_what_no_header_may_say(headers: dict[str, str]) -> None:
    with pytest.raises(UsageError):
        prepare(Plain("POST", "/predict", tuple(headers.items()), b""), ("first",), keep_identifying_fields=False)


def test_what_an_application_answers_is_left_as_it_is() -> None:
    content = b'{"user": "ours",  "instances": []}'
    assert prepare(Plain("POST", "/predict", (), content), ("first",), keep_identifying_fields=False).plain.content == content


def test_a_look_at_the_models() -> None:
    prepared = prepare(Plain("GET", "/v1/models", (), b""), ("first", "e"), keep_identifying_fields=False)
    assert (prepared.action, prepared.model, prepared.max_tokens) == ("inspect", "first", NO_OUTPUT)
