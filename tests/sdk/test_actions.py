"""Which action a request is, as client and worker both read it."""

from __future__ import annotations

import pytest

from lacre.inner import NO_OUTPUT, Plain, action_of, prepare


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


def test_a_look_at_the_models() -> None:
    prepared = prepare(Plain("GET", "/v1/models", (), b""), ("first", "e"), keep_identifying_fields=False)
    assert (prepared.action, prepared.model, prepared.max_tokens) == ("inspect", "first", NO_OUTPUT)
