"""A path that the model API does not have: what the caller probably meant, told by the side that knows the path."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

import lacre
from lacre import problems
from lacre.exchange.model_paths import KNOWN, METHODS, misdirected
from lacre.exchange.request import action_of
from lacre.problems import Problem

CHAT = "/v1/chat/completions"


@pytest.mark.parametrize(
    ("method", "path", "problem", "paths"),
    [
        ("POST", "/v1//chat/completions", problems.PATH_FORM, (CHAT,)),
        ("POST", "/v1/chat/completions/", problems.PATH_FORM, (CHAT,)),
        ("POST", "//v1/chat/completions", problems.PATH_FORM, (CHAT,)),
        ("POST", "/v1/chat/./completions", problems.PATH_FORM, (CHAT,)),
        ("POST", "/v1/%63hat/completions", problems.PATH_FORM, (CHAT,)),
        ("POST", "/V1/Chat/Completions", problems.PATH_FORM, (CHAT,)),
        ("POST", "/chat/completions", problems.PATH_FORM, (CHAT,)),
        ("GET", "/v1//models/Tiny", problems.PATH_FORM, ("/v1/models/Tiny",)),
        ("POST", "/v1/embeddings ", problems.PATH_FORM, ("/v1/embeddings",)),
        ("POST", "/v1/models", problems.WRONG_METHOD, ("/v1/models",)),
        ("DELETE", "/v1/models/tiny", problems.WRONG_METHOD, ("/v1/models/tiny",)),
        ("GET", "/v1/tokenize", problems.WRONG_METHOD, ("/v1/tokenize",)),
        ("POST", "/v1/responses", problems.UNKNOWN_PATH, KNOWN),
        ("POST", "/v1/chat", problems.UNKNOWN_PATH, KNOWN),
        ("POST", "/v1/audio/transcriptions", problems.UNKNOWN_PATH, KNOWN),
        ("POST", "/v2/chat/completions", problems.UNKNOWN_PATH, KNOWN),
        ("POST", "/v1/models/tiny:predict", problems.UNKNOWN_PATH, KNOWN),
        ("GET", "/", problems.UNKNOWN_PATH, KNOWN),
    ],
)
def test_each(method: str, path: str, problem: Problem, paths: tuple[str, ...]) -> None:
    assert action_of(method, path) == "http"
    found, details = misdirected(method, path)
    assert (found, details["paths"]) == (problem, paths)
    assert ("methods" in details) == (problem is problems.WRONG_METHOD)
    said = found.exception(None, details)
    assert isinstance(said, lacre.Forbidden)
    assert paths[0] in str(said)


@pytest.mark.parametrize("path", KNOWN)
def test_the_paths_are_those_of_the_actions(path: str) -> None:
    assert action_of(METHODS[path], path) != "http"


@given(st.sampled_from(["GET", "POST", "DELETE", "x"]), st.text())
def test_any_path_has_an_answer(method: str, path: str) -> None:
    problem, details = misdirected(method, path)
    assert problem in (problems.UNKNOWN_PATH, problems.PATH_FORM, problems.WRONG_METHOD)
    assert str(problem.exception(None, details))
