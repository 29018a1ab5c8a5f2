"""Which action a request is, as client and worker both read it; and what a caller meant by a path that there is not."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

import lacre
from lacre import problems
from lacre.errors import UsageError
from lacre.exchange.model_paths import KNOWN, METHODS, misdirected
from lacre.exchange.request import NO_OUTPUT, OTHER_CEILING, Plain, Prepared, action_of, prepare
from lacre.trust.manifest import MAX_OUTPUT, ModelEntry, ModelKind
from lacre.wire.outer import MAX_TOKENS

CHAT = "/v1/chat/completions"
MODELS = {
    "first": ModelEntry(),
    "e": ModelEntry(kind=ModelKind.EMBED, context=512),
    "r": ModelEntry(kind=ModelKind.RERANK),
    "small": ModelEntry(kind=ModelKind.GENERATE, context=1000),
    "long": ModelEntry(kind=ModelKind.GENERATE, context=100_000, max_output=20_000),
}
ACTIONS = {
    "chat": [f"POST {CHAT}", "POST /v1/responses", "POST /v1/messages"],
    "complete": ["POST /v1/completions", "POST /infill"],
    "embed": ["POST /v1/embeddings"],
    "rerank": ["POST /v1/rerank"],
    "explain": ["POST /v1/explain"],
    "inspect": ["GET /v1/models", "GET /v1/models/org/name", "POST /v1/tokenize", "POST /v1/responses/input_tokens",
                "POST /v1/messages/count_tokens"],
    # OpenAI's way to delete a model is no mere look
    "http": ["DELETE /v1/models/name", "POST /v1/models", "get /v1/models", "GET /v1/modelsx", "GET /v1/tokenize",
             "POST /predict"],
}  # fmt: skip


@pytest.mark.parametrize(("said", "action"), [(said, action) for action, all_of_it in ACTIONS.items() for said in all_of_it])
def test_action(said: str, action: str) -> None:
    assert action_of(*said.split()) == action


def prepared(path: str, content: bytes = b"", method: str = "POST", keep: bool = False, **headers: str) -> Prepared:
    """headers: with `_` for `-`."""
    fields = tuple((name.replace("_", "-"), value) for name, value in headers.items())
    return prepare(Plain(method, path, fields, content), MODELS, keep_identifying_fields=keep)


@pytest.mark.parametrize(
    ("path", "content", "headers", "model", "ceiling"),
    [
        ("/v1/embeddings", b'{"model": "e", "input": "x"}', {}, "e", NO_OUTPUT),
        ("/v1/tokenize", b'{"model": "e", "prompt": "x"}', {}, "e", NO_OUTPUT),
        ("/v1/tokenize", b'{"prompt": "x"}', {}, "first", NO_OUTPUT),
        (CHAT, b"{}", {}, "first", MAX_OUTPUT),
        # the ceiling covers all choices
        (CHAT, b'{"model": "e", "n": 2, "max_tokens": 3}', {}, "e", 6),
        (CHAT, b'{"n": 2, "max_completion_tokens": 5}', {}, "first", 10),
        (CHAT, b'{"n": 3}', {}, "first", 3 * MAX_OUTPUT),
        (CHAT, b'{"max_tokens": -1}', {}, "first", OTHER_CEILING),
        ("/v1/responses", b'{"max_output_tokens": 7, "max_tokens": 9}', {}, "first", 7),
        ("/v1/messages", b'{"max_tokens": 9}', {}, "first", 9),
        ("/v1/messages/count_tokens", b'{"max_tokens": 9}', {}, "first", NO_OUTPUT),
        ("/v1/explain", b'{"max_tokens": 9}', {}, "first", 9),
        ("/v1/explain", b'{"max_tokens": 9, "lens": true}', {}, "first", 9),
        ("/v1/explain", b'{"max_tokens": 9, "answer": "given: none is made"}', {}, "first", NO_OUTPUT),
        # what a body cannot say, a header can
        ("/predict", b'{"user": "u"}', {}, "first", OTHER_CEILING),
        ("/predict", b'{"user": "u"}', {"lacre_model": "e", "lacre_max_tokens": "4096"}, "e", 4096),
        (CHAT, b'{"user": "u"}', {"lacre_model": "long", "lacre_max_tokens": "7"}, "long", 20_000),
    ],
)
def test_what_stands_outside(path: str, content: bytes, headers: Any, model: str, ceiling: int) -> None:
    made = prepared(path, content, keep=True, **headers)
    assert (made.model, made.max_tokens) == (model, ceiling)
    assert not made.plain.headers  # copies of what stands outside are the seal's own to make


@pytest.mark.parametrize(
    ("path", "content", "ceiling", "is_default"),
    [
        (CHAT, b'{"model": "small"}', 1000, True),
        (CHAT, b'{"model": "long", "n": 2}', 40_000, True),
        (CHAT, b'{"model": "elsewhere", "max_tokens": null}', MAX_OUTPUT, True),
        (CHAT, b'{"model": "small", "resume": {"tokens": [1, 2, 3]}}', 997, True),
        ("/v1/responses", b'{"model": "small"}', 1000, True),
        ("/v1/completions", b'{"model": "small", "prompt": ["a", "b"], "n": 2}', 4000, True),
        ("/v1/completions", b'{"model": "small", "prompt": [[1, 2], [3]], "max_tokens": 5}', 10, False),
        ("/v1/completions", b'{"model": "small", "prompt": [1, 2]}', 1000, True),
        (CHAT, b'{"model": "small", "max_tokens": 9000}', 9000, False),
        ("/infill", b'{"model": "small", "input_prefix": "x", "n_predict": -1}', 1000, True),
        ("/infill", b'{"model": "small", "input_prefix": "x", "n_predict": 30}', 30, False),
        (CHAT, b'{"model": "small", "max_completion_tokens": 1}', 1, False),
        (CHAT, b'{"model": "small", "max_tokens": "many"}', OTHER_CEILING, False),
        ("/v1/explain", b'{"model": "small"}', OTHER_CEILING, False),
        ("/v1/embeddings", b'{"model": "e"}', NO_OUTPUT, False),
        ("/predict", b'{"model": "small"}', OTHER_CEILING, False),
    ],
)
def test_only_what_the_caller_left_open_is_a_default(path: str, content: bytes, ceiling: int, is_default: bool) -> None:
    made = prepared(path, content)
    assert (made.max_tokens, made.is_default) == (ceiling, is_default)


@pytest.mark.parametrize(
    ("path", "model"),
    [(CHAT, "first"), ("/v1/completions", "first"), ("/v1/embeddings", "e"), ("/v1/rerank", "r"), ("/v1/explain", "first")],
)
def test_a_request_that_names_no_model_goes_to_one_that_can(path: str, model: str) -> None:
    made = prepared(path, b"{}")
    assert (made.model, json.loads(made.plain.content)["model"]) == (model, model)


def test_the_default_model_stays_where_the_manifest_names_no_better_one() -> None:
    plain = Plain("POST", CHAT, (), b"{}")
    described = {"e": MODELS["e"], "small": MODELS["small"]}
    assert prepare(plain, described, keep_identifying_fields=False).model == "small"
    assert prepare(plain, {"e": MODELS["e"]}, keep_identifying_fields=False).model == "e"
    assert (
        prepare(replace(plain, path="/v1/embeddings"), {"small": MODELS["small"]}, keep_identifying_fields=False).model
        == "small"
    )


@pytest.mark.parametrize(
    "headers",
    [{"lacre_model": "e f"}, {"lacre_max_tokens": "0"}, {"lacre_max_tokens": "4k"}, {"lacre_max_tokens": str(MAX_TOKENS + 1)}],
)
def test_what_no_header_may_say(headers: dict[str, str]) -> None:
    with pytest.raises(UsageError):
        prepared("/predict", **headers)


@pytest.mark.parametrize("path", ["/predict", "/v1/responses", "/v1/messages", CHAT])
@pytest.mark.parametrize("name", ["user", "metadata", "prompt_cache_key", "safety_identifier", "user_profile_id"])
def test_no_body_says_who_asks(path: str, name: str) -> None:
    """Whatever the path: a server behind it reads what stands in the body."""
    content = json.dumps({"model": "e", name: {"user_id": "u"}, "instances": []}).encode()
    assert json.loads(prepared(path, content).plain.content) == {"model": "e", "instances": []}
    assert prepared(path, content, keep=True).plain.content == content


def test_what_says_nothing_of_the_caller_is_left_as_it_is() -> None:
    content = b'{"instances":  []}'
    assert prepared("/predict", content).plain.content == content
    assert prepared("/predict", b'["user"]').plain.content == b'["user"]'


def test_a_look_at_the_models() -> None:
    made = prepared("/v1/models", method="GET")
    assert (made.action, made.model, made.max_tokens) == ("inspect", "first", NO_OUTPUT)


MISDIRECTED = {
    problems.PATH_FORM: [
        *((f"POST {path}", (CHAT,)) for path in (
            "/v1//chat/completions", f"{CHAT}/", f"/{CHAT}", "/v1/chat/./completions", "/v1/%63hat/completions",
            "/V1/Chat/Completions", "/chat/completions",
        )),
        ("GET /v1//models/Tiny", ("/v1/models/Tiny",)),
        ("POST /v1/embeddings ", ("/v1/embeddings",)),
    ],
    problems.WRONG_METHOD: [
        (f"{method} {path}", (path,))
        for method, path in (("POST", "/v1/models"), ("DELETE", "/v1/models/tiny"), ("GET", "/v1/tokenize"))
    ],
    problems.UNKNOWN_PATH: [
        *((f"POST {path}", KNOWN) for path in (
            "/v1/threads", "/v1/chat", "/v1/audio/transcriptions", "/v2/chat/completions", "/v1/models/tiny:predict",
        )),
        ("GET /", KNOWN),
    ],
}  # fmt: skip
ROWS = [(said, problem, paths) for problem, rows in MISDIRECTED.items() for said, paths in rows]


@pytest.mark.parametrize(("said", "problem", "paths"), ROWS)
def test_a_path_that_there_is_not(said: str, problem: problems.Problem, paths: tuple[str, ...]) -> None:
    method, _, path = said.partition(" ")
    assert action_of(method, path) == "http"
    found, details = misdirected(method, path)
    assert (found, details["paths"]) == (problem, paths)
    assert ("methods" in details) == (problem is problems.WRONG_METHOD)
    told = found.exception(None, details)
    assert isinstance(told, lacre.Forbidden)
    assert paths[0] in str(told)


@pytest.mark.parametrize("path", KNOWN)
def test_the_paths_are_those_of_the_actions(path: str) -> None:
    assert action_of(METHODS[path], path) != "http"


@given(st.sampled_from(["GET", "POST", "DELETE", "x"]), st.text())
def test_any_path_has_an_answer(method: str, path: str) -> None:
    problem, details = misdirected(method, path)
    assert problem in MISDIRECTED
    assert str(problem.exception(None, details))
